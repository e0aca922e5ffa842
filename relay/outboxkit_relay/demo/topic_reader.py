"""Reads the topics from outside, beside the consumers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

from confluent_kafka import Consumer, TopicPartition

from outboxkit.brokers import Subscription, open_subscriber
from outboxkit.brokers.kafka import settings
from outboxkit_relay.demo.audit import Record

if TYPE_CHECKING:
    from collections.abc import Iterable

    from confluent_kafka import Message

    from outboxkit.brokers import Delivery

__all__ = ["READER", "TopicReader", "open_reader"]

READER: Final = "outboxkit-demo-audit"

_SECONDS: Final = 10.0
_PAUSE: Final = timedelta(milliseconds=50)


class TopicReader(Protocol):
    """Reads topics."""

    def count(self, topic: str) -> int:
        """Counts the messages that the broker has stored in a topic."""
        ...

    def read_all(self, topics: Sequence[str]) -> list[Record]:
        """Returns every message, in the order of each partition or queue."""
        ...

    def close(self) -> None:
        """Ends the reading."""
        ...


def open_reader(url: str, topics: Sequence[str]) -> TopicReader:
    """Opens a reader at a broker; it must be there before the first message."""
    return _Log(url) if url.startswith("kafka") else _Queue(url, topics)


class _Log:
    """Kafka keeps what was published: the plain client reads it, not the library."""

    def __init__(self, url: str) -> None:
        common = settings.parse(url, {}).common
        # A broker that is gone is told by the demo, not by lines of the client between its own.
        quiet = {"log_level": 2, "enable.auto.commit": False}
        self._reader = Consumer({**common, "group.id": READER, **quiet})

    def count(self, topic: str) -> int:
        return sum(high - low for low, high in self._bounds(topic).values())

    def read_all(self, topics: Sequence[str]) -> list[Record]:
        ends = {(topic, number): high for topic in topics for number, (_, high) in self._bounds(topic).items()}
        left = {place for place, high in ends.items() if high}
        self._reader.assign([TopicPartition(topic, number, 0) for topic, number in left])
        records = []
        while left:
            message = self._reader.poll(_SECONDS)
            if message is None or message.error() is not None:
                raise OSError("the topics cannot be read")
            records.append(_record(message))
            place = str(message.topic()), int(message.partition() or 0)
            if int(message.offset() or 0) + 1 >= ends[place]:
                left.discard(place)
        return records

    def close(self) -> None:
        self._reader.close()

    def _bounds(self, topic: str) -> dict[int, tuple[int, int]]:
        numbers = self._reader.list_topics(topic, timeout=_SECONDS).topics[topic].partitions
        ends = {}
        for number in numbers:
            ends[number] = self._reader.get_watermark_offsets(TopicPartition(topic, number), timeout=_SECONDS)
        return ends


class _Queue:
    """RabbitMQ keeps nothing that was handled: a queue of its own gets a copy of everything, from the beginning on."""

    def __init__(self, url: str, topics: Sequence[str]) -> None:
        self._seen: list[Record] = []
        self._stop, self._ready = threading.Event(), threading.Event()
        # Topics of one demo have a prefix of their own, so this name is new at every broker.
        subscription = Subscription(consumer=READER, topics=tuple(topics))
        self._thread = threading.Thread(target=asyncio.run, args=(self._read(url, subscription),), daemon=True)
        self._thread.start()
        if not self._ready.wait(_SECONDS):
            raise OSError("the topics cannot be read")

    def count(self, topic: str) -> int:
        return sum(record.topic == topic for record in self._seen)

    def read_all(self, topics: Sequence[str]) -> list[Record]:
        return [record for record in self._seen if record.topic in topics]

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_SECONDS)

    async def _read(self, url: str, subscription: Subscription) -> None:
        subscriber = open_subscriber(url, subscription)
        await subscriber.declare(subscription)
        self._ready.set()
        while not self._stop.is_set():
            deliveries = await subscriber.receive(1000, _PAUSE)
            self._seen += map(_delivered, deliveries)
            await subscriber.acknowledge(deliveries)
        await subscriber.close()


def _record(message: Message) -> Record:
    key = message.key()
    headers: Iterable[tuple[str, str | bytes | None]] = message.headers() or ()  # type: ignore[assignment]
    return _made(str(message.topic()), key if isinstance(key, bytes) else b"", headers)


def _delivered(delivery: Delivery) -> Record:
    return _made(delivery.topic, delivery.key or b"", delivery.headers)


def _made(topic: str, key: bytes, headers: Iterable[tuple[str, str | bytes | None]]) -> Record:
    named = dict(headers)
    return Record(
        topic=topic,
        key=key,
        id=_text(named.get("ce_id")),
        sequence=int(_text(named.get("ce_sequence")) or 0),
        is_replay="outboxkit-replay-for" in named,
    )


def _text(value: str | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else value or ""
