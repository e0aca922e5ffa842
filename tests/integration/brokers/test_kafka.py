"""Behaviour that only a real Apache Kafka can show."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from confluent_kafka import Producer

from outboxkit.brokers import Batch, Delivery, Publisher, Subscription, open_publisher, open_subscriber
from outboxkit.brokers.kafka import publish
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.integration.brokers.world import PATIENCE, SOON, create, read

NOBODY = "kafka://127.0.0.1:1"


@pytest.fixture
def publisher(kafka: servers.Server) -> Iterator[Publisher]:
    opened = open_publisher(kafka.url)
    yield opened
    opened.close()


def test_small_messages_pass_on_a_topic_that_takes_only_small_batches(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    """librdkafka packs up to a megabyte into a batch; the topic would refuse the whole of it."""
    create(kafka, f"{topic}-wide")
    create(kafka, topic, max_message_bytes="20000")
    assert not publisher.publish(Batch(f"{topic}-wide", [make_row(f"{topic}-wide")])).result(60).refusals

    rows = [make_row(topic, b"x" * 300) for _ in range(2_000)]
    outcome = publisher.publish(Batch(topic, rows)).result(60)

    assert not outcome.refusals
    assert list(outcome.offsets) == list(range(2_000))


def test_the_limit_of_the_topic_decides_what_is_too_large(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    create(kafka, topic, max_message_bytes="20000")
    rows = [make_row(topic, b"x" * size) for size in (100, 20_001, 100, 19_990, 100)]

    refusals = publisher.publish(Batch(topic, rows)).result(60).refusals

    # The second one is refused here, the fourth one by the broker, because of its headers.
    assert [(refusal.index, refusal.failure) for refusal in refusals] == [
        (1, Failure.TOO_LARGE),
        (3, Failure.TOO_LARGE),
    ]


def test_a_few_messages_do_not_linger_unless_that_is_asked_for(
    kafka: servers.Server, publisher: Publisher, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute is longer than anybody waits here."""
    create(kafka, topic)
    patient = open_publisher(kafka.url, {"linger.ms": "60000"})
    monkeypatch.setattr(publish, "_LINGER_MS", "60000")
    try:
        lingering = patient.publish(Batch(topic, [make_row(topic, b"later")]))
        at_once = publisher.publish(Batch(topic, [make_row(topic, b"at once")]))

        assert list(at_once.result(60).offsets) == [0]
        assert not lingering.done()
    finally:
        patient.close()


async def test_a_tombstone_of_a_foreign_producer_arrives_as_none(kafka: servers.Server, topic: str) -> None:
    create(kafka, topic)
    foreign = Producer({"bootstrap.servers": urlsplit(kafka.url).netloc})
    foreign.produce(topic, None, b"k", headers=[("null", None)])
    assert foreign.flush(10) == 0

    subscriber = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,)))
    (delivery,) = await read(subscriber, 1)
    await subscriber.close()

    assert delivery.payload is None
    assert delivery.headers == (("null", b""),)


