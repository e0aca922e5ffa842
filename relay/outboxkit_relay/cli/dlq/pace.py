"""The pace of a replay: its rate, its canary, and what stops it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from outboxkit._failpoints import failpoint
from outboxkit.dead_letters import plan
from outboxkit.dead_letters.plan import Health, Item
from outboxkit.policy import duration
from outboxkit_relay.cli.console import output
from outboxkit_relay.cli.console.operator import who

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["Pace", "paced", "queue"]

_PORTION: Final = 500  # letters in one transaction
_PORTIONS_A_SECOND: Final = 5  # with a rate: often enough to be even, seldom enough to be cheap
_LOOK: Final = 0.2  # seconds between two looks at a canary


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """Pace of a replay, and the conditions that stop it.

    Attributes:
        rate: letters a second; None is as fast as the database takes them.
        first: the canary: letters that go first; the others wait until these have taken effect, and stay if one died.
        patience: seconds to wait for the canary.
        max_failures: share of the letters closed so far that may have died again.
    """

    rate: float | None
    first: int
    patience: float
    max_failures: float


def paced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a `Pace`; the command gets it as ``pace``."""

    @functools.wraps(function)
    def with_pace(
        *arguments: Any, rate: float | None, first: int, patience: str, max_failures: float, **options: Any
    ) -> Any:
        seconds = duration(patience).total_seconds()
        pace = Pace(rate=rate, first=first, patience=seconds, max_failures=max_failures / 100)
        return function(*arguments, pace=pace, **options)

    wrapped: Callable[..., Any] = with_pace
    for option in (
        click.option(
            "--max-failures",
            default=20.0,
            show_default=True,
            metavar="PERCENT",
            type=click.FloatRange(0, 100),
            help="Stop when more of the letters that were closed have died again.",
        ),
        click.option("--patience", default="60s", show_default=True, help="How long to wait for the canary."),
        click.option(
            "--canary",
            "first",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Send so many first, and the rest only if they take effect.",
        ),
        click.option("--rate", type=click.FloatRange(0, min_open=True), help="At most so many letters a second."),
    ):
        wrapped = option(wrapped)
    return wrapped


def queue(engine: Engine, replay_id: UUID, pace: Pace, resolve: Callable[[str], str] | None) -> None:
    """Queues what is left of a replay, portion by portion, until it is over, stopped, or hurts."""
    started, queued, first = time.monotonic(), 0, pace.first
    portion = _PORTION if pace.rate is None else max(1, min(_PORTION, round(pace.rate / _PORTIONS_A_SECOND)))
    with engine.connect() as connection, _bar(connection, replay_id) as bar:
        connection.rollback()
        while items := _advance(connection, replay_id, first or portion, resolve):
            failpoint("replay.advanced")
            queued += sum(item.outcome == plan.Outcome.QUEUED for item in items)
            bar(len(items))
            if not _is_healthy(connection, replay_id, pace, is_first=first > 0):
                return
            if first:
                first, started, queued = 0, time.monotonic(), 0
            if pace.rate is not None:
                time.sleep(max(0.0, started + queued / pace.rate - time.monotonic()))


def _advance(connection: Connection, replay_id: UUID, limit: int, resolve: Callable[[str], str] | None) -> list[Item]:
    with connection.begin():
        return plan.advance(connection, replay_id, limit=limit, resolve=resolve)


def _is_healthy(connection: Connection, replay_id: UUID, pace: Pace, *, is_first: bool) -> bool:
    """Looks at what became of the letters so far; stops the replay when too many have died again."""
    deadline = time.monotonic() + pace.patience
    found = _health(connection, replay_id)
    while is_first and found.under_way and time.monotonic() < deadline:
        time.sleep(_LOOK)
        found = _health(connection, replay_id)
    why = _hurts(found, pace, is_first=is_first)
    if why:
        with connection.begin():
            plan.stop(connection, replay_id, by=who(), why=why)
        click.echo(f"stopped: {why}; go on with: outboxkit dlq resume {str(replay_id)[:8]}", err=True)
    return not why


def _health(connection: Connection, replay_id: UUID) -> Health:
    with connection.begin():
        return plan.health(connection, replay_id)


def _hurts(found: Health, pace: Pace, *, is_first: bool) -> str:
    closed = found.replayed + found.died_again
    if is_first and found.under_way:
        return f"{output.count(found.under_way, 'letter')} of the canary took no effect in {pace.patience:.0f} s"
    if is_first and found.died_again:
        return f"{found.died_again:,} of the canary died again"
    if closed and found.died_again / closed > pace.max_failures:
        return f"{found.died_again:,} of {closed:,} that were closed have died again"
    return ""


@contextmanager
def _bar(connection: Connection, replay_id: UUID) -> Iterator[Callable[[int], None]]:
    """Draws a progress bar where somebody looks; yields what moves it on."""
    (found,) = plan.replays(connection, replay_id)
    if not sys.stderr.isatty() or found.waiting <= _PORTION:
        yield lambda _: None
        return
    with click.progressbar(length=found.waiting, label="queued", file=sys.stderr) as bar:
        yield bar.update
