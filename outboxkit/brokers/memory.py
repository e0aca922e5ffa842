"""A broker inside the process: ``memory://name``. For users' tests, and the simplest adapter to read first.

Every publisher and subscriber of one name meets in the same `Exchange`. A topic keeps what was published, in order;
each consumer has its own position in it, and what it does not acknowledge comes again, by `release` or to the next
subscriber.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from outboxkit.brokers import (
    CONTENT_ENCODING,
    REPLY_TO,
    Assignment,
    Delivery,
    Features,
    Receipts,
    Refusal,
    refuse_unknown,
    text_of,
)
from outboxkit.brokers._in_flight import unsendable
from outboxkit.errors import ConfigurationError, DecodeError, TransientBrokerError
from outboxkit.headers import outgoing_headers
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import timedelta

    from outboxkit.brokers import Batch, Start, Subscription
    from outboxkit.rows import Row

__all__ = ["FEATURES", "Exchange", "Faults", "exchange", "publisher", "subscriber"]

FEATURES: Final = Features(name="memory", order=Order.PIPELINED, evidence=True, max_message_bytes=1_048_588)
_MESSAGES_IN_FLIGHT: Final = 10_000
_PARTITION: Final = 0
_NOWHERE: Final = -1
_POLL_SECONDS: Final = 0.005  # publishers live in other threads and other loops: looking is simpler than waking

_exchanges: dict[str, Exchange] = {}
_exchanges_lock = threading.Lock()


@dataclass(slots=True, kw_only=True)
class Faults:
    """Misbehaviour of a broker, for tests: what real ones do now and then, on demand. Nothing by default.

    Attributes:
        refuse: says of each message why the broker refuses it (``Failure.UNROUTABLE``, ``Failure.BLOCKED`` …), None
            when it takes it; so a part of a batch can fail.
        lost_confirms: of the next ones so many are lost: the message is stored, and its publisher cannot know.
        lost_acknowledgements: of the next ones so many are lost: the delivery comes again.
        copies: each message is stored so many times more.
        disorder: keys are handed out in reverse; the order within a key is kept, as every broker keeps it.
    """

    refuse: Callable[[Row], Failure | None] = lambda _row: None
    lost_confirms: int = 0
    lost_acknowledgements: int = 0
    copies: int = 0
    disorder: bool = False


@dataclass(slots=True)
class _Consumption:
    """One consumer's view of one topic."""

    ready: deque[Delivery] = field(default_factory=deque)
    handed: dict[int, Delivery] = field(default_factory=dict)


