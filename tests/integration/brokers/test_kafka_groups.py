"""A group, a topic and foreign producers may do a lot to a consumer; on a real Apache Kafka."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import timedelta
from urllib.parse import urlsplit

import pytest
from confluent_kafka.admin import AdminClient

from outboxkit.brokers import Batch, Delivery, Publisher, Subscriber, Subscription, open_publisher, open_subscriber
from outboxkit.brokers.kafka import subscribe
from outboxkit.errors import PermanentBrokerError, TransientBrokerError
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.integration.brokers.world import SOON, create, read

PATIENCE_SECONDS = 60.0
# aiokafka's own encoder, in Python: a name that is no text goes out as it is.
FOREIGN = """
import asyncio, sys
from aiokafka import AIOKafkaProducer

class Name(str):
    def encode(self, *_):
        return b"gr\\xf6\\xdfe"

async def main():
    producer = AIOKafkaProducer(bootstrap_servers=sys.argv[1])
    await producer.start()
    try:
        await producer.send_and_wait(sys.argv[2], b"odd", headers=[(Name("x"), b"1")])
        await producer.send_and_wait(sys.argv[2], b"good", headers=[("x", b"1")])
    finally:
        await producer.stop()

asyncio.run(main())
"""


@pytest.fixture
def publisher(kafka: servers.Server):  # type: ignore[no-untyped-def]  # noqa: ANN201
    opened = open_publisher(kafka.url)
    yield opened
    opened.close()


def sent(publisher: Publisher, topic: str, *payloads: bytes) -> None:
    assert not publisher.publish(Batch(topic, [make_row(topic, payload) for payload in payloads])).result(60).refusals


async def received(subscriber: Subscriber, count: int) -> list[Delivery]:
    """So many deliveries, patient through what passes."""
    found: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} came"
        try:
            found += await subscriber.receive(count, SOON)
        except TransientBrokerError:
            await asyncio.sleep(0)  # it is away: look again
    return found


async def test_a_static_member_whose_place_was_taken_ends_with_an_error(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    create(kafka, topic)
    sent(publisher, topic, b"1")
    subscription, options = Subscription(consumer=topic, topics=(topic,)), {"group.instance.id": "one-of-a-kind"}
    first = open_subscriber(kafka.url, subscription, options)
    await received(first, 1)
    second = open_subscriber(kafka.url, subscription, options)

    async def both() -> None:
        while True:
            await asyncio.gather(first.receive(1, SOON), second.receive(1, SOON))

    with pytest.raises(PermanentBrokerError, match="cannot go on as a member of its group"):
        await both()

    await first.close()
    await second.close()


async def test_a_topic_that_is_deleted_and_created_again_is_read_from_its_beginning(
    kafka: servers.Server, publisher: Publisher, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscribe, "_RECREATION_SECONDS", 0.5)
    create(kafka, topic)
    sent(publisher, topic, *(b"old %d" % number for number in range(10)))
    subscriber = open_subscriber(
        kafka.url, Subscription(consumer=topic, topics=(topic,)), {"topic.metadata.refresh.interval.ms": "500"}
    )
    await subscriber.acknowledge(await received(subscriber, 10))

    admin = AdminClient({"bootstrap.servers": urlsplit(kafka.url).netloc})
    admin.delete_topics([topic])[topic].result(10)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while topic in admin.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
    create(kafka, topic)
    publisher.reset()
    fresh = open_publisher(kafka.url)
    sent(fresh, topic, *(b"new %d" % number for number in range(30)))
    fresh.close()

    payloads: set[bytes | None] = set()
    while len(payloads) < 30:
        payloads |= {delivery.payload for delivery in await received(subscriber, 1)}
    await subscriber.close()

    assert payloads == {b"new %d" % number for number in range(30)}


async def test_a_header_whose_name_is_no_text_takes_one_message_aside_and_not_the_consumer(
    kafka: servers.Server, topic: str
) -> None:
    create(kafka, topic)
    bootstrap = urlsplit(kafka.url).netloc
    environment = os.environ | {"AIOKAFKA_NO_EXTENSIONS": "1"}
    producer = await asyncio.create_subprocess_exec(sys.executable, "-c", FOREIGN, bootstrap, topic, env=environment)
    assert await producer.wait() == 0
    subscriber = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,)))

    odd, good = await read(subscriber, 2)
    await subscriber.acknowledge([odd, good])
    await subscriber.close()

    assert (odd.payload, odd.fault) == (b"odd", "the name of a header is not UTF-8")
    assert (good.payload, good.fault, good.headers) == (b"good", None, (("x", b"1"),))


async def test_a_tombstone_and_an_empty_payload_are_told_apart_and_have_their_place(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    create(kafka, topic)
    sent(publisher, topic, b"")
    subscriber = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,)))

    (empty,) = await read(subscriber, 1)
    await subscriber.close()

    assert (empty.payload, empty.partition, empty.offset) == (b"", 0, 0)
    assert empty.timestamp is not None
    assert empty.timestamp.utcoffset() == timedelta(0)
    assert empty.routing_key is None


async def test_a_new_consumer_that_begins_at_the_end_reads_what_comes_and_stays_there(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    """It ends before it has read anything: what is published meanwhile is not lost to it."""
    create(kafka, topic)
    sent(publisher, topic, b"before")
    subscription = Subscription(consumer=topic, topics=(topic,), start="latest")
    first = open_subscriber(kafka.url, subscription)
    while first.assignment.sources is None:
        assert not await first.receive(1, SOON)
    await first.close()
    sent(publisher, topic, b"meanwhile")

    second = open_subscriber(kafka.url, subscription)
    (found,) = await received(second, 1)
    await second.close()

    assert found.payload == b"meanwhile"


async def test_a_new_consumer_can_begin_at_an_instant_and_another_start_says_nothing_to_a_known_one(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    create(kafka, topic)
    everything = open_subscriber(kafka.url, Subscription(consumer=f"{topic}-all", topics=(topic,)))
    log: list[Delivery] = []
    while len(log) < 2 or log[-1].timestamp == log[0].timestamp:  # a later millisecond
        sent(publisher, topic, b"%d" % len(log))
        log += await received(everything, 1)
    await everything.close()
    assert log[-1].timestamp is not None

    at = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,), start=log[-1].timestamp))
    (found,) = await received(at, 1)
    await at.close()
    known = open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,), start="latest"))
    (again,) = await received(known, 1)
    await known.close()

    assert found.payload == again.payload == log[-1].payload


async def test_a_member_without_a_partition_has_joined_and_says_so(
    kafka: servers.Server, publisher: Publisher, topic: str
) -> None:
    create(kafka, topic)
    members = [open_subscriber(kafka.url, Subscription(consumer=topic, topics=(topic,))) for _ in range(2)]
    deadline = time.monotonic() + PATIENCE_SECONDS

    while sorted(str(member.assignment.sources) for member in members) != ["0", "1"]:
        assert time.monotonic() < deadline, [member.assignment for member in members]
        await asyncio.gather(*(member.receive(1, SOON) for member in members))
    for member in members:
        await member.close()
