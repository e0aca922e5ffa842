"""Statistics of a consumer: a frozen value for probes, metrics and ``status``, and the rules of readiness. Pure.

A `Tally` belongs to its consumer and outlives its runs: what was counted never goes back. The run's event loop writes;
any thread may take a snapshot.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from outboxkit.brokers import Assignment
from outboxkit.durations import Distribution, Durations
from outboxkit.rows import CutOff, Dependency

__all__ = [
    "OTHER_TYPES",
    "Backlog",
    "ConsumerStats",
    "Phase",
    "Tally",
    "why_not_alive",
    "why_not_ready",
]

OTHER_TYPES: Final = ("(others)", "(others)")
_MAX_TYPES: Final = 500  # pairs of topic and type that are told apart: nobody's series may grow without a bound
_TYPE_LENGTH: Final = 200
_STUCK_AFTER: Final = 60.0  # seconds without a turn of the event loop
_SILENT_AFTER: Final = 15.0  # seconds without an answer of the database, which is asked every two


class Phase(StrEnum):
    """Parts of a run."""

    IDLE = "idle"  #: there is none
    STARTING = "starting"  #: waiting for the database
    RUNNING = "running"
    STOPPING = "stopping"  #: nothing more is begun


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """A consumer's waiting room, over all its processes.

    Attributes:
        retry: heads that wait for their next try.
        follower: deliveries behind one of their key.
        parked: keys whose dead head waits for an operator.
        oldest: since the first failure, or the arrival, of what has waited longest.
    """

    retry: int = 0
    follower: int = 0
    parked: int = 0
    oldest: timedelta = timedelta(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStats:
    """A consumer in one process at one moment.

    Attributes:
        consumer: its name.
        slots: attempts that may run at once.
        phase: of its run.
        turned: when the event loop has turned last, in seconds of the machine's monotonic clock.
        heard: when the database has answered last, on the same clock.
        in_hand: deliveries that are not settled.
        busy: slots in use.
        cut_off: why it gets nothing, None when it does.
        assignment: what the broker has given it to read, and how much of that is unread.
        backlog: what waits in the database.
        received: deliveries that the broker handed out.
        counts: what became of them.
        ignored: those of types that nobody here handles, by topic and type.
        handler: seconds in a handler, failed calls included.
        transaction: seconds in a transaction with its commit.
        critical_time: seconds from the commit of the sender to that of the effect.
    """

    consumer: str
    slots: int
    phase: Phase
    turned: float
    heard: float
    in_hand: int
    busy: int
    cut_off: CutOff | None
    assignment: Assignment
    backlog: Backlog
    received: int
    counts: Mapping[str, int]
    ignored: Mapping[tuple[str, str], int]
    handler: Distribution
    transaction: Distribution
    critical_time: Distribution


@dataclass(slots=True)
class Tally:
    """Counts since the start of the process, and the standing of the current run."""

    counts: Counter[str] = field(default_factory=Counter)
    ignored: Counter[tuple[str, str]] = field(default_factory=Counter)
    received: int = 0
    handler: Durations = field(default_factory=Durations)
    transaction: Durations = field(default_factory=Durations)
    critical_time: Durations = field(default_factory=Durations)
    phase: Phase = Phase.IDLE
    turned: float = 0.0
    heard: float = 0.0
    in_hand: int = 0
    busy: int = 0
    cut_offs: dict[Dependency, CutOff] = field(default_factory=dict)
    assignment: Assignment = field(default_factory=Assignment)
    backlog: Backlog = Backlog()

    @property
    def cut_off(self) -> CutOff | None:
        """The longest of them."""
        return min(list(self.cut_offs.values()), key=lambda one: one.since, default=None)

    def ignore(self, topic: str, type_name: str) -> bool:
        """Counts a message of a type that nobody handles; True when it is the first of its topic and type."""
        pair = (topic, type_name[:_TYPE_LENGTH])
        is_new = pair not in self.ignored
        if is_new and len(self.ignored) >= _MAX_TYPES:
            pair, is_new = OTHER_TYPES, False
        self.ignored[pair] += 1
        return is_new

    def began(self) -> None:
        """Notes the start of a run."""
        self.phase, self.heard = Phase.STARTING, time.monotonic()
        self.cut_offs = {Dependency.BROKER: CutOff(of=Dependency.BROKER, since=datetime.now(UTC), is_new=True)}
        self.assignment = Assignment()

    def lost(self, of: Dependency, reason: str) -> bool:
        """Notes that something does not answer; True when that is news."""
        known = self.cut_offs.get(of) or CutOff(of=of, since=datetime.now(UTC))
        self.cut_offs[of] = known if known.reason else replace(known, reason=reason)
        return not known.reason

    def found(self, of: Dependency) -> bool:
        """Notes that it answers; True when that is news to those who heard that it did not."""
        known = self.cut_offs.pop(of, None)
        return known is not None and bool(known.reason)

    def stats(self, consumer: str, slots: int) -> ConsumerStats:
        """The consumer as it is now."""
        return ConsumerStats(
            consumer=consumer,
            slots=slots,
            phase=self.phase,
            turned=self.turned,
            heard=self.heard,
            in_hand=self.in_hand,
            busy=self.busy,
            cut_off=self.cut_off,
            assignment=self.assignment,
            backlog=self.backlog,
            received=self.received,
            counts=dict(self.counts),
            ignored=dict(self.ignored),
            handler=self.handler.now,
            transaction=self.transaction.now,
            critical_time=self.critical_time.now,
        )


def why_not_alive(found: ConsumerStats) -> str:
    """The reason to restart the process, empty when there is none: a handler that blocks the loop is one."""
    silence = time.monotonic() - found.turned if found.phase is not Phase.IDLE and found.turned else 0.0
    return f"{found.consumer}: the event loop has not turned for {silence:.0f} s" if silence > _STUCK_AFTER else ""


def why_not_ready(found: ConsumerStats) -> str:
    """The reason why the consumer handles nothing, empty when it can.

    A standby without a partition is ready: it has joined, and takes over when another one leaves.
    """
    if found.phase is Phase.IDLE or found.phase is Phase.STARTING:
        return f"{found.consumer}: starting: waiting for the database"
    if found.phase is Phase.STOPPING:
        return f"{found.consumer}: stopping"
    silence, cut_off = time.monotonic() - found.heard, found.cut_off
    if cut_off is not None and cut_off.is_new:
        reason = f": {cut_off.reason}" if cut_off.reason else ""
        return f"{found.consumer}: starting: the broker has given it no partition and no queue yet{reason}"
    if cut_off is not None:
        return f"{found.consumer}: the {cut_off.of} is away: {cut_off.reason}"
    if silence > _SILENT_AFTER:
        return f"{found.consumer}: the database has not answered for {silence:.0f} s"
    return ""
