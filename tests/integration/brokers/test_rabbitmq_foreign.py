"""Whatever a foreign client sends through a real RabbitMQ, it does not stop a consumer."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import closing

import pytest

from outboxkit.brokers import Subscriber, Subscription, open_subscriber
from tests import servers
from tests.integration.brokers.raw_client import RawClient, short, sized
from tests.integration.brokers.world import read

NANOSECONDS = struct.pack(">Q", 1_790_000_000_123_456_789)


def table(*entries: bytes) -> bytes:
    return struct.pack(">H", 1 << 13) + sized(b"", b"".join(entries))


FOREIGN = {
    "a timestamp in nanoseconds": (struct.pack(">H", 1 << 6) + NANOSECONDS, ()),
    "such a timestamp in a header": (
        table(short("at") + b"T" + NANOSECONDS),
        (("at", str(int.from_bytes(NANOSECONDS, "big")).encode()),),
    ),
    "such a timestamp in a list": (
        table(short("at") + sized(b"A", b"T" + NANOSECONDS)),
        (("at", str(int.from_bytes(NANOSECONDS, "big")).encode()),),
    ),
    "such a timestamp in a table": (
        table(short("in") + sized(b"F", short("at") + b"T" + NANOSECONDS)),
        (("in", b'{"at": %d}' % int.from_bytes(NANOSECONDS, "big")),),
    ),
    "an id that is not UTF-8": (struct.pack(">H", 1 << 7) + b"\x02\xff\xfe", (("ce_id", b"\xff\xfe"),)),
    "a type that is not UTF-8": (struct.pack(">H", 1 << 5) + b"\x02\xff\xfe", (("ce_type", b"\xff\xfe"),)),
    "a header's name that is not UTF-8": (table(b"\x02\xff\xfe" + b"t\x01"), (("\\xff\\xfe", b"true"),)),
}


@pytest.fixture
async def reader(rabbitmq: servers.Server, topic: str) -> AsyncIterator[Subscriber]:
    subscription = Subscription(consumer="c", topics=(topic,))
    opened = open_subscriber(rabbitmq.url, subscription)
    await opened.declare(subscription)
    yield opened
    await opened.close()


@pytest.mark.parametrize("what", FOREIGN)
async def test_a_message_that_the_client_library_cannot_decode_is_delivered_like_any_other(
    rabbitmq: servers.Server, reader: Subscriber, topic: str, what: str
) -> None:
    properties, headers = FOREIGN[what]
    with closing(RawClient(rabbitmq.url)) as foreign:
        foreign.publish(topic, b"odd", properties)
        foreign.publish(topic, b"good", struct.pack(">H", 0))

    odd, good = await read(reader, 2)
    await reader.acknowledge([odd, good])

    assert (odd.payload, good.payload) == (b"odd", b"good")
    assert (odd.headers, odd.fault) == (headers, None)
    assert (odd.redelivered, good.redelivered) == (False, False)


async def test_tables_in_tables_do_not_end_the_connection(
    rabbitmq: servers.Server, reader: Subscriber, topic: str
) -> None:
    value = b"t\x01"
    for _ in range(5_000):
        value = sized(b"F", short("a") + value)
    with closing(RawClient(rabbitmq.url)) as foreign:
        foreign.publish(topic, b"deep", table(short("deep") + value))
        foreign.publish(topic, b"good", struct.pack(">H", 0))

    deep, good = await read(reader, 2)

    assert [name for name, _ in deep.headers] == ["deep"]
    assert good.payload == b"good"


async def test_the_facts_of_a_foreign_message_are_told(
    rabbitmq: servers.Server, reader: Subscriber, topic: str
) -> None:
    properties = (
        struct.pack(">H", 1 << 14 | 1 << 9 | 1 << 6) + short("br") + short("me") + struct.pack(">Q", 1_767_225_600)
    )
    with closing(RawClient(rabbitmq.url)) as foreign:
        foreign.publish(topic, b"x", properties)

    (delivery,) = await read(reader, 1)

    assert (delivery.routing_key, delivery.content_encoding, delivery.reply_to) == ("any", "br", "me")
    assert delivery.timestamp is not None
    assert delivery.timestamp.isoformat() == "2026-01-01T00:00:00+00:00"
    assert (delivery.partition, delivery.offset) == (None, None)
