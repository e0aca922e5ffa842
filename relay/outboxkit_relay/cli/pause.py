"""``outboxkit relay pause``, ``resume`` and ``pauses``: destinations, event types and keys that operators hold back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy import func, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Pause, Scope, Target
from outboxkit.policy import duration
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.exit_codes import Exit

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import Connection

    from outboxkit_relay.cli.main import Invocation

__all__ = ["listing", "pause", "resume", "shown"]

_JSON: Final = click.option("--json", "as_json", is_flag=True, help="Print JSON, one pause a line.")


def _about(function: Callable[..., int]) -> Callable[..., int]:
    """Adds what `pause` and `resume` take."""

    @click.argument("destination", required=False)
    @click.option("--type", "type_name", metavar="TYPE", help="An event type, at every destination.")
    @click.option("--key", help="One key of the destination only.")
    @click.option("--dry-run", is_flag=True, help="Show what would happen.")
    @_JSON
    @click.pass_obj
    @wraps(function)
    def asked(invocation: Invocation, /, **options: Any) -> int:
        target = _target(options.pop("destination"), options.pop("type_name"), options.pop("key"))
        return function(invocation, target, **options)

    return asked


@click.command("pause")
@click.option("--why", required=True, metavar="TEXT", help="The reason, for those who find it paused.")
@click.option("--for", "lasts", metavar="TIME", help="End by itself after so long: 30m, 2h. Default: until resumed.")
@_about
def pause(invocation: Invocation, target: Target, *, why: str, lasts: str | None, dry_run: bool, as_json: bool) -> int:
    """Hold messages back: of a destination, of an event type, or of one key.

    They wait in the database, no attempt is spent, and the order of each key is kept: behind a message of a paused type
    the later ones of its key wait, too. Relays obey within a third of their lease.
    """
    until = None if lasts is None else duration(lasts)
    with database.writing(invocation) as connection:
        if not dry_run:
            pauses.pause(connection, target, by=who(), reason=why, lasts=until)
        _tell(connection, target, "would be paused" if dry_run else "paused", as_json=as_json)
    return Exit.OK


@click.command("resume")
@click.option("--why", default="", metavar="TEXT", help="The reason, for the audit log.")
@_about
def resume(invocation: Invocation, target: Target, *, why: str, dry_run: bool, as_json: bool) -> int:
    """Let messages go out again that `pause` holds back, in their order."""
    with database.writing(invocation) as connection:
        paused = target in {found.target for found in pauses.pauses(connection)}
        if paused and not dry_run:
            pauses.resume(connection, target, by=who(), why=why)
        outcome = "not paused" if not paused else "would be resumed" if dry_run else "resumed"
        _tell(connection, target, outcome, as_json=as_json)
    return Exit.OK if paused else Exit.FAILED


@click.command("pauses")
@_JSON
@click.pass_obj
def listing(invocation: Invocation, *, as_json: bool) -> None:
    """Show what is paused, by whom, why, and until when."""
    with database.reading(invocation) as connection:
        found = pauses.pauses(connection)
        now = connection.execute(select(database_now())).scalar_one()
    if as_json:
        for one in found:
            output.print_json(shown(one))
    elif found:
        output.table(["PAUSED", "NAME", "BY", "SINCE", "ENDS", "WHY"], [_row(one, now) for one in found])
    else:
        click.echo("nothing is paused", err=True)


def shown(found: Pause) -> dict[str, object]:
    """A pause as JSON has it."""
    times = {"since": found.since.isoformat(), "until": found.until and found.until.isoformat()}
    return {**_named(found.target), "reason": found.reason, "by": found.by, **times}


def _named(target: Target) -> dict[str, object]:
    key = None if target.key is None else target.key.decode("utf-8", "backslashreplace")
    return {"scope": target.scope.value, "name": target.name, "key": key}


def _target(destination: str | None, type_name: str | None, key: str | None) -> Target:
    if (destination is None) == (type_name is None) or (key is not None and destination is None):
        raise click.UsageError("name a destination, a destination and --key, or --type")
    if type_name is not None:
        return Target(Scope.TYPE, type_name)
    name = destination or ""
    if key is None:
        return Target(Scope.DESTINATION, name)
    # As it is shown: bytes that are no text are written as escapes.
    return Target(Scope.KEY, name, pauses.unescaped(key))


def _tell(connection: Connection, target: Target, outcome: str, *, as_json: bool) -> None:
    waiting = sum(_pending(connection, table, target) for table in (tables.outbox_messages, tables.outbox_waiting))
    if as_json:
        output.print_json({**_named(target), "outcome": outcome, "messages": waiting})
    else:
        messages = f"{waiting:,} message{'s' * (waiting != 1)} of it in the outbox"
        click.echo(output.safe(f"{target.scope} {target}: {outcome}, {messages}"))


def _pending(connection: Connection, table: Any, target: Target) -> int:
    """Counts the messages of a target."""
    where = [table.c.type == target.name] if target.scope is Scope.TYPE else [table.c.topic == target.name]
    if target.key is not None:
        where.append(table.c.key == target.key)
    return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


def _row(found: Pause, now: datetime) -> list[object]:
    ends = "when resumed" if found.until is None else f"in {output.ago(found.until - now)}"
    since = f"{output.ago(now - found.since)} ago"
    return [found.target.scope.value, str(found.target), found.by, since, ends, found.reason]
