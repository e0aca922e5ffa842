"""Destinations: the queue of each, its batches in flight, and its trouble. Pure.

Under ``order = strict`` a row leaves the queue only when no row of its key is in flight; under ``pipelined`` the window
may hold many rows of a key, and batches count as acknowledged in the order in which they were handed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit.guards.circuit_breaker import Breaker, CircuitRule, CircuitState
from outboxkit.guards.token_bucket import TokenBucket
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from outboxkit.brokers import Receipts
    from outboxkit.rows import Row

__all__ = ["Destination", "DestinationLimits", "InFlightBatch", "Key", "Unavailability", "by_topic", "key_of"]

_KIND: Final = attrgetter("kind")
_TOPIC: Final = attrgetter("topic")

Key = tuple[str, bytes | int]


def key_of(row: Row) -> Key:
    """The ordering key of a row: (topic, key), or (topic, position) of a row without a key."""
    return row.topic, row.position if row.key is None else row.key


def by_topic(rows: Sequence[Row]) -> Mapping[str, Sequence[Row]]:
    """Groups rows by topic, in order."""
    topics = set(map(_TOPIC, rows))
    if len(topics) == 1:  # as a rule, and a thousand rows are not copied
        return {topics.pop(): rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.topic, []).append(row)
    return found


@dataclass(slots=True)
class InFlightBatch:
    """A batch at the broker.

    Attributes:
        number: names it.
        rows: in order.
        deadline: when it is given up.
        since: when it was handed over.
        receipts: the broker's answer, as soon as it is there.
    """

    number: int
    rows: Sequence[Row]
    deadline: datetime
    since: datetime
    receipts: Receipts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationLimits:
    """Limits of one destination.

    Attributes:
        in_flight: messages at the broker; None: as many as the window holds.
        rate: messages a second; None: as fast as it goes.
        circuit: when it is left alone; None: only for the pause that every trouble brings.
        order: how much of a key may be in flight; None: as the relay's.
        broker: where it is; the empty name is the default broker's.
    """

    in_flight: int | None = None
    rate: float | None = None
    circuit: CircuitRule | None = None
    order: Order | None = None
    broker: str = ""


_NO_LIMITS: Final = DestinationLimits()
_NO_FLAWS: Final[Mapping[int, str]] = {}


@dataclass(frozen=True, slots=True)
class Unavailability:
    """A destination that is not used until an instant.

    Attributes:
        until: when a few messages probe it again.
        times: refusals in a row.
        failure: the class of the latest one.
        text: the broker's words, redacted.
        since: when the first one came.
    """

    until: datetime
    times: int
    failure: Failure
    text: str
    since: datetime


@dataclass(slots=True)
class Destination:
    """One topic.

    Attributes:
        topic: its name.
        order: how much of a key may be in flight.
        limits: what it may take.
        is_allowed: False when nothing is ever published to it: its rows are flawed.
        queue: rows that may go out, in order.
        behind: (strict) rows behind one of their key that is queued or in flight.
        batches: in flight, by number, in the order of hand-over.
        queued: rows in `queue` and `behind`.
        in_flight: rows in flight.
        large: bytes of large payloads among both, and among what is being settled.
        broken: keys with a row whose outcome is bad or unknown: what follows must not count as published.
        failing: in trouble, and not all outcomes are known yet: nothing is handed over.
        trouble: the latest trouble; cleared by the first success after it.
    """

    topic: str
    order: Order
    limits: DestinationLimits = _NO_LIMITS
    is_allowed: bool = True
    queue: deque[Row] = field(default_factory=deque)
    behind: dict[Key, deque[Row]] = field(default_factory=dict)
    batches: dict[int, InFlightBatch] = field(default_factory=dict)
    queued: int = 0
    in_flight: int = 0
    large: int = 0
    broken: set[Key] = field(default_factory=set)
    failing: bool = False
    trouble: Unavailability | None = None
    bucket: TokenBucket | None = field(init=False)
    breaker: Breaker | None = field(init=False)

    def __post_init__(self) -> None:
        self.bucket = None if self.limits.rate is None else TokenBucket(self.limits.rate)
        self.breaker = None if self.limits.circuit is None else Breaker(self.limits.circuit)

    def circuit(self, now: datetime) -> CircuitState:
        """The state of its circuit breaker."""
        if self.trouble is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if self.trouble.until > now else CircuitState.HALF_OPEN

    def allowance(self, limit: int, now: datetime) -> int:
        """Number of rows that may be sent now, up to ``limit``, given the cap on messages in flight and the rate."""
        if self.limits.in_flight is not None:
            limit = min(limit, self.limits.in_flight - self.in_flight)
        if self.bucket is not None and limit > 0:
            return self.bucket.allow(min(limit, len(self.queue)), now)
        return max(0, limit)

    def takes_more(self, given_up: int) -> bool:
        """True unless an earlier batch was refused or given up and is not processed yet: a new one could overtake it.

        Args:
            given_up: the latest batch that a reset of the publisher has ended.
        """
        return not self.failing and not any(
            batch.number <= given_up or (batch.receipts is not None and batch.receipts.refusals)
            for batch in self.batches.values()
        )

    def add(self, rows: Iterable[Row]) -> None:
        """Queues rows, in order."""
        before = len(self.queue)
        if self.order is Order.PIPELINED:
            self.queue.extend(rows)
            self.queued += len(self.queue) - before
            return
        for row in rows:
            self.queued += 1
            key = key_of(row)
            line = self.behind.get(key)
            if line is None:
                self.behind[key] = deque()
                self.queue.append(row)
            else:
                line.append(row)

    def take(self, limit: int, flaws: Mapping[int, str] = _NO_FLAWS) -> list[Row]:
        """Takes the next rows to hand over, all of one kind, out of the queue; none from the first flawed one on."""
        queue = self.queue
        limit = min(limit, len(queue))
        if flaws:
            limit = next((at for at, row in enumerate(islice(queue, limit)) if row.position in flaws), limit)
        taken = [queue.popleft() for _ in range(limit)]
        if len(set(map(_KIND, taken))) > 1:
            other = next(at for at, row in enumerate(taken) if row.kind != taken[0].kind)
            queue.extendleft(reversed(taken[other:]))
            del taken[other:]
        self.queued -= len(taken)
        return taken

    def sent(self, batch: InFlightBatch) -> None:
        """Notes that a batch was handed over."""
        if self.bucket is not None:
            self.bucket.take(len(batch.rows))
        self.batches[batch.number] = batch
        self.in_flight += len(batch.rows)

    def acknowledged(self, number: int, receipts: Receipts) -> list[InFlightBatch]:
        """Notes the answer to a batch; returns the batches that are processed now, in order."""
        self.batches[number].receipts = receipts
        if self.order is Order.STRICT:
            return [self._end(number)]
        through = []
        for other in list(self.batches):
            if self.batches[other].receipts is None:
                break
            through.append(self._end(other))
        return through

    def free(self, rows: Iterable[Row]) -> None:
        """(strict) Queues the next rows of the keys of rows that are settled."""
        if self.order is Order.PIPELINED:
            return
        for row in rows:
            key = key_of(row)
            line = self.behind.get(key)
            if line:
                self.queue.append(line.popleft())
            else:
                self.behind.pop(key, None)

    def pull(self, key: Key) -> list[Row]:
        """Takes the queued rows of a key out."""
        pulled = [row for row in self.queue if key_of(row) == key] + list(self.behind.pop(key, ()))
        if pulled:
            self.queue = deque(row for row in self.queue if key_of(row) != key)
            self.queued -= len(pulled)
        return pulled

    def drop(self) -> list[Row]:
        """Takes every queued row out; later rows of a key in flight still have to wait behind it."""
        dropped = [*self.queue, *(row for line in self.behind.values() for row in line)]
        self.queue.clear()
        if self.order is Order.STRICT:
            self.behind = {key_of(row): deque() for batch in self.batches.values() for row in batch.rows}
        self.queued = 0
        return dropped

    def _end(self, number: int) -> InFlightBatch:
        batch = self.batches.pop(number)
        self.in_flight -= len(batch.rows)
        return batch
