"""Foundations of the broker suite: the harness, rows, a world of one topic, a stubborn relay, and readers."""

# ruff: noqa: S101  tests assert; numbers are their point; pytest itself is not imported

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from outboxkit.brokers import (
    Batch,
    Delivery,
    Publisher,
    Receipts,
    Refusal,
    Subscriber,
    Subscription,
    open_publisher,
    open_subscriber,
)
from outboxkit.errors import TransientBrokerError
from outboxkit.headers import pack_headers, wire_headers
from outboxkit.message import Headers, Kind, Message
from outboxkit.policy import Failure
from outboxkit.rows import Row

__all__ = [
    "GIVEN_UP",
    "PATIENCE",
    "PATIENCE_SECONDS",
    "SHORT",
    "BrokerHarness",
    "Patience",
    "StubbornRelay",
    "World",
    "await_fact",
    "by_key",
    "by_key_of_rows",
    "first_occurrences",
    "make_row",
    "outcome",
    "read",
    "read_distinct",
    "refusals_of",
    "values_of",
]

PATIENCE_SECONDS: Final = 60.0  # without any progress; the machine may be busy with other things
PATIENCE: Final = timedelta(seconds=PATIENCE_SECONDS)
SHORT: Final = timedelta(milliseconds=300)
# What may be said of a message that was given up: nothing that blames it.
GIVEN_UP: Final = {Failure.INDETERMINATE, Failure.BROKER_DOWN}

_positions = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerHarness:
    """Facts that the suite needs about a broker.

    Attributes:
        url: where it is.
        options: client settings.
        lonely: makes a destination of that name which has no receiver yet.
        creates_topics: every destination exists as soon as it is named.
        kill: the broker dies at once, as by SIGKILL; None when it cannot.
        start: the broker is back, with everything that it had acknowledged.
        settle_seconds: how long fresh topology must live before a kill is fair.
    """

    url: str
    lonely: Callable[[str], Awaitable[None]]
    options: Mapping[str, str] = field(default_factory=dict)
    creates_topics: bool = False
    kill: Callable[[], None] | None = None
    start: Callable[[], None] | None = None
    settle_seconds: float = 0.0


def make_row(
    topic: str,
    payload: bytes = b"{}",
    *,
    key: bytes | None = b"k",
    headers: Headers = (),
    kind: Kind = Kind.EVENT,
) -> Row:
    """An outbox row as a relay would read it, at the next position."""
    identity = uuid.uuid4()
    now = datetime.now(UTC)
    message = Message(
        id=str(identity),
        type="order.placed",
        topic=topic,
        payload=payload,
        key=key,
        kind=kind,
        source="urn:conformance",
        content_type="application/json",
        occurred_at=now,
        correlation_id="c-1",
        headers=headers,
    )
    return Row.of(
        position=next(_positions),
        id=identity,
        topic=topic,
        key=key,
        type=message.type,
        kind=kind.value,
        payload=payload,
        headers=pack_headers(wire_headers(message)),
        recorded_at=now,
        expires_at=None,
    )


class Patience:
    """Waits as long as something moves: a loaded machine makes a test slower, never red."""

    def __init__(self) -> None:
        self._seen: object = None
        self._until = 0.0

    def wait_for_more(self, seen: object, missing: str) -> None:
        """Fails when ``seen`` has been the same for too long."""
        now = time.monotonic()
        if seen != self._seen or not self._until:
            self._seen, self._until = seen, now + PATIENCE_SECONDS
        assert now < self._until, f"{missing}, then nothing for {PATIENCE_SECONDS:g} s"


class World:
    """A topic of its own with one reader and one publisher, all closed at the end."""

    def __init__(self, harness: BrokerHarness) -> None:
        self._harness = harness
        self._name = uuid.uuid4().hex[:12]
        self._subscribers: list[Subscriber] = []
        self.topic = f"conformance-{self._name}"
        self.publisher: Publisher = open_publisher(harness.url, harness.options)
        self.reader: Subscriber

    async def __aenter__(self) -> Self:
        self.reader = await self.joined("reader", topics=(self.topic,))
        return self

    async def __aexit__(self, *_: object) -> None:
        for subscriber in self._subscribers:
            await subscriber.close()
        await asyncio.to_thread(self.publisher.close)

    def subscription(self, consumer: str, topics: tuple[str, ...] = (), queues: tuple[str, ...] = ()) -> Subscription:
        # A consumer is known by its name on the whole broker: each test has its own.
        return Subscription(consumer=f"{consumer}-{self._name}", topics=topics, queues=queues)

    def opened(self, subscription: Subscription) -> Subscriber:
        subscriber = open_subscriber(self._harness.url, subscription, self._harness.options)
        self._subscribers.append(subscriber)
        return subscriber

    async def joined(self, consumer: str, topics: tuple[str, ...] = (), queues: tuple[str, ...] = ()) -> Subscriber:
        subscription = self.subscription(consumer, topics, queues)
        subscriber = self.opened(subscription)
        await subscriber.declare(subscription)
        return subscriber

    async def take(self, count: int, limit: int = 100) -> list[Delivery]:
        """So many deliveries, unacknowledged."""
        received: list[Delivery] = []
        patience = Patience()
        while len(received) < count:
            patience.wait_for_more(len(received), f"only {len(received)} of {count} came")
            received += await self.reader.receive(min(limit, count - len(received)), SHORT)
        return received

    async def read(self, count: int) -> list[Delivery]:
        """So many deliveries, acknowledged."""
        return await read(self.reader, lambda seen: len(seen) >= count)


