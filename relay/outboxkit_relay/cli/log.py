"""``outboxkit log``: who did what."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy import select

from outboxkit import tables
from outboxkit.policy import duration
from outboxkit_relay.cli.console import database, output

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Row

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_AUDIT: Final = tables.outbox_audit


@click.command()
@click.option("--action", help="Actions that begin with this: dlq, dlq.replay, control, quarantine.")
@click.option("--by", help="Only what this user or login did: ana, or ana@host.")
@click.option("--since", metavar="AGE", help="Within this time: 1h, 14d.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one action a line.")
@click.pass_obj
def command(invocation: Invocation, /, limit: int, *, as_json: bool, **wanted: str | None) -> None:
    """List what operators did: pauses, replays, discards, everything.

    The newest first. Kept for `retention.audit`. On PostgreSQL the login stands beside any other name.
    """
    query = select(_AUDIT).where(*_conditions(**wanted)).order_by(_AUDIT.c.id.desc()).limit(limit)
    with database.reading(invocation) as connection:
        rows = connection.execute(query).all()
    if as_json:
        for row in rows:
            output.print_json(output.plain(row._asdict()))
    elif rows:
        told = [(f"{row.at:%Y-%m-%d %H:%M:%S}", _names(row), row.action, row.target, row.why) for row in rows]
        output.table(("AT (UTC)", "WHO", "ACTION", "TARGET", "WHY"), told)
    else:
        click.echo("nothing was done", err=True)


def _names(row: Row[Any]) -> str:
    """The name that an entry gives, and the login that wrote it, which nobody chooses."""
    return row.who if row.login in (None, row.who) else f"{row.who} as {row.login}"


def _conditions(action: str | None, by: str | None, since: str | None) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    if action:
        found.append(_AUDIT.c.action.startswith(action, autoescape=True))
    if by:
        found.append((_AUDIT.c.who == by) | (_AUDIT.c.login == by) | _AUDIT.c.who.startswith(f"{by}@", autoescape=True))
    if since:
        found.append(_AUDIT.c.at >= datetime.now(UTC) - duration(since))
    return found
