"""Pace: a kept replay is carried out portion by portion, at a rate, a few letters first, and stops when it hurts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from outboxkit._failpoints import failpoint
from outboxkit.dead_letters import plan
from outboxkit.dead_letters.plan import Health, Item

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["Pace", "queue"]

_PORTION: Final = 500  # letters in one transaction
_PORTIONS_A_SECOND: Final = 5  # with a rate: often enough to be even, seldom enough to be cheap
_LOOK: Final = 0.2  # seconds between two looks at the first letters


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Pace of a replay, and the conditions that stop it.

    Attributes:
        rate: letters a second; None is as fast as the database takes them.
        first: the canary: letters that go first; the others wait until these have taken effect, and stay if one died.
        patience: seconds to wait for the canary.
        max_failures: share of the letters closed so far that may have died again.
    """

    rate: float | None = None
    first: int = 0
    patience: float = 60.0
    max_failures: float = 0.2

    @property
    def portion(self) -> int:
        """Number of letters in one transaction."""
        return _PORTION if self.rate is None else max(1, min(_PORTION, round(self.rate / _PORTIONS_A_SECOND)))


def queue(
    engine: Engine,
    replay_id: UUID,
    pace: Pace,
    *,
    by: str,
    resolve: Callable[[str], str] | None = None,
    tell: Callable[[int], None] = lambda _: None,
    leave: threading.Event | None = None,
) -> str:
    """Queues what is left of a replay, portion by portion, until it is over, stopped, or hurts.

    Transaction: opens its own, a short one for each portion.
    Guarantee: as `outboxkit.dead_letters.plan.advance`: whoever goes on after a crash does the rest, and nothing twice.

    Args:
        engine: of the letters' database.
        replay_id: a replay that `outboxkit.dead_letters.plan.freeze` has kept.
        pace: how fast, and when to stop.
        by: who carries it out, for the audit, if it stops.
        resolve: as in `outboxkit.dead_letters.Terms`.
        tell: gets the number of letters of each portion.
        leave: when it is set, the replay is left as it is after the portion at hand.

    Returns:
        Why it was stopped; empty when it was not.
    """
    run = _Run(engine, replay_id, pace, leave or threading.Event())
    while items := run.advance(resolve):
        failpoint("replay.advanced")
        tell(len(items))
        if why := run.hurts():
            with engine.begin() as connection:
                plan.stop(connection, replay_id, by=by, why=why)
            return why
        run.wait(sum(item.outcome == plan.Outcome.QUEUED for item in items))
    return ""


@dataclass(slots=True)
class _Run:
    """One run of a replay; its first portion is the canary, if there is one."""

    engine: Engine
    replay_id: UUID
    pace: Pace
    leave: threading.Event
    is_first: bool = field(init=False)
    queued: int = 0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.is_first = self.pace.first > 0

    def advance(self, resolve: Callable[[str], str] | None) -> list[Item]:
        if self.leave.is_set():
            return []
        limit = self.pace.first if self.is_first else self.pace.portion
        with self.engine.begin() as connection:
            return plan.advance(connection, self.replay_id, limit=limit, resolve=resolve)

    def hurts(self) -> str:
        """Looks at what became of the letters so far; waits for the canary. Says why to stop, or nothing."""
        deadline = time.monotonic() + self.pace.patience
        found = self._health()
        while self.is_first and found.under_way and time.monotonic() < deadline and not self.leave.wait(_LOOK):
            found = self._health()
        return "" if self.leave.is_set() else _hurts(found, self.pace, is_first=self.is_first)

    def wait(self, queued: int) -> None:
        """Keeps the rate; it counts from the end of the canary."""
        self.queued += queued
        if self.is_first:
            self.is_first, self.queued, self.started = False, 0, time.monotonic()
        if self.pace.rate is not None:
            self.leave.wait(max(0.0, self.started + self.queued / self.pace.rate - time.monotonic()))

    def _health(self) -> Health:
        with self.engine.begin() as connection:
            return plan.health(connection, self.replay_id)


def _hurts(found: Health, pace: Pace, *, is_first: bool) -> str:
    closed = found.replayed + found.died_again
    if is_first and found.under_way:
        letters = "letter" if found.under_way == 1 else "letters"
        return f"{found.under_way:,} {letters} of the canary took no effect in {pace.patience:.0f} s"
    if is_first and found.died_again:
        return f"{found.died_again:,} of the canary died again"
    if closed and found.died_again / closed > pace.max_failures:
        return f"{found.died_again:,} of {closed:,} that were closed have died again"
    return ""
