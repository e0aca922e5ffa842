"""Behaviour that only a real RabbitMQ can show."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from outboxkit.brokers import Batch, Publisher, Subscription, open_publisher, open_subscriber
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row
from tests import canaries, servers
from tests.integration.brokers.world import PATIENCE, SOON, bound, read

NOBODY = "amqp://127.0.0.1:1/"


@pytest.fixture
def publisher(rabbitmq: servers.Server) -> Iterator[Publisher]:
    opened = open_publisher(rabbitmq.url)
    yield opened
    opened.close()


def test_only_the_messages_without_a_queue_are_refused(
    publisher: Publisher,
    channel: BlockingChannel,
    topic: str,
) -> None:
    """All with the same message id: the outcome belongs to the position."""
    bound(channel, topic, f"{topic}.q", "wanted")
    same = make_row(topic)
    rows = [
        same._replace(position=same.position + n, type="wanted" if n % 3 else "unwanted", payload=b"%d" % n)
        for n in range(30)
    ]

    refusals = publisher.publish(Batch(topic, rows)).result(60).refusals

    assert [refusal.index for refusal in refusals] == list(range(0, 30, 3))
    assert {refusal.failure for refusal in refusals} == {Failure.UNROUTABLE}
    assert channel.queue_declare(f"{topic}.q", passive=True).method.message_count == 20


def test_a_full_queue_refuses_and_says_which(publisher: Publisher, channel: BlockingChannel, topic: str) -> None:
    bound(channel, topic, f"{topic}.q", max_length=5, overflow="reject-publish")

    refusals = publisher.publish(Batch(topic, [make_row(topic, b"%d" % n) for n in range(50)])).result(60).refusals

    assert {refusal.failure for refusal in refusals} == {Failure.REFUSING}
    stored = channel.queue_declare(f"{topic}.q", passive=True).method.message_count
    assert stored == 50 - len(refusals)
    assert refusals


def test_a_foreign_consumer_sees_the_properties(publisher: Publisher, channel: BlockingChannel, topic: str) -> None:
    bound(channel, topic, f"{topic}.q")
    row = make_row(topic, b'{"a": 1}', headers=(("twice", b"1"), ("twice", b"2"), ("blob", b"\xff")))

    assert not publisher.publish(Batch(topic, [row])).result(60).refusals

    frame, properties, body = channel.basic_get(f"{topic}.q", auto_ack=True)
    assert (frame.exchange, frame.routing_key, body) == (topic, "order.placed", b'{"a": 1}')
    assert properties.delivery_mode == 2
    assert properties.message_id == str(row.id)
    assert properties.type == "order.placed"
    assert properties.app_id == "urn:conformance"
    assert properties.correlation_id == "c-1"
    assert properties.content_type == "application/json"
    assert properties.timestamp == int(row.recorded_at.timestamp())
    assert properties.headers["cloudEvents:sequence"] == f"{row.position:020d}"
    assert properties.headers["cloudEvents:partitionkey"] == "k"
    assert properties.headers["twice"] == ["1", "2"]
    assert properties.headers["blob"] == b"\xff"


def test_an_exchange_that_goes_away_makes_nothing_look_published(
    publisher: Publisher,
    channel: BlockingChannel,
    topic: str,
) -> None:
    bound(channel, topic, f"{topic}.q")
    bound(channel, f"{topic}-other", f"{topic}-other.q")
    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals
    channel.exchange_delete(topic)

    lost = publisher.publish(Batch(topic, [make_row(topic) for _ in range(50)])).result(60)
    publisher.reset()
    later = publisher.publish(Batch(topic, [make_row(topic)])).result(60)
    other = publisher.publish(Batch(f"{topic}-other", [make_row(f"{topic}-other")])).result(60)

    assert {refusal.failure for refusal in lost.refusals} == {Failure.INDETERMINATE}
    assert len(lost.refusals) == 50
    assert [refusal.failure for refusal in later.refusals] == [Failure.UNKNOWN_TOPIC]
    assert not other.refusals


def test_names_and_headers_that_amqp_cannot_carry_are_refused_alone(
    publisher: Publisher,
    channel: BlockingChannel,
    topic: str,
) -> None:
    bound(channel, topic, f"{topic}.q")
    long_name = make_row(topic, headers=(("n" * 256, b""),))
    long_type = make_row(topic)._replace(type="t" * 256)
    wide = make_row(topic, headers=(("wide", b"x" * 200_000),))
    rows = [make_row(topic), long_name, long_type, wide, make_row(topic)]

    refusals = publisher.publish(Batch(topic, rows)).result(60).refusals

    assert [(refusal.index, refusal.failure) for refusal in refusals] == [
        (1, Failure.INVALID),
        (2, Failure.INVALID),
        (3, Failure.TOO_LARGE),
    ]
    assert channel.queue_declare(f"{topic}.q", passive=True).method.message_count == 2


def test_a_body_of_several_frames_arrives_whole(publisher: Publisher, channel: BlockingChannel, topic: str) -> None:
    bound(channel, topic, f"{topic}.q")
    payload = bytes(range(256)) * 2_000

    assert not publisher.publish(Batch(topic, [make_row(topic, payload)])).result(60).refusals

    assert channel.basic_get(f"{topic}.q", auto_ack=True)[2] == payload


def test_confirms_that_do_not_come_are_indeterminate(
    rabbitmq: servers.Server,
    channel: BlockingChannel,
    topic: str,
) -> None:
    bound(channel, topic, f"{topic}.q")
    publisher = open_publisher(rabbitmq.url, {"confirm_timeout": "1", "heartbeat": "60"})
    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals
    rabbitmq.pause()

    outcome = publisher.publish(Batch(topic, [make_row(topic), make_row(topic)])).result(60)
    rabbitmq.resume()

    assert [refusal.failure for refusal in outcome.refusals] == [Failure.INDETERMINATE] * 2
    publisher.reset()
    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals
    publisher.close()


@pytest.mark.parametrize(
    "url", ["amqp://guest:c4n4ry@{host}/", f"amqp://guest:{canaries.PASSWORD}@{{host}}/no-such-vhost-c4n4ry"]
)
async def test_a_refused_login_is_a_configuration_error_without_the_password(
    rabbitmq: servers.Server,
    url: str,
) -> None:
    host = rabbitmq.url.rpartition("@")[2].partition("/")[0]
    wrong = url.format(host=host)
    publisher = open_publisher(wrong)
    subscriber = open_subscriber(wrong, Subscription(consumer="c", topics=("t",)))

    with pytest.raises(ConfigurationError) as refused:
        publisher.check(["t"], PATIENCE)
    with pytest.raises(ConfigurationError):
        await subscriber.receive(1, SOON)

    assert ":c4n4ry" not in str(refused.value)
    assert publisher.publish(Batch("t", [make_row("t")])).result(60).refusals[0].failure is Failure.UNAUTHORIZED
    publisher.close()
    await subscriber.close()


async def test_nobody_there_is_broker_down_and_transient() -> None:
    publisher = open_publisher(NOBODY)
    subscriber = open_subscriber(NOBODY, Subscription(consumer="c", topics=("t",)))

    assert publisher.publish(Batch("t", [make_row("t")])).result(60).refusals[0].failure is Failure.BROKER_DOWN
    assert publisher.check(["t"], SOON)["t"].failure is Failure.BROKER_DOWN
    with pytest.raises(TransientBrokerError):
        await subscriber.receive(1, SOON)

    publisher.close()
    await subscriber.close()


async def test_a_queue_that_is_deleted_and_declared_again_is_consumed_again(
    rabbitmq: servers.Server,
    publisher: Publisher,
    channel: BlockingChannel,
    topic: str,
) -> None:
    subscription = Subscription(consumer="c", topics=(topic,))
    subscriber = open_subscriber(rabbitmq.url, subscription)
    await subscriber.declare(subscription)
    assert not await subscriber.receive(1, timedelta(milliseconds=200))

    channel.queue_delete(f"{topic}.c")
    with pytest.raises(TransientBrokerError, match="outboxkit init --topology"):
        await read(subscriber, 1)
    await subscriber.declare(subscription)
    assert not publisher.publish(Batch(topic, [make_row(topic, b"after")])).result(60).refusals

    assert [delivery.payload for delivery in await read(subscriber, 1)] == [b"after"]
    await subscriber.close()


async def test_one_consumer_is_active_and_the_next_takes_over_in_order(
    rabbitmq: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    subscription = Subscription(consumer="c", topics=(topic,))
    first = open_subscriber(rabbitmq.url, subscription)
    second = open_subscriber(rabbitmq.url, subscription)
    await first.declare(subscription)
    assert not await first.receive(5, timedelta(milliseconds=200))
    assert not await second.receive(5, timedelta(milliseconds=200))
    publisher.publish(Batch(topic, [make_row(topic, b"%d" % n) for n in range(10)])).result(60)

    held = await read(first, 10)
    assert not await second.receive(5, timedelta(milliseconds=200))
    await first.acknowledge(held[:4])
    await first.close()

    assert [delivery.payload for delivery in await read(second, 6)] == [b"%d" % n for n in range(4, 10)]
    await second.close()


async def test_topology_with_other_properties_is_a_configuration_error(
    rabbitmq: servers.Server,
    channel: BlockingChannel,
    topic: str,
) -> None:
    channel.queue_declare(f"{topic}.c", durable=True)
    subscription = Subscription(consumer="c", topics=(topic,))
    subscriber = open_subscriber(rabbitmq.url, subscription)

    with pytest.raises(ConfigurationError, match="other properties"):
        await subscriber.declare(subscription)

    await subscriber.close()


async def test_a_foreign_message_is_read_by_its_properties(
    rabbitmq: servers.Server,
    channel: BlockingChannel,
    topic: str,
) -> None:
    subscription = Subscription(consumer="c", topics=(topic,))
    subscriber = open_subscriber(rabbitmq.url, subscription)
    await subscriber.declare(subscription)
    properties = pika.BasicProperties(
        message_id="m-1",
        type="foreign.event",
        headers={"cloudEvents_source": "elsewhere", "n": 5, "on": True},
    )
    channel.basic_publish(topic, "any", b"body", properties)

    (delivery,) = await read(subscriber, 1)
    await subscriber.close()

    assert delivery.key is None
    assert dict(delivery.headers) == {
        "ce_id": b"m-1",
        "ce_type": b"foreign.event",
        "ce_source": b"elsewhere",
        "n": b"5",
        "on": b"true",
    }