def test_a_key_has_the_partition_that_java_clients_choose(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    """murmur2 of these keys over 7 partitions, from Apache Kafka's own Utils.murmur2 test values."""
    create(kafka, topic, partitions=7)
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    rows = [make_row(topic, key=key) for key in known]

    partitions = publisher.publish(Batch(topic, rows)).result(60).partitions

    assert list(partitions) == [(value & 0x7FFFFFFF) % 7 for value in known.values()]


def test_nobody_there_is_broker_down_and_later_batches_do_not_overtake() -> None:
    publisher = open_publisher(NOBODY)

    futures = [publisher.publish(Batch("t", [make_row("t")])) for _ in range(3)]

    assert [future.result(60).refusals[0].failure for future in futures] == [Failure.BROKER_DOWN] * 3
    assert publisher.check(["t"], SOON)["t"].failure is Failure.BROKER_DOWN
    publisher.close()


async def test_nobody_there_is_transient_for_a_subscriber() -> None:
    subscriber = open_subscriber(NOBODY, Subscription(consumer="c", topics=("t",)))

    with pytest.raises(TransientBrokerError):
        await subscriber.receive(1, SOON)

    await subscriber.close()


def test_a_refused_login_is_a_configuration_error_without_the_secret(kafka: servers.Server) -> None:
    """A plaintext listener refuses TLS and SASL alike."""
    host = urlsplit(kafka.url).netloc
    publisher = open_publisher(f"kafka://relay:c4n4ry@{host}", {"security.protocol": "SASL_PLAINTEXT"})

    with pytest.raises(ConfigurationError) as caught:
        publisher.check(["t"], timedelta(seconds=5))

    assert "c4n4ry" not in str(caught.value)
    publisher.close()


def test_a_paused_broker_holds_batches_until_a_reset_ends_them(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    create(kafka, topic)
    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals
    room = publisher.capacity(topic)
    kafka.pause()
    futures = [publisher.publish(Batch(topic, [make_row(topic) for _ in range(1_000)])) for _ in range(3)]
    assert publisher.capacity(topic) == room - 3_000

    publisher.reset()
    kafka.resume()

    failures = {refusal.failure for future in futures for refusal in future.result(0).refusals}
    assert failures <= {Failure.INDETERMINATE, Failure.BROKER_DOWN}
    assert failures
    assert publisher.capacity(topic) == room
    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals


async def test_a_long_handler_does_not_cost_the_membership(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    """Nothing is received for longer than max.poll.interval.ms: the partitions stay, the offsets can be committed."""
    create(kafka, topic)
    publisher.publish(Batch(topic, [make_row(topic, b"%d" % n) for n in range(4)])).result(60)
    options = {"max.poll.interval.ms": "6000", "session.timeout.ms": "6000"}
    subscription = Subscription(consumer=topic, topics=(topic,))
    subscriber = open_subscriber(kafka.url, subscription, options)
    rival = open_subscriber(kafka.url, subscription, options)
    first = (await subscriber.receive(1, PATIENCE))[:1]

    # The rival would get the only partition if the first one were thrown out.
    stolen: list[Delivery] = []
    until = time.monotonic() + 12
    while time.monotonic() < until:
        stolen += await rival.receive(10, timedelta(seconds=1))
    await subscriber.acknowledge(first)
    rest = await read(subscriber, 3)
    await subscriber.acknowledge(rest)
    await subscriber.close()
    await rival.close()

    assert not stolen
    assert [delivery.payload for delivery in rest] == [b"1", b"2", b"3"]


async def test_what_moved_to_another_member_is_not_committed_by_the_old_one(
    kafka: servers.Server,
    publisher: Publisher,
    topic: str,
) -> None:
    create(kafka, topic, partitions=2)
    rows = [make_row(topic, b"%d" % n, key=b"%d" % n) for n in range(40)]
    publisher.publish(Batch(topic, rows)).result(60)
    subscription = Subscription(consumer=topic, topics=(topic,))
    old = open_subscriber(kafka.url, subscription)
    held = await read(old, 40)

    new = open_subscriber(kafka.url, subscription)
    moved: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while not moved:
        assert time.monotonic() < deadline, "the second member got nothing"
        received = await asyncio.gather(old.receive(40, timedelta(seconds=1)), new.receive(40, timedelta(seconds=1)))
        moved += received[1]
    await old.acknowledge(held)
    await new.close()
    await old.close()

    successor = open_subscriber(kafka.url, subscription)
    again = await read(successor, len(moved))
    await successor.close()
    assert {delivery.payload for delivery in again} == {delivery.payload for delivery in moved}


async def test_a_receive_that_is_cancelled_while_it_waits_holds_nobody_up(kafka: servers.Server, topic: str) -> None:
    create(kafka, topic)
    subscriber = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,)))
    await subscriber.receive(1, timedelta(seconds=1))
    waiting = asyncio.create_task(subscriber.receive(1, timedelta(seconds=5)))
    await asyncio.wait([waiting], timeout=1)

    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting

    async with asyncio.timeout(60):
        assert await subscriber.receive(1, timedelta(seconds=1)) == ()
        await subscriber.close()
