"""The relay's configuration and everything it knows: the value that `outboxkit_relay.core.step` changes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from outboxkit.policy import Order, RetryPolicy
from outboxkit.rows import NOTHING_PAUSED, PauseSet
from outboxkit_relay.core.destinations import Destination, DestinationLimits, InFlightBatch, Key
from outboxkit_relay.core.lanes import MAIN, Lanes

if TYPE_CHECKING:
    from outboxkit.rows import Row

__all__ = ["LONG_AGO", "RelayConfig", "State"]

LONG_AGO: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayConfig:
    """Everything that stays the same while a relay runs.

    Attributes:
        batch_size: rows in a page and in a batch, 1 and more.
        window: batches that a destination may have in flight.
        order: how much of a key may be in flight, for destinations without an order of their own.
        retry: for messages in trouble of their own, and the jitter of a destination's pauses.
        quick: time between two empty reads while messages flow.
        slow: the longest time between two empty reads.
        patience: a batch without an answer is given up and sent again after this time.
        lease: its length; it is renewed every third of it.
        max_bytes: large payloads in hand; above it nothing more is read, except the rest of a page.
        once: leave as soon as nothing is left to publish, in the shards of other relays and in the waiting room, too.
        limits: of every destination that has none of its own.
        destinations: limits of single destinations, by name or by pattern (``payments.*``).
        allowed: where it publishes to, by name or by pattern; a row for another destination is dead. Empty: anywhere.
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
    limits: DestinationLimits = field(default_factory=DestinationLimits)
    destinations: Mapping[str, DestinationLimits] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()

    @property
    def budget(self) -> int:
        """Rows that may be queued for one destination before it gets a lane of its own."""
        return 4 * self.batch_size

    @property
    def page_bytes(self) -> int:
        """Bytes of large payloads in a page; also the most that one destination may have queued in the main lane."""
        return self.max_bytes // 4

    def limits_of(self, topic: str) -> DestinationLimits:
        """The limits of a destination: under its name, else the longest pattern that fits, else the usual ones."""
        fitting = [name for name in self.destinations if name == topic or fnmatchcase(topic, name)]
        return self.destinations[max(fitting, key=lambda name: (name == topic, len(name)))] if fitting else self.limits

    def allows(self, topic: str) -> bool:
        """True if the relay may publish to a destination."""
        return not self.allowed or any(fnmatchcase(topic, pattern) for pattern in self.allowed)

    @property
    def room(self) -> int:
        """Rows that may be queued in all: memory does not depend on the backlog."""
        return 8 * self.batch_size


