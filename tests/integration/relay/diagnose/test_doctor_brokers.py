"""Brokers that do not keep what is handed over are named, topic by topic and queue by queue; healthy ones are not."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pika
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from outboxkit.brokers import Subscription
from outboxkit.findings import Finding, FindingSeverity
from outboxkit_relay.diagnose.doctor import doctor
from tests import servers
from tests.integration.relay.diagnose.world import PATIENCE, settings_of
from tests.integration.relay.world import engine_for
from tests.servers.local import LocalServer
from tests.servers.rabbitmq import program

# --- Kafka -------------------------------------------------------------------------------------------------------

TOPICS: dict[str, dict[str, str]] = {
    "healthy": {},
    "min-insync-replicas": {"min.insync.replicas": "2"},
    "unclean-leader-election": {"unclean.leader.election.enable": "true"},
    "message-size": {"max.message.bytes": "100000"},
    "compacted-topic": {"cleanup.policy": "compact"},
    "retention-broker": {"retention.ms": "-1"},
    "partitions-changed": {},
}


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/app.db"
    engine_for(url).dispose()
    return url


def _by_subject(found: list[Finding], mark: str) -> dict[str, str]:
    """What is wrong with each topic or queue, by the name that it has in the test."""
    wrong = [one for one in found if one.severity is not FindingSeverity.NOTE]
    assert all(one.fix for one in wrong)
    return {
        word.partition("_")[0]: one.check for one in wrong for word in one.seen.replace(":", "").split() if mark in word
    }


def test_each_topic_that_keeps_too_little_is_named(kafka: servers.Server, url: str) -> None:
    mark = uuid4().hex[:8]
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    made = admin.create_topics([NewTopic(f"{name}_{mark}", 2, 1, config=told) for name, told in TOPICS.items()])
    for one in made.values():
        one.result(30)
    destinations: dict[str, dict[str, int]] = {f"{name}_{mark}": {} for name in (*TOPICS, "topic-missing")}
    destinations[f"partitions-changed_{mark}"] = {"partitions": 6}

    found = doctor(settings_of(url, kafka.url, destinations=destinations), patience=PATIENCE)

    expected = {name: name for name in (*TOPICS, "topic-missing") if name != "healthy"}
    assert _by_subject(found, mark) == expected
    assert {one.check for one in found if one.severity is FindingSeverity.NOTE} == {"single-broker"}
    assert f"outboxkit init --topic topic-missing_{mark}" in {one.fix for one in found}


def test_messages_that_were_deleted_before_their_consumer_read_them_are_counted(
    kafka: servers.Server, url: str
) -> None:
    topic = f"short-{uuid4().hex[:8]}"
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    admin.create_topics([NewTopic(topic, 1, 1)])[topic].result(30)
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for _ in range(10):
        producer.produce(topic, b"x")
    assert producer.flush(30) == 0
    reader = Consumer({"bootstrap.servers": kafka.bootstrap, "group.id": topic})
    reader.commit(offsets=[TopicPartition(topic, 0, 3)], asynchronous=False)
    reader.close()
    for deleted in admin.delete_records([TopicPartition(topic, 0, 8)]).values():
        deleted.result(30)
    late = Subscription(consumer=topic, topics=(topic,))
    settings = settings_of(url, kafka.url, broker={"auto.offset.reset": "latest"})

    found = doctor(settings, patience=PATIENCE, subscriptions=[late])

    assert {one.check for one in found} == {"deleted-unread", "start-position", "single-broker"}
    assert f"{topic} has read {topic}[0] up to 3, and the log begins at 8: 5 messages" in found[0].seen


# --- RabbitMQ ----------------------------------------------------------------------------------------------------

OURS: dict[str, Any] = {"x-queue-type": "quorum", "x-single-active-consumer": True, "x-delivery-limit": 1_000_000_000}
QUEUES: dict[str, dict[str, Any]] = {
    "healthy": OURS,
    "queue-not-quorum": {"x-single-active-consumer": True},
    "queue-order": {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000},
    "delivery-limit": {**OURS, "x-delivery-limit": 5},
    "queue-length": {**OURS, "x-max-length": 1000},
    "queue-age": {**OURS, "x-message-ttl": 60_000},
}


@pytest.fixture
def management(rabbitmq: servers.Server) -> Iterator[str]:
    """The management interface of the test's RabbitMQ, on a port of its own."""
    if not isinstance(rabbitmq, LocalServer):
        yield ""  # at its usual place
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = f'application:set_env(rabbitmq_management, tcp_config, [{{port, {port}}}, {{ip, "127.0.0.1"}}]).'
    program(rabbitmq, "rabbitmqctl", "eval", where)
    program(rabbitmq, "rabbitmq-plugins", "enable", "rabbitmq_management")
    yield f"http://127.0.0.1:{port}"
    (rabbitmq.folder / "enabled_plugins").write_text("[].\n")  # it runs until the node is started anew


