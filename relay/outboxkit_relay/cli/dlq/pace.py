"""The pace of a replay on the command line: its options, and its progress bar."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click

from outboxkit.dead_letters import pace, plan
from outboxkit.dead_letters.pace import Pace
from outboxkit.policy import duration
from outboxkit_relay.cli.console.operator import who

if TYPE_CHECKING:
    from sqlalchemy import Engine

__all__ = ["paced", "queue"]

_MIN_BAR: Final = 500  # letters: fewer are queued at once


def paced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of a `Pace`; the command gets it as ``pace``."""

    @functools.wraps(function)
    def with_pace(
        *arguments: Any, rate: float | None, first: int, patience: str, max_failures: float, **options: Any
    ) -> Any:
        seconds = duration(patience).total_seconds()
        asked = Pace(rate=rate, first=first, patience=seconds, max_failures=max_failures / 100)
        return function(*arguments, pace=asked, **options)

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


def queue(engine: Engine, replay_id: UUID, asked: Pace, resolve: Callable[[str], str] | None) -> None:
    """Queues what is left of a replay, and draws how far it is; says why it stopped."""
    with engine.connect() as connection:
        (found,) = plan.replays(connection, replay_id)
    with _bar(found.waiting) as tell:
        why = pace.queue(engine, replay_id, asked, by=who(), resolve=resolve, tell=tell)
    if why:
        click.echo(f"stopped: {why}; go on with: outboxkit dlq resume {str(replay_id)[:8]}", err=True)


@contextmanager
def _bar(letters: int) -> Iterator[Callable[[int], None]]:
    """Draws a progress bar where somebody looks; yields what moves it on."""
    if not sys.stderr.isatty() or letters <= _MIN_BAR:
        yield lambda _: None
        return
    with click.progressbar(length=letters, label="queued", file=sys.stderr) as bar:
        yield bar.update
