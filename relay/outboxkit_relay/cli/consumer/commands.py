"""``outboxkit consumer``: a consumer's name, and everything that is kept under it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from outboxkit.inbox import rename as renaming
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who

if TYPE_CHECKING:
    from outboxkit.inbox.rename import Renaming
    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]


@click.group()
def command() -> None:
    """Rename a consumer."""


@command.command()
@click.argument("old")
@click.argument("new")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@asking
@click.pass_obj
def rename(invocation: Invocation, /, old: str, new: str, why: str, **options: Any) -> int:
    """Give everything of a consumer another name: inbox, retries, parked keys, dead letters.

    All in one transaction, as the owner of the tables. Refused while a run of either name is alive, while dead letters
    of them are being replayed, and when the new name has rows of its own. The broker is told separately: see
    docs/how-to/rename-consumer.md.
    """
    with database.reading(invocation) as connection:
        found = renaming.look(connection, old, new)

    def apply() -> list[Result]:
        with database.writing(invocation) as connection:
            return [_result(renaming.rename(connection, old, new, by=who(), why=why), "renamed")]

    rows = sum(found.rows.values())
    change = Change(
        expected=[_result(found, "would be renamed")],
        question=f"Rename {old} to {new} ({output.count(rows, 'row')})?",
        apply=apply,
    )
    return confirm_and_apply(change, **options)


def _result(found: Renaming, outcome: str) -> Result:
    rows = ", ".join(f"{number:,} in {table}" for table, number in found.rows.items() if number)
    return Result(
        name=f"{found.old} to {found.new}",
        outcome="refused" if found.refusal else outcome,
        done=not found.refusal,
        reason=found.refusal or rows,
        facts={"old": found.old, "new": found.new, "rows": dict(found.rows)},
    )