class Exchange:
    """The topics of one name. Thread-safe.

    Attributes:
        away: while True the broker refuses everything, as if it were down.
        missing: topics that are refused as unknown; every other topic exists.
        faults: how it misbehaves.
    """

    def __init__(self) -> None:
        self.away = False
        self.missing: set[str] = set()
        self.faults = Faults()
        self._lock = threading.Lock()
        self._log: dict[str, list[Delivery]] = {}  # an offset is an index
        self._consumptions: dict[tuple[str, str], _Consumption] = {}

    def messages(self, topic: str) -> Sequence[Delivery]:
        """Everything that was ever published to a topic, in order."""
        with self._lock:
            return tuple(self._log.get(topic, ()))

    def trouble(self, topic: str) -> Refusal | None:
        """Returns why the topic takes nothing now, or None."""
        if self.away:
            return Refusal(-1, Failure.BROKER_DOWN, "the memory broker is away")
        if topic in self.missing:
            return Refusal(
                -1, Failure.UNKNOWN_TOPIC, f"there is no topic {topic}; create it: outboxkit init --topology"
            )
        return None

    def append(self, topic: str, row: Row) -> int:
        """Stores a row; returns its offset."""
        with self._lock:
            log = self._log.setdefault(topic, [])
            headers = tuple(outgoing_headers(row))
            delivery = Delivery(
                topic=topic,
                key=row.key,
                headers=headers,
                timestamp=row.recorded_at,
                reply_to=text_of(headers, REPLY_TO),
                content_encoding=text_of(headers, CONTENT_ENCODING),
                payload=row.payload,
                origin=f"{topic}[{_PARTITION}]@{len(log)}",
                partition=_PARTITION,
                offset=len(log),
            )
            log.append(delivery)
            for (name, _), consumption in self._consumptions.items():
                if name == topic:
                    consumption.ready.append(delivery)
            return len(log) - 1

    def take(self, topics: Sequence[str], consumer: str, limit: int) -> list[Delivery]:
        """Hands out what is ready."""
        taken: list[Delivery] = []
        with self._lock:
            for topic in topics:
                view = self._view(topic, consumer)
                if self.faults.disorder:
                    view.ready = deque(_keys_reversed(view.ready))
                while view.ready and len(taken) < limit:
                    delivery = replace(view.ready.popleft(), token=object())  # of this hand-out
                    view.handed[_offset(delivery)] = delivery
                    taken.append(delivery)
        return taken

    def lag(self, topics: Sequence[str], consumer: str) -> int:
        """Counts what is ready or handed out."""
        with self._lock:
            views = [self._view(topic, consumer) for topic in topics]
            return sum(len(view.ready) + len(view.handed) for view in views)

    def settle(self, consumer: str, deliveries: Sequence[Delivery]) -> None:
        """Notes that these do not come again."""
        with self._lock:
            for delivery in deliveries:
                handed = self._view(delivery.topic, consumer).handed
                known = handed.get(_offset(delivery))
                if known is None or known.token is not delivery.token:
                    continue
                del handed[_offset(delivery)]
                if self._is_lost("lost_acknowledgements"):
                    view = self._view(delivery.topic, consumer)
                    view.ready = deque(sorted([replace(delivery, redelivered=True), *view.ready], key=_offset))

    def give_back(self, topics: Sequence[str], consumer: str, offsets: Mapping[str, set[int]] | None = None) -> None:
        """Makes what is handed out (all of it, or these offsets by topic) ready again, in order."""
        with self._lock:
            for topic in topics:
                view = self._view(topic, consumer)
                back = view.handed.keys() if offsets is None else view.handed.keys() & offsets.get(topic, set())
                returned = [view.handed.pop(offset) for offset in list(back)]
                ordered = sorted([*returned, *view.ready], key=_offset)
                view.ready = deque(ordered)

    def begin(self, topics: Sequence[str], consumer: str, start: Start) -> None:
        """Says where a consumer begins that is new to a topic."""
        with self._lock:
            for topic in topics:
                view = self._view(topic, consumer) if (topic, consumer) not in self._consumptions else None
                if view is not None and start != "earliest":
                    view.ready = deque(one for one in view.ready if start != "latest" and _is_since(one, start))

    def store(self, topic: str, row: Row) -> tuple[int, Refusal | None]:
        """Stores a row as the faults want it; returns its offset, and what its publisher is told instead of it."""
        failure = self.faults.refuse(row)
        if failure is not None:
            return _NOWHERE, Refusal(-1, failure, f"the memory broker was told to refuse it: {failure.value}")
        offset = self.append(topic, row)
        for _ in range(self.faults.copies):
            self.append(topic, row)
        if self._is_lost("lost_confirms"):
            return _NOWHERE, Refusal(-1, Failure.INDETERMINATE, "the confirm was lost")
        return offset, None

    def _is_lost(self, which: str) -> bool:
        left: int = getattr(self.faults, which)
        setattr(self.faults, which, max(0, left - 1))
        return left > 0

    def _view(self, topic: str, consumer: str) -> _Consumption:
        place = (topic, consumer)
        if place not in self._consumptions:
            self._consumptions[place] = _Consumption(ready=deque(self._log.get(topic, ())))
        return self._consumptions[place]


def exchange(name: str) -> Exchange:
    """The exchange behind ``memory://name``, for assertions in tests."""
    with _exchanges_lock:
        return _exchanges.setdefault(name, Exchange())


def _is_since(delivery: Delivery, start: object) -> bool:
    return isinstance(start, datetime) and delivery.timestamp is not None and delivery.timestamp >= start


def _keys_reversed(ready: Collection[Delivery]) -> list[Delivery]:
    keys = dict.fromkeys(delivery.key for delivery in sorted(ready, key=_offset))
    return [delivery for key in reversed(keys) for delivery in ready if delivery.key == key]


def _offset(delivery: Delivery) -> int:
    assert delivery.offset is not None  # noqa: S101  `append` sets it
    return delivery.offset


