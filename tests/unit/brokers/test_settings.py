"""URLs and options: what is allowed, what it becomes, and that nothing secret is shown."""

from __future__ import annotations

import pytest

from outboxkit.brokers import Subscription, open_publisher, open_subscriber
from outboxkit.brokers.kafka import settings as kafka_settings
from outboxkit.brokers.rabbitmq import settings as rabbitmq_settings
from outboxkit.errors import ConfigurationError

CANARY = "c4n4ry"


def test_a_kafka_url_with_credentials_logs_in_over_tls() -> None:
    settings = kafka_settings.parse(f"kafka://relay:p%40{CANARY}@one:9093,two", {})

    assert settings.common == {
        "bootstrap.servers": "one:9093,two:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "relay",
        "sasl.password": f"p@{CANARY}",
    }


def test_kafka_over_tls_without_credentials() -> None:
    assert kafka_settings.parse("kafka+ssl://one", {}).common["security.protocol"] == "SSL"


def test_plain_kafka_sets_no_security() -> None:
    assert kafka_settings.parse("kafka://one", {}).common == {"bootstrap.servers": "one:9092"}


def test_kafka_options_win_over_the_query_and_go_to_their_side() -> None:
    settings = kafka_settings.parse(
        "kafka://one?sasl.mechanism=PLAIN&linger.ms=1",
        {"sasl.mechanism": "SCRAM-SHA-512", "auto.offset.reset": "error", "partitions": "12"},
    )

    assert settings.common["sasl.mechanism"] == "SCRAM-SHA-512"
    assert settings.publisher == {"linger.ms": "1"}
    assert settings.subscriber == {"auto.offset.reset": "error"}
    assert settings.partitions == 12


@pytest.mark.parametrize(
    "name",
    [
        "plugin.library.paths",
        "enable.idempotence",
        "acks",
        "message.timeout.ms",
        "bootstrap.servers",
        "ssl.engine.location",
    ],
)
def test_kafka_settings_that_load_code_or_break_a_promise_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name) as caught:
        kafka_settings.parse("kafka://one", {name: CANARY})

    assert "sasl.mechanism" in str(caught.value)
    assert CANARY not in str(caught.value)


def test_a_kafka_setting_with_a_wrong_value_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match=r"socket\.timeout\.ms"):
        open_publisher("kafka://127.0.0.1:1", {"socket.timeout.ms": "soon"})


def test_an_amqp_url_keeps_its_credentials_and_virtual_host_and_gets_a_heartbeat() -> None:
    settings = rabbitmq_settings.parse(f"rabbitmq://relay:p%40{CANARY}@host:5673/orders", {"cafile": "/ca.pem"})

    assert settings.urls() == [f"amqp://relay:p%40{CANARY}@host:5673/orders?heartbeat=10&cafile=%2Fca.pem"]


def test_rabbitmq_settings_that_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'auth'.*cafile") as caught:
        rabbitmq_settings.parse(f"amqp://host/?auth={CANARY}", {})

    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["kafka://", "kafka:///", "amqp://", "amqp:///vhost", "amqp://host:port/", "kafka://[::1"]
)
def test_a_url_that_cannot_be_read_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        open_publisher(url)


@pytest.mark.parametrize("url", [f"kafka://relay:{CANARY}@127.0.0.1:1", f"amqp://relay:{CANARY}@127.0.0.1:1/"])
def test_nothing_shows_the_password(url: str) -> None:
    publisher = open_publisher(url)
    subscriber = open_subscriber(url, Subscription(consumer="c", topics=("t",)))

    for shown in (repr(publisher), repr(subscriber), repr(kafka_settings.parse("kafka://" + url.split("//")[1], {}))):
        assert CANARY not in shown
        assert "127.0.0.1:1" in shown