def test_each_queue_that_drops_or_reverses_messages_is_named(
    rabbitmq: servers.Server, url: str, management: str
) -> None:
    mark = uuid4().hex[:8]
    topics = [f"{name}_{mark}" for name in (*QUEUES, "exchange-unbound", "alternate-exchange")]
    destinations: dict[str, dict[str, int]] = {topic: {} for topic in topics}
    broker = {"management": management} if management else {}
    with contextlib.closing(pika.BlockingConnection(pika.URLParameters(rabbitmq.url))) as connection:
        channel = connection.channel()
        _declare(channel, topics, mark)
        found = doctor(
            settings_of(url, rabbitmq.url, destinations=destinations, broker=broker),
            patience=PATIENCE,
            subscriptions=[Subscription(consumer="billing", topics=_read(mark))],
        )
        for topic in (*topics, f"rest_{mark}"):
            channel.exchange_delete(topic)
        for name in QUEUES:
            channel.queue_delete(f"{name}_{mark}.billing")

    names = (*QUEUES, "exchange-unbound", "alternate-exchange", "topic-missing")
    assert _by_subject(found, mark) == {name: name for name in names if name != "healthy"} | {
        "rest": "alternate-exchange"
    }
    assert {one.check for one in found if one.severity is FindingSeverity.NOTE} == {"single-broker"}


def _read(mark: str) -> tuple[str, ...]:
    return (*(f"{name}_{mark}" for name in QUEUES), f"topic-missing_{mark}")


def _declare(channel: Any, topics: list[str], mark: str) -> None:
    channel.exchange_declare(f"rest_{mark}", "fanout", durable=True)
    for topic in topics:
        other = {"alternate-exchange": f"rest_{mark}"} if topic.startswith("alternate") else {}
        channel.exchange_declare(topic, "topic", durable=True, arguments=other)
    for name, arguments in QUEUES.items():
        channel.queue_declare(f"{name}_{mark}.billing", durable=True, arguments=arguments)
        channel.queue_bind(f"{name}_{mark}.billing", f"{name}_{mark}", "#")


def test_without_the_management_interface_it_says_what_was_not_examined(rabbitmq: servers.Server, url: str) -> None:
    found = doctor(settings_of(url, rabbitmq.url, broker={"management": "http://127.0.0.1:1"}), patience=PATIENCE)

    (note,) = found
    assert (note.check, note.severity) == ("management-away", FindingSeverity.NOTE)
    assert "rabbitmq_management" in note.fix


def test_a_broker_that_is_away_is_one_finding(url: str) -> None:
    (found,) = doctor(settings_of(url, "amqp://guest@127.0.0.1:1/"), patience=PATIENCE)

    assert found.check == "broker"
    assert "127.0.0.1:1" in found.seen


def test_a_login_that_is_refused_is_one_finding_without_its_password(rabbitmq: servers.Server, url: str) -> None:
    (found,) = doctor(settings_of(url, rabbitmq.url.replace("guest:", "guest:CANARY")), patience=PATIENCE)

    assert found.check == "broker"
    assert "CANARY" not in found.seen + found.fix