class MemoryPublisher:
    """See `outboxkit.brokers.Publisher`."""

    features = FEATURES
    has_ended = False  # it has no thread

    def __init__(self, target: Exchange) -> None:
        self._target = target
        self._closed = False

    def publish(self, batch: Batch) -> Future[Receipts]:
        outcome: Future[Receipts] = Future()
        offsets = [_NOWHERE] * len(batch.rows)
        refusals = []
        trouble = self._trouble(batch.destination)  # asked once: a row must not overtake one that was refused
        for index, row in enumerate(batch.rows):
            refusal = trouble or _oversize(row) or _foreign(row)
            if refusal is None:
                offsets[index], refusal = self._target.store(batch.destination, row)
            if refusal is not None:
                refusals.append(Refusal(index, refusal.failure, refusal.text))
        partitions = [-1 if offset < 0 else _PARTITION for offset in offsets]
        outcome.set_result(Receipts(partitions, offsets, tuple(refusals)))
        return outcome

    def _trouble(self, destination: str) -> Refusal | None:
        if self._closed:
            return Refusal(-1, Failure.BROKER_DOWN, "the publisher is closed")
        return self._target.trouble(destination)

    def capacity(self, destination: str) -> int:
        del destination  # nothing is ever in flight
        return _MESSAGES_IN_FLIGHT

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        del timeout  # it answers at once
        troubles = {name: self._target.trouble(name) for name in destinations}
        return {name: trouble for name, trouble in troubles.items() if trouble is not None}

    def reset(self) -> None:
        """Nothing is ever in flight."""

    def close(self) -> None:
        self._closed = True


class MemorySubscriber:
    """See `outboxkit.brokers.Subscriber`."""

    features = FEATURES

    def __init__(self, source: Exchange, subscription: Subscription) -> None:
        self._source = source
        self._consumer = subscription.consumer
        self._topics = (*subscription.topics, *subscription.queues)
        self._has_received = False
        self._closed = False
        source.begin(self._topics, self._consumer, subscription.start)

    @property
    def assignment(self) -> Assignment:
        if not self._has_received:
            return Assignment()
        return Assignment(len(self._topics), self._source.lag(self._topics, self._consumer))

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        deadline = asyncio.get_running_loop().time() + timeout.total_seconds()
        while True:
            self._raise_trouble()
            taken = self._source.take(self._topics, self._consumer, limit)
            self._has_received = True
            if taken or asyncio.get_running_loop().time() >= deadline:
                return taken
            await asyncio.sleep(_POLL_SECONDS)

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._source.settle(self._consumer, deliveries)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        offsets: dict[str, set[int]] = {}
        for delivery in deliveries:
            offsets.setdefault(delivery.topic, set()).add(_offset(delivery))
        self._source.give_back(self._topics, self._consumer, offsets)

    async def declare(self, subscription: Subscription) -> Sequence[str]:
        names = (*subscription.topics, *subscription.queues)
        self._source.missing.difference_update(names)
        return [f"topic {name} exists" for name in names]

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._source.give_back(self._topics, self._consumer)

    def _raise_trouble(self) -> None:
        if self._closed or self._source.away:
            raise TransientBrokerError("the memory broker is away")
        missing = [name for name in self._topics if name in self._source.missing]
        if missing:
            raise ConfigurationError(f"there is no topic {missing[0]}; create it: outboxkit init --topology")


def _oversize(row: Row) -> Refusal | None:
    limit = FEATURES.max_message_bytes or 0
    return Refusal(-1, Failure.TOO_LARGE, f"at most {limit:,} bytes") if len(row.payload) > limit else None


def _foreign(row: Row) -> Refusal | None:
    try:
        outgoing_headers(row)
    except DecodeError as error:
        return Refusal(-1, Failure.INVALID, unsendable(error))
    return None


def publisher(url: str, options: Mapping[str, str]) -> MemoryPublisher:
    """Returns an end of the exchange: the plug's entry."""
    refuse_unknown(options, (), "memory")
    return MemoryPublisher(exchange(urlsplit(url).netloc))


def subscriber(url: str, subscription: Subscription, options: Mapping[str, str]) -> MemorySubscriber:
    """Returns an end of the exchange: the plug's entry."""
    refuse_unknown(options, (), "memory")
    return MemorySubscriber(exchange(urlsplit(url).netloc), subscription)
