"""URLs and options: what is allowed, what it becomes, and that nothing secret is shown."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.brokers import Batch, Login, Subscription, Token, logins_of, open_publisher, open_subscriber, redacted
from outboxkit.brokers.kafka import settings as kafka_settings
from outboxkit.brokers.kafka.login import connection_settings
from outboxkit.brokers.rabbitmq import settings as rabbitmq_settings
from outboxkit.brokers.rabbitmq.subscribe import queue_of
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row

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


def shown_errors(url: str) -> str:
    """All that is said about a URL, by whoever looks at it."""
    texts = [redacted(url)]
    for ask in (
        lambda: open_publisher(url),
        lambda: open_subscriber(url, Subscription(consumer="c", topics=("t",))),
    ):
        with pytest.raises(ConfigurationError) as caught:
            ask()
        texts.append(str(caught.value))
    return "\n".join(texts)


@pytest.mark.parametrize("sign", ["/", "#", "?", "/a@b/", "@/", ":/", "[", "\\#"])
@pytest.mark.parametrize("scheme", ["amqp", "amqps", "kafka", "kafka+ssl", "rabbitmq"])
def test_a_password_that_breaks_the_url_is_never_shown(scheme: str, sign: str) -> None:
    url = f"{scheme}://shop:{CANARY}{sign}{CANARY}@rabbit.internal:5672/prod"

    if sign == "[":  # it breaks nothing: the password is what stands before the last @
        assert CANARY not in redacted(url)
        return
    shown = shown_errors(url)

    assert CANARY not in shown
    assert f"{scheme}://…" in shown
    assert "percent-encode" in shown


@pytest.mark.parametrize(
    "url",
    [
        f"amqp://user:{CANARY}@host:port/",
        f"amqp://user:{CANARY}@host:99999/",
        f"kafka://user:{CANARY}@one:9092,two:nine",
        f"kafka://user:{CANARY}@[::1",
        f"user:{CANARY}@host",
        f"kafka+ssl://user:{CANARY}@host/{CANARY}",
    ],
)
def test_a_url_that_cannot_be_read_shows_its_scheme_only(url: str) -> None:
    assert CANARY not in shown_errors(url).replace(redacted(url), "")


@pytest.mark.parametrize("url", ["amqp://host/#part", "kafka://host:9092#part", "amqp://user:p@host/v#"])
def test_a_fragment_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="percent-encode"):
        open_publisher(url)


def test_a_url_may_name_several_nodes() -> None:
    settings = rabbitmq_settings.parse(f"amqps://relay:p%2F{CANARY}@one,two:5673,[::1]:5674/v%2Fhost?heartbeat=5", {})

    assert settings.urls() == [
        f"amqps://relay:p%2F{CANARY}@{node}/v%2Fhost?heartbeat=5" for node in ("one", "two:5673", "[::1]:5674")
    ]
    assert settings.address == "amqps://one,two:5673,[::1]:5674/v%2Fhost"


def test_a_password_may_hold_an_at_sign() -> None:
    assert kafka_settings.parse("kafka://me:p@ss@one:9093", {}).common["sasl.password"] == "p@ss"
    assert rabbitmq_settings.parse("amqp://me:p@ss@one/", {}).urls() == ["amqp://me:p%40ss@one/?heartbeat=10"]


def test_credentials_are_asked_for_at_each_connection_and_win_over_the_url() -> None:
    passwords = iter(["first/1", "second#2"])
    given = rabbitmq_settings.parse("amqp://me:old@one/", {}, lambda: Login("relay", next(passwords)))
    assert [given.urls(), given.urls()] == [
        ["amqp://relay:first%2F1@one/?heartbeat=10"],
        ["amqp://relay:second%232@one/?heartbeat=10"],
    ]

    kafka = kafka_settings.parse("kafka+ssl://one", {}, lambda: Login("relay", CANARY))
    assert CANARY not in repr(kafka)
    assert connection_settings(kafka) == {
        "reconnect.backoff.max.ms": "3000",
        "bootstrap.servers": "one:9092",
        "sasl.mechanism": "PLAIN",
        "security.protocol": "SASL_SSL",
        "sasl.username": "relay",
        "sasl.password": CANARY,
    }


def test_a_token_goes_to_kafka_and_not_to_rabbitmq() -> None:
    expires = datetime(2026, 1, 1, tzinfo=UTC)
    tokens = iter([Token(value="unused", expires_at=expires), Token(value=CANARY, expires_at=expires, principal="me")])

    settings = connection_settings(kafka_settings.parse("kafka://one", {}, lambda: next(tokens)))

    assert (settings["sasl.mechanism"], settings["security.protocol"]) == ("OAUTHBEARER", "SASL_SSL")
    assert settings["oauth_cb"]("") == (CANARY, expires.timestamp(), "me", {})
    with pytest.raises(ConfigurationError, match="a user and a password"):
        rabbitmq_settings.parse("amqp://one/", {}, lambda: Token(value=CANARY, expires_at=expires)).urls()


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "70000", "many"])
def test_a_prefetch_that_no_broker_takes_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match="prefetch"):
        rabbitmq_settings.parse("amqp://one/", {"prefetch": value})


def test_new_partitions_may_be_looked_for_more_often() -> None:
    name = "topic.metadata.refresh.interval.ms"

    assert kafka_settings.parse("kafka://one", {name: "5000"}).common[name] == "5000"


def test_a_command_queue_that_is_also_an_event_queue_is_refused() -> None:
    both = Subscription(consumer="billing", topics=("orders",), queues=("orders.billing",))

    with pytest.raises(ConfigurationError, match=r"orders\.billing.*rename"):
        open_subscriber("amqp://one/", both)


@given(st.lists(st.tuples(st.text("a.%2E", min_size=1), st.text("a.%2E", min_size=1)), unique=True, max_size=8))
def test_no_two_pairs_of_topic_and_consumer_share_a_queue(pairs: list[tuple[str, str]]) -> None:
    assert len({queue_of(topic, consumer) for topic, consumer in pairs}) == len(pairs)


def test_a_queue_of_a_consumer_without_dots_is_named_as_people_expect() -> None:
    assert queue_of("shop.orders", "billing") == "shop.orders.billing"
    assert queue_of("shop", "orders.billing") == "shop.orders%2Ebilling"


def test_credentials_may_come_from_a_url_that_is_read_again_each_time() -> None:
    urls = iter(["amqp://relay:first@one/", "amqp://relay:p%2Fx@one/"])
    credentials = logins_of(lambda: next(urls))

    assert [credentials(), credentials()] == [Login("relay", "first"), Login("relay", "p/x")]


def test_a_url_without_a_login_gives_none() -> None:
    with pytest.raises(ConfigurationError, match="no user"):
        logins_of(lambda: "amqp://one/")()


@pytest.mark.parametrize("url", ["amqp://127.0.0.1:1/", "kafka://127.0.0.1:1"])
def test_credentials_that_cannot_be_had_are_told_without_what_they_say(url: str) -> None:
    def broken() -> Login:
        raise OSError(f"/run/secrets/{CANARY}")

    publisher = open_publisher(url, credentials=broken)

    with pytest.raises(ConfigurationError, match="cannot be had: OSError") as caught:
        publisher.check(["t"], timedelta(seconds=5))
    refusals = publisher.publish(Batch("t", [make_row("t")])).result(60).refusals
    publisher.close()

    assert refusals[0].failure is Failure.UNAUTHORIZED
    assert CANARY not in str(caught.value) + refusals[0].text
