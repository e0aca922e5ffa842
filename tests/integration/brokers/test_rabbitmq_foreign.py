"""Whatever a foreign client sends through a real RabbitMQ, it does not stop a consumer."""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import closing
from urllib.parse import urlsplit

import pytest

from outboxkit.brokers import Subscriber, Subscription, open_subscriber
from tests import servers
from tests.integration.brokers.world import read

NANOSECONDS = struct.pack(">Q", 1_790_000_000_123_456_789)


def frame(kind: int, channel: int, body: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(body)) + body + b"\xce"


def short(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def sized(tag: bytes, value: bytes) -> bytes:
    return tag + struct.pack(">I", len(value)) + value


class RawClient:
    """A client that writes whatever it is given: no library of ours or others checks it."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._socket = socket.create_connection((target.hostname, target.port or 5672), 10)
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._answer()
        login = f"\0{target.username}\0{target.password}".encode()
        self._socket.sendall(
            frame(1, 0, struct.pack(">HHI", 10, 11, 0) + short("PLAIN") + sized(b"", login) + short("C"))
        )
        self._answer()
        self._socket.sendall(frame(1, 0, struct.pack(">HHHIH", 10, 31, 7, 131_072, 0)))
        self._socket.sendall(frame(1, 0, struct.pack(">HH", 10, 40) + short("/") + short("") + b"\0"))
        self._answer()
        self._socket.sendall(frame(1, 1, struct.pack(">HH", 20, 10) + short("")))
        self._answer()
        self._socket.sendall(frame(1, 1, struct.pack(">HH", 85, 10) + b"\0"))
        self._answer()

    def publish(self, exchange: str, body: bytes, properties: bytes, routing_key: str = "any") -> None:
        """Publishes with these flags and values; returns when the broker has confirmed it."""
        method = struct.pack(">HHH", 60, 40, 0) + short(exchange) + short(routing_key) + b"\0"
        header = struct.pack(">HHQ", 60, 0, len(body)) + properties
        self._socket.sendall(frame(1, 1, method) + frame(2, 1, header) + (frame(3, 1, body) if body else b""))
        answer = self._answer()
        assert answer[:4] == struct.pack(">HH", 60, 80), answer

    def close(self) -> None:
        self._socket.close()

    def _answer(self) -> bytes:
        head = self._exactly(7)
        body = self._exactly(struct.unpack(">BHI", head)[2] + 1)
        return body[:-1]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            assert more, "the broker hung up"
            data += more
        return data


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