class StubbornRelay:
    """Publishes in order through an outage: a window of batches, and all again from the first that is not settled."""

    _BATCH: Final = 100
    _WINDOW: Final = 4
    _BEFORE: Final = 2_000
    _AFTER: Final = 1_000

    def __init__(self, publisher: Publisher, topic: str) -> None:
        self._publisher = publisher
        self._topic = topic
        self._finished = False
        self.rows: list[Row] = []
        self.flowing = threading.Event()
        self.hit = threading.Event()  # something in flight had to be given up
        self.over = threading.Event()

    def expected(self) -> int | None:
        """Returns the number of distinct messages, once it is known."""
        return len(self.rows) if self._finished else None

    def run(self) -> None:
        patience = Patience()
        settled, last = 0, None
        while last is None or settled < last:
            patience.wait_for_more((settled, self.over.is_set()), f"{settled} of {len(self.rows)} settled")
            if last is None and self.over.is_set():
                last = len(self.rows) + self._AFTER
            self._write(min(settled + self._BATCH * self._WINDOW, last or 1 << 30))
            settled += self._send(self.rows[settled : settled + self._BATCH * self._WINDOW])
            if settled >= self._BEFORE:
                self.flowing.set()
        self._finished = True

    def _write(self, count: int) -> None:
        while len(self.rows) < count:
            number = len(self.rows)
            self.rows.append(make_row(self._topic, b"%d" % number, key=b"key-%d" % (number % 20)))

    def _send(self, rows: Sequence[Row]) -> int:
        batches = [rows[at : at + self._BATCH] for at in range(0, len(rows), self._BATCH)]
        futures: list[Future[Receipts]] = []
        for batch in batches:
            if not refusals_of(futures, only_done=True):  # else it might overtake what was just refused
                futures.append(self._publisher.publish(Batch(self._topic, batch)))
        unfinished = wait(futures, timeout=2).not_done
        if unfinished or refusals_of(futures, only_done=True):
            self.hit.set()
            self._publisher.reset()
            self._publisher.check([self._topic], timedelta(seconds=1))
        settled = 0
        for batch, future in zip(batches, futures, strict=False):
            refusals = outcome(future).refusals
            assert {refusal.failure for refusal in refusals} <= GIVEN_UP
            settled += refusals[0].index if refusals else len(batch)
            if refusals:
                break
        return settled


async def read(subscriber: Subscriber, enough: Callable[[list[Delivery]], bool]) -> list[Delivery]:
    """Receives and acknowledges until it is enough."""
    received: list[Delivery] = []
    patience = Patience()
    while not enough(received):
        patience.wait_for_more(len(received), f"only {len(received)} deliveries came")
        deliveries = await subscriber.receive(1_000, SHORT)
        await subscriber.acknowledge(deliveries)
        received += deliveries
    return received


async def read_distinct(subscriber: Subscriber, expected: Callable[[], int | None]) -> list[Delivery]:
    """Everything until that many distinct payloads were seen; patient through an outage."""
    received: list[Delivery] = []
    distinct: set[bytes | None] = set()
    patience = Patience()
    while len(distinct) != expected():
        patience.wait_for_more((len(distinct), expected()), f"{len(distinct)} of {expected()} came")
        try:
            deliveries = await subscriber.receive(500, SHORT)
            received += deliveries  # the effect comes before the acknowledgement, which may fail
            distinct.update(delivery.payload for delivery in deliveries)
            await subscriber.acknowledge(deliveries)
        except TransientBrokerError:
            await asyncio.sleep(0.05)  # it is away: look again
    return received


def outcome(future: Future[Receipts]) -> Receipts:
    """Waits for the outcome of a batch and returns it."""
    return future.result(PATIENCE_SECONDS)


def refusals_of(futures: Iterable[Future[Receipts]], *, only_done: bool = False) -> list[Refusal]:
    """All refusals of these batches."""
    return [refusal for future in futures if future.done() or not only_done for refusal in outcome(future).refusals]


def await_fact(fact: Callable[[], bool]) -> None:
    """Asks until it is so."""
    patience = Patience()
    while not fact():
        patience.wait_for_more(None, "it is not true yet")


def by_key(deliveries: Iterable[Delivery]) -> dict[bytes | None, list[bytes | None]]:
    """Payloads in order of arrival, by key."""
    found: dict[bytes | None, list[bytes | None]] = {}
    for delivery in deliveries:
        found.setdefault(delivery.key, []).append(delivery.payload)
    return found


def by_key_of_rows(rows: Iterable[Row]) -> dict[bytes | None, list[bytes | None]]:
    """Payloads in order of writing, by key."""
    found: dict[bytes | None, list[bytes | None]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row.payload)
    return found


def first_occurrences(deliveries: Iterable[Delivery]) -> list[Delivery]:
    """Without the copies."""
    firsts: dict[bytes | None, Delivery] = {}
    for delivery in deliveries:
        firsts.setdefault(delivery.payload, delivery)
    return list(firsts.values())


def values_of(headers: Headers, name: str) -> list[bytes]:
    """All values of a header."""
    return [value for key, value in headers if key == name]
