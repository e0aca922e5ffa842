"""Changes: what every command that changes something does in the same way: look, ask with the counts, do, tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click

from outboxkit_relay.cli.console import output
from outboxkit_relay.exit_codes import Exit

__all__ = ["Change", "Result", "asking", "confirm_and_apply", "exit_code", "tell"]

_ALL_SHOWN = 50  # of results that went well; those that did not are always told


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result for one of the things that were named.

    Attributes:
        name: as people call it, for a line.
        outcome: in a word or two: ``queued``, ``refused``.
        done: whether what was asked for is done, or would be.
        reason: why not, or what else is to be known.
        facts: for JSON, beside outcome and reason.
    """

    name: str
    outcome: str
    done: bool
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change that was looked at.

    Attributes:
        expected: what would become of each thing.
        question: with the counts; asked only when something would be done.
        apply: does it, and returns what became of each.
    """

    expected: Sequence[Result]
    question: str
    apply: Callable[[], Sequence[Result]]


def asking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds ``--dry-run``, ``--yes`` and ``--json``: every command that changes something takes them."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON, one result a line."),
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Show what would happen."),
    ):
        function = option(function)
    return function


def confirm_and_apply(change: Change, *, dry_run: bool, yes: bool, as_json: bool) -> Exit:
    """Asks, applies and tells; what was looked at is what is changed.

    Returns:
        0 when all is done, 4 when some is not, 1 when nothing is.
    """
    results = change.expected
    if not dry_run and any(result.done for result in results):
        if not output.confirmed(change.question, yes=yes):
            click.echo("nothing was changed", err=True)
            return Exit.FAILED
        results = change.apply()
    tell(results, as_json=as_json)
    return exit_code(results)


def tell(results: Sequence[Result], *, as_json: bool) -> None:
    """Prints a line for each result; of many that went well as text only their number."""
    is_short = as_json or len(results) <= _ALL_SHOWN
    for result in results:
        if as_json:
            output.print_json({**result.facts, "outcome": result.outcome, "reason": result.reason})
        elif is_short or not result.done:
            reason = f": {result.reason}" if result.reason else ""
            click.echo(output.safe(f"{result.name}  {result.outcome}{reason}"))
    if not is_short:
        done = sum(result.done for result in results)
        outcome = next((result.outcome for result in results if result.done), "done")
        click.echo(f"{done:,} of {len(results):,} {outcome}")


def exit_code(results: Sequence[Result]) -> Exit:
    """Returns 0 when all is done, 4 when some is not, 1 when nothing is."""
    done = sum(result.done for result in results)
    return Exit.OK if done == len(results) else Exit.PARTLY if done else Exit.FAILED