@dataclass(slots=True, kw_only=True)
class State:
    """Everything the relay knows.

    Attributes:
        config: what stays the same.
        joined: it holds a lease and owns shards.
        left: it has given them back: the end.
        lanes: what has been read, and what is read next.
        destinations: by topic: queues, batches in flight, trouble.
        stopped: keys whose rows go to the waiting room.
        stopped_lately: keys that settlements have stopped since the latest rebalance was asked for.
        paused: what operators have paused.
        touched: keys with rows that went to the waiting room since (or about when) the latest look into it began.
        moving_to_waiting: keys with rows on their way to the waiting room; stopped until those have arrived.
        positions: fresh rows in hand: queued, in flight or being settled. A scan that finds them again drops them.
        settled_but_maybe_read: settled positions, each with the number of the latest read that had begun by then:
            that read may still find them.
        flaws: reasons why rows in hand can never be sent, by position.
        large: bytes of each large payload in hand, by position.
        large_bytes: their sum.
        waiting: ids of waiting rows in hand.
        settling: settlements that are not committed yet.
        number: of the latest batch.
        given_up: number of the latest batch that a reset of its publisher has ended, by broker.
        reads: number of the latest read.
        reading: a read is under way.
        busy: the reader confirms the lease, rescans or rebalances.
        latest_lane: the lane of the latest read: lanes take turns.
        lease_until: until when it may publish without confirming the lease.
        work_elsewhere: (once) whether the latest rebalance has found rows in other relays' shards or waiting retries.
        woken: the next read is wanted because of a hint: a look into the waiting room does not delay it.
        hinted: messages were committed since the read under way began: it may not have seen them.
        wake_at: when the main lane is read again.
        pace_at: when a destination with a rate may send again; None when none waits for that.
        flowing_until: until then empty reads stay quick.
        idle: the latest time between two empty reads.
        look_at: when the waiting room is looked into again.
        rebalance_at: when the lease is renewed and shards are rebalanced.
        rescan_at: when rows are looked for that no lane has delivered.
        empty_rounds: rounds of the main lane in a row that found nothing.
        has_surplus: it owns more shards than its quota, and gives some back when nothing is in flight.
        stop_at: when a stop gives up waiting for answers; None while nobody has asked it to stop.
        found_by_rescan: rows that only a rescan has found: each one is a defect to report.
    """

    config: RelayConfig
    joined: bool = False
    left: bool = False
    lanes: Lanes = field(default_factory=Lanes)
    destinations: dict[str, Destination] = field(default_factory=dict)
    stopped: frozenset[Key] = frozenset()
    stopped_lately: frozenset[Key] = frozenset()
    paused: PauseSet = NOTHING_PAUSED
    touched: set[Key] = field(default_factory=set)
    moving_to_waiting: Counter[Key] = field(default_factory=Counter)
    positions: set[int] = field(default_factory=set)
    settled_but_maybe_read: list[tuple[int, list[int]]] = field(default_factory=list)
    flaws: dict[int, str] = field(default_factory=dict)
    large: dict[int, int] = field(default_factory=dict)
    large_bytes: int = 0
    waiting: set[int] = field(default_factory=set)
    settling: int = 0
    number: int = 0
    given_up: dict[str, int] = field(default_factory=dict)
    reads: int = 0
    reading: bool = False
    busy: bool = False
    latest_lane: str = MAIN
    lease_until: datetime = LONG_AGO
    work_elsewhere: bool = True
    woken: bool = False
    hinted: bool = False
    wake_at: datetime = LONG_AGO
    pace_at: datetime | None = None
    flowing_until: datetime = LONG_AGO
    idle: timedelta = timedelta(0)
    look_at: datetime = LONG_AGO
    rebalance_at: datetime = LONG_AGO
    rescan_at: datetime = LONG_AGO
    empty_rounds: int = 0
    has_surplus: bool = False
    stop_at: datetime | None = None
    found_by_rescan: int = 0

    @property
    def in_flight(self) -> int:
        """Rows at the broker."""
        return sum(destination.in_flight for destination in self.destinations.values())

    @property
    def queued(self) -> int:
        """Rows that are queued."""
        return sum(destination.queued for destination in self.destinations.values())

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way."""
        return not (self.reading or self.busy or self.settling or self.batches())

    def batches(self) -> Iterable[InFlightBatch]:
        """Every batch at the broker."""
        return [batch for destination in self.destinations.values() for batch in destination.batches.values()]

    def start_again(self) -> None:
        """Forgets all but the configuration, the numbers that name batches, and what was asked for."""
        fresh = State(
            config=self.config,
            number=self.number,
            stop_at=self.stop_at,
            found_by_rescan=self.found_by_rescan,
        )
        for name in State.__slots__:
            setattr(self, name, getattr(fresh, name))

    def destination(self, topic: str) -> Destination:
        """The destination of a topic, made when it is seen for the first time."""
        found = self.destinations.get(topic)
        if found is None:
            limits = self.config.limits_of(topic)
            order = limits.order or self.config.order
            found = self.destinations[topic] = Destination(topic, order, limits, self.config.allows(topic))
        return found

    def forget(self, rows: Iterable[Row]) -> None:
        """Lets rows go that are still in the table: they will be read again."""
        rows = list(rows)
        self.release(rows)
        for row in rows:
            if row.waiting_id is None:
                self.positions.discard(row.position)
            else:
                self.waiting.discard(row.waiting_id)

    def track_bytes(self, rows: Iterable[Row], large: Mapping[int, int]) -> None:
        """Counts the large payloads among rows that were just read."""
        for row in rows:
            if row.position in large:
                self.large[row.position] = size = large[row.position]
                self.large_bytes += size
                self.destination(row.topic).large += size

    def release(self, rows: Iterable[Row]) -> None:
        """Forgets what is known of rows that leave the relay's hands: flaws, and the size of large payloads."""
        if self.flaws:
            for row in rows:
                self.flaws.pop(row.position, None)
        if not self.large:
            return
        for row in rows:
            size = self.large.pop(row.position, 0) if row.waiting_id is None else 0
            if size:
                self.large_bytes -= size
                self.destination(row.topic).large -= size
