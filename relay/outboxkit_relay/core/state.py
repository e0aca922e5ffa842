"""What a relay goes by and what it knows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from outboxkit.policy import Order, RetryPolicy
from outboxkit.rows import NOTHING_PAUSED, PauseSet
from outboxkit_relay.core.destinations import Destination, InFlightBatch, Key, Limits
from outboxkit_relay.core.lanes import MAIN, Lanes

if TYPE_CHECKING:
    from outboxkit.rows import Row

__all__ = ["LONG_AGO", "RelayConfig", "State"]

LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """What does not change while a relay runs.

    Attributes:
        batch_size: rows in a page and in a batch, 1 and more.
        window: batches that a destination may have in flight.
        order: how much of a key may be in flight.
        retry: for messages in trouble of their own, and the jitter of pauses.
        quick: time between two empty reads while messages flow.
        slow: the longest time between two empty reads.
        patience: a batch that is not answered for so long is given up and sent again.
        lease: its length; renewed every third of it.
        max_bytes: of heavy payloads in hand; what is above is not read yet, but for the rest of a page.
        once: leave as soon as nothing is left to publish: nothing of other relays either, and nothing that waits for
            its next try.
        limits: of every destination that has none of its own.
        destinations: limits of those that have.
    """

    batch_size: int = 1000
    window: int = 8
    order: Order = Order.PIPELINED
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    quick: timedelta = timedelta(milliseconds=3)
    slow: timedelta = timedelta(milliseconds=250)
    patience: timedelta = timedelta(seconds=30)
    lease: timedelta = timedelta(seconds=10)
    max_bytes: int = 64 << 20
    once: bool = False
    limits: Limits = field(default_factory=Limits)
    destinations: Mapping[str, Limits] = field(default_factory=dict)

    @property
    def budget(self) -> int:
        """Rows that may be queued for one destination before it gets a lane of its own."""
        return 4 * self.batch_size

    @property
    def page_bytes(self) -> int:
        """Bytes of heavy payloads in a page, and what one destination may have queued of them in the main lane."""
        return self.max_bytes // 4

    @property
    def room(self) -> int:
        """Rows that may be queued in all: memory does not depend on the backlog."""
        return 8 * self.batch_size


@dataclass(slots=True, kw_only=True)
class State:
    """Everything the relay knows.

    Attributes:
        positions: fresh rows in hand: queued, in flight or being settled. What a scan finds of them is dropped.
        settled_but_maybe_read: settled positions, with the number of the latest read that had begun by then: it
            may still find them.
        heavy: of these, rows with a heavy payload: how many bytes.
        heavy_bytes: their sum.
        more: (once) what the latest balance has told of other relays and of the waiting room.
        woken: the next read is wanted because of a hint: it is not delayed by a look into the waiting room.
        hinted: somebody has committed messages since the read under way began: it may not have seen them.
        waiting: ids of waiting rows in hand.
        stopped_lately: keys that settlements have stopped since the latest balance was asked for.
        holds: what operators have paused.
        touched: keys with rows that went to the waiting room since the latest look into it began, or about then.
        setting_aside: keys with rows on their way to the waiting room; they are stopped until those have arrived.
        settling: settlements that are not committed yet.
    """

    rules: RelayConfig
    joined: bool = False
    left: bool = False
    lanes: Lanes = field(default_factory=Lanes)
    destinations: dict[str, Destination] = field(default_factory=dict)
    stopped: frozenset[Key] = frozenset()
    stopped_lately: frozenset[Key] = frozenset()
    holds: PauseSet = NOTHING_PAUSED
    touched: set[Key] = field(default_factory=set)
    setting_aside: Counter[Key] = field(default_factory=Counter)
    positions: set[int] = field(default_factory=set)
    settled_but_maybe_read: list[tuple[int, list[int]]] = field(default_factory=list)
    heavy: dict[int, int] = field(default_factory=dict)
    heavy_bytes: int = 0
    waiting: set[int] = field(default_factory=set)
    settling: int = 0
    number: int = 0
    given_up: int = 0  # the latest batch that a reset of the publisher has ended
    reads: int = 0
    reading: bool = False
    busy: bool = False  # the reader is claiming, watching or balancing
    latest_lane: str = MAIN
    lease_until: datetime = LONG_AGO
    more: bool = True
    woken: bool = False
    hinted: bool = False
    wake_at: datetime = LONG_AGO
    pace_at: datetime | None = None  # when a destination with a rate may go on
    flowing_until: datetime = LONG_AGO
    idle: timedelta = timedelta(0)
    look_at: datetime = LONG_AGO
    balance_at: datetime = LONG_AGO
    watch_at: datetime = LONG_AGO
    empty_rounds: int = 0
    has_surplus: bool = False
    stop_at: datetime | None = None
    found_by_rescan: int = 0

    @property
    def in_flight(self) -> int:
        """Rows at the broker."""
        return sum(destination.in_flight for destination in self.destinations.values())

    @property
    def held(self) -> int:
        """Rows that are queued."""
        return sum(destination.held for destination in self.destinations.values())

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way."""
        return not (self.reading or self.busy or self.settling or self.flights())

    def flights(self) -> Iterable[InFlightBatch]:
        """Every batch at the broker."""
        return [flight for destination in self.destinations.values() for flight in destination.flights.values()]

    def start_again(self) -> None:
        """Forgets all but the rules, the numbers that name batches, and what was asked for."""
        fresh = State(
            rules=self.rules,
            number=self.number,
            stop_at=self.stop_at,
            found_by_rescan=self.found_by_rescan,
        )
        for name in State.__slots__:
            setattr(self, name, getattr(fresh, name))

    def destination(self, topic: str) -> Destination:
        """The destination of that topic."""
        found = self.destinations.get(topic)
        if found is None:
            limits = self.rules.destinations.get(topic, self.rules.limits)
            found = self.destinations[topic] = Destination(topic, self.rules.order, limits)
        return found

    def forget(self, rows: Iterable[Row]) -> None:
        """These rows are no longer in hand; they are still in the table and will be read again."""
        rows = list(rows)
        self.release_bytes(rows)
        for row in rows:
            if row.waiting_id is None:
                self.positions.discard(row.position)
            else:
                self.waiting.discard(row.waiting_id)

    def track_bytes(self, rows: Iterable[Row], heavy: Mapping[int, int]) -> None:
        """These rows are in hand now, some with heavy payloads."""
        for row in rows:
            if row.position in heavy:
                self.heavy[row.position] = size = heavy[row.position]
                self.heavy_bytes += size
                self.destination(row.topic).heavy += size

    def release_bytes(self, rows: Iterable[Row]) -> None:
        """The payloads of these rows are let go."""
        if not self.heavy:
            return
        for row in rows:
            size = self.heavy.pop(row.position, 0) if row.waiting_id is None else 0
            if size:
                self.heavy_bytes -= size
                self.destination(row.topic).heavy -= size
