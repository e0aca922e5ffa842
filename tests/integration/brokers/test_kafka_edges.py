"""Edges E64-E80 on a real Apache Kafka, where no other test stands for them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient

from outboxkit.brokers import Batch, Publisher, Receipts, Subscription, open_publisher, open_subscriber
from outboxkit.brokers.kafka.publish import KafkaPublisher
from outboxkit.errors import ConfigurationError
from outboxkit.headers import pack_headers, wire_headers
from outboxkit.message import Message as Sent
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.integration.brokers.world import create

PATIENCE_SECONDS = 60.0
QUEUE = 100_000  # messages that librdkafka keeps, by default


@pytest.fixture
def publisher(kafka: servers.Server) -> Iterator[KafkaPublisher]:
    opened = open_publisher(kafka.url)
    assert isinstance(opened, KafkaPublisher)
    yield opened
    opened.close()


@pytest.fixture
def admin(kafka: servers.Server) -> AdminClient:
    return AdminClient({"bootstrap.servers": urlsplit(kafka.url).netloc})


def until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not fact():
        assert time.monotonic() < deadline, "it did not come true"


def outcome(future: Future[Receipts]) -> list[Failure]:
    return [refusal.failure for refusal in future.result(PATIENCE_SECONDS).refusals]


def records(kafka: servers.Server, topic: str, count: int) -> list[Message]:
    """Reads what is in the topic, by the client itself."""
    reader = Consumer({
        "bootstrap.servers": urlsplit(kafka.url).netloc,
        "group.id": topic,
        "auto.offset.reset": "earliest",
    })
    reader.assign([TopicPartition(topic, 0, 0)])
    found = list[Message]()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} came"
        found += reader.consume(count, 0.1)
    reader.close()
    return found


def test_e64_after_a_fatal_error_nothing_is_sent_by_the_old_producer_and_a_reset_makes_a_new_one(
    kafka: servers.Server, publisher: KafkaPublisher, topic: str
) -> None:
    create(kafka, topic)
    assert not outcome(publisher.publish(Batch(topic, [make_row(topic)])))
    publisher._on_error(KafkaError(KafkaError._FATAL, "the sequence is broken", fatal=True))  # as the client calls it

    assert outcome(publisher.publish(Batch(topic, [make_row(topic)]))) == [Failure.INDETERMINATE]
    publisher.reset()

    receipts = publisher.publish(Batch(topic, [make_row(topic)])).result(PATIENCE_SECONDS)
    assert (list(receipts.offsets), receipts.refusals) == ([1], ())


def test_e69_a_client_whose_queue_is_full_holds_messages_back_and_refuses_none(
    kafka: servers.Server, publisher: KafkaPublisher, topic: str
) -> None:
    create(kafka, topic)
    assert not outcome(publisher.publish(Batch(topic, [make_row(topic)])))
    row = make_row(topic, b"x")
    rows = [row._replace(position=row.position + number) for number in range(QUEUE + 1_000)]

    kafka.pause()
    future = publisher.publish(Batch(topic, rows))
    until(lambda: publisher._producer is not None and len(publisher._producer) >= QUEUE)
    kafka.resume()

    receipts = future.result(PATIENCE_SECONDS)
    assert not receipts.refusals
    assert list(receipts.offsets) == list(range(1, len(rows) + 1))


def test_e74_a_record_bears_the_time_of_publishing_and_its_message_the_time_of_the_fact(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    create(kafka, topic, retention_ms="3600000")
    old = datetime.now(UTC) - timedelta(days=400)
    sent = Sent(id=str(uuid.uuid4()), type="order.placed", topic=topic, payload=b"{}", occurred_at=old)
    row = make_row(topic)._replace(
        headers=pack_headers(wire_headers(sent)), recorded_us=int(old.timestamp() * 1_000_000)
    )
    before = time.time()

    assert not outcome(publisher.publish(Batch(topic, [row])))

    (record,) = records(kafka, topic, 1)
    _, milliseconds = record.timestamp()
    assert milliseconds / 1000 >= before - 60
    assert dict(record.headers() or ())["ce_time"] == dict(wire_headers(sent))["ce_time"]


@pytest.mark.parametrize("name", ["transactional.id", "partitioner", "max.in.flight.requests.per.connection"])
def test_e76_no_setting_makes_the_relays_producer_a_transactional_one_or_moves_its_keys(
    kafka: servers.Server, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=name):
        open_publisher(kafka.url, {name: "x"})


@pytest.mark.parametrize("reset", ["error", "earliest"])
async def test_e79_a_consumer_whose_position_was_removed_stops_when_told_to_and_else_goes_on_with_what_is_left(
    kafka: servers.Server, admin: AdminClient, publisher: Publisher, *, topic: str, reset: str
) -> None:
    create(kafka, topic)
    rows = [make_row(topic, b"%d" % number) for number in range(10)]
    assert not outcome(publisher.publish(Batch(topic, rows)))
    subscription = Subscription(consumer=topic, topics=(topic,))
    first = open_subscriber(kafka.url, subscription)
    received = list(await first.receive(3, timedelta(seconds=PATIENCE_SECONDS)))
    await first.acknowledge(received)
    await first.close()
    place = TopicPartition(topic, 0, 8)
    admin.delete_records([place])[place].result(10)

    second = open_subscriber(kafka.url, subscription, {"auto.offset.reset": reset})
    try:
        if reset == "error":
            with pytest.raises(ConfigurationError, match="messages were removed before they were read"):
                await second.receive(3, timedelta(seconds=PATIENCE_SECONDS))
        else:
            left = await second.receive(3, timedelta(seconds=PATIENCE_SECONDS))
            assert left[0].payload == b"8"
    finally:
        await second.close()


async def test_e80_the_event_loop_goes_on_while_the_client_waits_for_a_silent_broker(
    kafka: servers.Server, topic: str
) -> None:
    create(kafka, topic)
    subscription = Subscription(consumer=topic, topics=(topic,))
    subscriber = open_subscriber(kafka.url, subscription)
    await subscriber.receive(1, timedelta(milliseconds=100))

    kafka.pause()
    waiting = asyncio.ensure_future(subscriber.receive(1, timedelta(seconds=1)))
    turns = 0
    while not waiting.done():
        await asyncio.sleep(0)  # a turn of the loop
        turns += 1
    kafka.resume()
    await subscriber.close()

    assert not waiting.result()
    assert turns > 100
