"""Statistics of a running relay: a frozen value that its dispatcher hands out, and the rules of readiness. Pure.

Topics are the only labels that data brings with it: beyond `MAX_TOPICS` they are counted together.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID

from outboxkit.durations import Distribution, Durations
from outboxkit.guards.circuit_breaker import CircuitState
from outboxkit_relay.core.protocol import Answered, Fenced, Fetched, LeaseConfirmed, Owned, RescanResult, Settled

if TYPE_CHECKING:
    from outboxkit.brokers import Receipts
    from outboxkit_relay.core.destinations import Destination, InFlightBatch
    from outboxkit_relay.core.protocol import Event
    from outboxkit_relay.core.state import State

__all__ = [
    "MAX_TOPICS",
    "NOTHING_YET",
    "OTHER_TOPICS",
    "RelayStats",
    "Tally",
    "Unavailable",
    "unavailable",
    "why_not_alive",
    "why_not_ready",
]

MAX_TOPICS: Final = 500  #: that are told apart: nobody's time series may grow without a bound
OTHER_TOPICS: Final = "(others)"

_STUCK_AFTER: Final = 60.0  # seconds without a turn of the dispatcher: longer than any wait it has by itself
_LEASES: Final = 2  # it waits for a statement of the database, which may take a part of a lease
_FROM_DATABASE: Final = (Owned, Fetched, LeaseConfirmed, RescanResult, Settled)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """A destination that takes no messages now.

    Attributes:
        topic: its name.
        failure: the class of the latest refusal.
        reason: the broker's words, redacted.
        since: when the first refusal came, by the database's clock.
        tries: refusals in a row.
    """

    topic: str
    failure: str
    reason: str
    since: datetime
    tries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayStats:
    """A relay at one moment.

    Attributes:
        relay: its fencing token; a new one with each joining.
        at: when its dispatcher made this value, in seconds of the machine's monotonic clock.
        heard: when the database has answered for the last time, on the same clock.
        away: whether the database cannot be reached.
        refused: why it lets the relay in no more; empty when that is not so.
        joined: whether it has a lease.
        stopping: whether it was told to stop.
        shards: how many it owns.
        queued: messages in its memory.
        in_flight: messages at the broker.
        found_by_rescan: messages that only the watchdog has found.
        fenced: how often its lease had ended when it wanted to go on: what it did then had no effect.
        destinations: topics it knows.
        unavailable: those that take no messages now.
        circuits: the circuit of each.
        paused: destinations that operators have paused.
        published: acknowledged messages, by topic.
        failures: refused messages, by topic and reason.
        publishing: of each batch, from its hand-over to its receipts.
        latency: of the oldest message of each batch without a refusal, from its commit (nearly) to its receipt.
    """

    relay: UUID
    at: float
    heard: float
    away: bool
    refused: str = ""
    joined: bool
    stopping: bool
    shards: int
    queued: int
    in_flight: int
    found_by_rescan: int
    fenced: int = 0
    destinations: tuple[str, ...]
    unavailable: tuple[Unavailable, ...]
    published: Mapping[str, int]
    failures: Mapping[tuple[str, str], int]
    circuits: Mapping[str, CircuitState] = field(default_factory=dict)
    paused: frozenset[str] = frozenset()
    publishing: Distribution = field(default_factory=Distribution)
    latency: Distribution = field(default_factory=Distribution)


#: a relay before its first turn
NOTHING_YET: Final = RelayStats(
    relay=UUID(int=0),
    at=0.0,
    heard=0.0,
    away=False,
    joined=False,
    stopping=False,
    shards=0,
    queued=0,
    in_flight=0,
    found_by_rescan=0,
    destinations=(),
    unavailable=(),
    published={},
    failures={},
)


@dataclass(slots=True)
class Tally:
    """Counts since the start of the process, by topic."""

    published: Counter[str] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    publishing: Durations = field(default_factory=Durations)
    latency: Durations = field(default_factory=Durations)
    heard: float = 0.0
    fenced: int = 0
    _named: set[str] = field(default_factory=set)

    def count(self, state: State, event: Event, now: tuple[float, datetime]) -> None:
        """Counts an event, before the core sees it; by the machine's monotonic clock and by the database's."""
        if isinstance(event, _FROM_DATABASE):
            self.heard = now[0]
        elif isinstance(event, Fenced):
            self.fenced += 1
        elif isinstance(event, Answered):
            found = next((one for one in state.destinations.values() if event.number in one.batches), None)
            if found is not None:
                self._answered(found.topic, found.batches[event.number], event.receipts, now[1])

    def stats(
        self, state: State, relay: UUID, now: tuple[float, datetime], *, away: bool, refused: str = ""
    ) -> RelayStats:
        """The relay as it is now, by the machine's monotonic clock and by the database's."""
        at, today = now
        destinations = list(state.destinations.values())[:MAX_TOPICS]
        return RelayStats(
            relay=relay,
            at=at,
            heard=self.heard,
            away=away,
            refused=refused if away else "",
            joined=state.joined and not away,
            stopping=state.stop_at is not None or state.left,
            shards=len(state.lanes.shards),
            queued=state.queued,
            in_flight=state.in_flight,
            found_by_rescan=state.found_by_rescan,
            fenced=self.fenced,
            destinations=tuple(one.topic for one in destinations),
            unavailable=unavailable(destinations),
            circuits={one.topic: one.circuit(today) for one in destinations},
            paused=state.paused.destinations,
            publishing=self.publishing.now,
            latency=self.latency.now,
            published=dict(self.published),
            failures=dict(self.failures),
        )

    def _answered(self, topic: str, batch: InFlightBatch, receipts: Receipts, now: datetime) -> None:
        name = self._name_of(topic)
        self.published[name] += len(batch.rows) - len(receipts.refusals)
        self.publishing.add((now - batch.since).total_seconds())
        if not receipts.refusals:
            self.latency.add((now - batch.rows[0].recorded_at).total_seconds())
        for refusal in receipts.refusals:
            self.failures[name, refusal.failure.value] += 1

    def _name_of(self, topic: str) -> str:
        if topic not in self._named and len(self._named) >= MAX_TOPICS:
            return OTHER_TOPICS
        self._named.add(topic)
        return topic


def unavailable(destinations: Iterable[Destination]) -> tuple[Unavailable, ...]:
    """The destinations among these that take no messages now."""
    return tuple(
        Unavailable(
            topic=one.topic,
            failure=one.trouble.failure.value,
            reason=one.trouble.text,
            since=one.trouble.since,
            tries=one.trouble.times,
        )
        for one in destinations
        if one.trouble is not None
    )


# --- readiness ---------------------------------------------------------------------------------------------------


def why_not_alive(found: RelayStats | None, lease: timedelta) -> str:
    """The reason to restart the process, empty when there is none.

    Before its first turn a relay waits for its database and broker, and that is no reason to restart it.
    """
    silence = time.monotonic() - found.at if found else 0.0
    stuck = silence > max(_STUCK_AFTER, _LEASES * lease.total_seconds())
    return f"the dispatcher has not moved for {silence:.0f} s" if stuck else ""


def why_not_ready(found: RelayStats | None, lease: timedelta) -> str:
    """The reason why the relay cannot publish, empty when it can."""
    if found is None:
        return "starting: waiting for the database and the broker"
    if found.stopping:
        return "stopping"
    if found.away:
        return found.refused or "the database cannot be reached"
    if not found.joined:
        return "joining: the relay has no lease yet"
    silence = time.monotonic() - found.heard
    return f"the database has not answered for {silence:.0f} s" if silence > lease.total_seconds() else ""
