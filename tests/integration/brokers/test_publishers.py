"""A publisher tells of rows, names, silence and defects; on real brokers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from outboxkit.brokers import Batch, Publisher, Subscription, open_publisher, open_subscriber
from outboxkit.brokers.kafka.topics import Topics
from outboxkit.brokers.rabbitmq import destination
from outboxkit.policy import Failure
from outboxkit.rows import Row
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.integration.brokers.world import PATIENCE, bound, read

NEVER_OURS = {
    "no packing": b'{"a": 1}',
    "cut short": b"\2\0\0\0\7abc",
    "more names than values": b"\3a\0b\0\0x",
    "a name that is not UTF-8": b"\3\xff\0\0x",
    "nothing at all": b"",
}


@pytest.fixture(params=["kafka", "rabbitmq"])
def server(request: pytest.FixtureRequest) -> servers.Server:
    found: servers.Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def publisher(server: servers.Server) -> Iterator[Publisher]:
    opened = open_publisher(server.url)
    yield opened
    opened.close()


@pytest.fixture
async def reader(server: servers.Server, topic: str) -> Any:
    subscription = Subscription(consumer=f"c-{topic}", topics=(topic,))
    opened = open_subscriber(server.url, subscription)
    await opened.declare(subscription)
    yield opened
    await opened.close()


async def test_a_row_with_headers_that_are_not_ours_is_refused_alone(
    publisher: Publisher, reader: Any, topic: str
) -> None:
    """Written past the library: each is between two good ones, in one batch."""
    rows: list[Row] = []
    for name, headers in NEVER_OURS.items():
        rows += [make_row(topic, f"before {name}".encode()), make_row(topic)._replace(headers=headers)]
    rows.append(make_row(topic, b"last"))

    refusals = publisher.publish(Batch(topic, rows)).result(60).refusals
    later = publisher.publish(Batch(topic, [make_row(topic, b"later")])).result(60)

    empty = list(NEVER_OURS).index("nothing at all") * 2 + 1
    assert {refusal.index for refusal in refusals} | {empty} == {index for index in range(len(rows)) if index % 2}
    assert {refusal.failure for refusal in refusals} == {Failure.INVALID}
    assert all("not packed as outboxkit packs them" in refusal.text for refusal in refusals)
    assert not later.refusals
    good = [row.payload for index, row in enumerate(rows) if index not in {refusal.index for refusal in refusals}]
    assert [delivery.payload for delivery in await read(reader, len(good) + 1)] == [*good, b"later"]


async def test_after_a_defect_of_ours_the_publisher_goes_on(
    server: servers.Server, publisher: Publisher, reader: Any, topic: str, *, monkeypatch: Any, caplog: Any
) -> None:
    """The defect is planted where each batch passes, and happens once."""
    caplog.set_level(logging.ERROR)
    assert not publisher.publish(Batch(topic, [make_row(topic, b"first")])).result(60).refusals
    planted = (Topics, "limit") if server.name.endswith("Kafka") else (destination, "until_ready")

    def fail(*_: object) -> None:
        raise TypeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(*planted, fail)
        hit = publisher.publish(Batch(topic, [make_row(topic, b"hit")])).result(60)
    publisher.reset()
    after = publisher.publish(Batch(topic, [make_row(topic, b"after")])).result(60)

    assert "TypeError" in hit.refusals[0].text
    assert hit.refusals[0].failure in {Failure.INDETERMINATE, Failure.BROKER_DOWN}
    assert not after.refusals
    assert [delivery.payload for delivery in await read(reader, 2)] == [b"first", b"after"]
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == [
        "broker.publisher_failed"
    ]


async def test_a_broker_that_stops_answering_is_named_as_away(
    server: servers.Server, publisher: Publisher, reader: Any, topic: str
) -> None:
    """It hangs: its connections stay, and nothing says that it is gone but its silence."""
    assert not publisher.publish(Batch(topic, [make_row(topic, b"first")])).result(60).refusals
    server.pause()
    try:
        lost = publisher.publish(Batch(topic, [make_row(topic, b"lost")])).result(60).refusals
        publisher.reset()
        later = publisher.publish(Batch(topic, [make_row(topic, b"later")])).result(60).refusals
    finally:
        server.resume()

    assert [refusal.failure for refusal in lost] == [Failure.INDETERMINATE]
    assert "answer" in lost[0].text
    assert [refusal.failure for refusal in later] == [Failure.BROKER_DOWN]
    assert "does not answer" in later[0].text
    assert server.name in later[0].text or server.name.split()[-1] in later[0].text


def test_a_topic_of_a_name_that_kafka_cannot_have_is_told_as_such(kafka: servers.Server) -> None:
    publisher = open_publisher(kafka.url)

    refusals = publisher.publish(Batch("orders placed", [make_row("orders placed")])).result(60).refusals
    troubles = publisher.check(["orders placed", "missing"], PATIENCE)
    publisher.close()

    assert "topic orders placed: no broker allows this name" in refusals[0].text
    assert "topic orders placed: no broker allows this name" in troubles["orders placed"].text
    assert "outboxkit init" not in troubles["orders placed"].text
    assert "create it: outboxkit init --topology" in troubles["missing"].text


@pytest.mark.parametrize("size", [1, 200_000])
async def test_what_a_consumer_holds_is_bounded_by_bytes_and_everything_arrives_in_order(
    server: servers.Server, publisher: Publisher, topic: str, size: int
) -> None:
    count, room = 40, 1_000_000
    if server.name.endswith("Kafka"):
        create_once = open_subscriber(server.url, Subscription(consumer="x", topics=(topic,)), {"partitions": "1"})
        await create_once.declare(Subscription(consumer="", topics=(topic,)))
        await create_once.close()
    subscription = Subscription(consumer=f"c-{topic}", topics=(topic,))
    reader = open_subscriber(server.url, subscription, {"prefetch_bytes": str(room)})
    await reader.declare(subscription)
    rows = [make_row(topic, b"%d " % number + bytes(size)) for number in range(count)]
    assert not publisher.publish(Batch(topic, rows)).result(60).refusals

    arrived: list[bytes] = []
    while len(arrived) < count:
        batch = await reader.receive(1_000, timedelta(seconds=20))
        assert batch, f"{len(arrived)} of {count} came"
        assert sum(len(delivery.payload or b"") for delivery in batch) <= room + size + 100
        arrived += [delivery.payload or b"" for delivery in batch]
        await reader.acknowledge(batch)
    await reader.close()

    assert [payload.split()[0] for payload in arrived] == [b"%d" % number for number in range(count)]


def test_a_publisher_finds_the_node_that_is_there(
    rabbitmq: servers.Server, channel: BlockingChannel, topic: str
) -> None:
    bound(channel, topic, f"{topic}.q")
    login, _, place = rabbitmq.url.partition("://")[2].rpartition("@")
    publisher = open_publisher(f"amqp://{login}@127.0.0.1:1,{place.rstrip('/')},127.0.0.1:2/")

    assert not publisher.publish(Batch(topic, [make_row(topic)])).result(60).refusals

    publisher.close()
