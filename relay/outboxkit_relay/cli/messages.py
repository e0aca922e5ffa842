"""``outboxkit messages``: what waits in the outbox, and scheduled messages that are no longer wanted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click
from sqlalchemy import literal, select, union_all

from outboxkit import outbox, tables
from outboxkit.outbox import pauses
from outboxkit.rows import WaitReason
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who

if TYPE_CHECKING:
    from sqlalchemy import Row

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_COLUMNS: Final = ("message_id", "topic", "key", "type", "kind", "recorded_at")
_PENDING: Final = "pending"


@click.group()
def command() -> None:
    """See what waits in the outbox, and cancel what is scheduled.

    Payloads are not shown. A message that is out already is found by `outboxkit status --message ID`.
    """


@command.command("list")
@click.option("--state", type=click.Choice([_PENDING, *(reason.value for reason in WaitReason)]), help="Why it waits.")
@click.option("--topic", help="Only of this destination.")
@click.option("--type", "type_name", help="Only of this type.")
@click.option("--key", help="Only of this key.")
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1, 100_000), help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one message a line.")
@click.pass_obj
def list_messages(invocation: Invocation, /, limit: int, *, as_json: bool, **wanted: str | None) -> None:
    """List messages that are not published yet, the oldest first."""
    with database.reading(invocation) as connection:
        rows = connection.execute(_query(wanted, limit)).all()
    now = datetime.now(UTC)
    if as_json:
        for row in rows:
            output.print_json({**output.plain(row._asdict()), "key": output.text_of(row.key)})
    elif rows:
        headers = ("ID", "STATE", "TOPIC", "TYPE", "KEY", "AGE", "DUE", "ERROR")
        output.table(headers, [_row(row, now) for row in rows], whole=("ID",))
    else:
        click.echo("no message waits", err=True)


@command.command("cancel")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--why", required=True, metavar="TEXT", help="The reason, for the audit log.")
@asking
@click.pass_obj
def cancel(invocation: Invocation, /, ids: Sequence[str], *, why: str, **options: Any) -> int:
    """Cancel scheduled messages, by their whole ids.

    One that is due is refused: it may be at the broker.
    """
    wanted = list(dict.fromkeys(ids))
    with database.reading(invocation) as connection:
        found = {one for one in wanted if outbox.is_scheduled(connection, one)}

    def apply() -> list[Result]:
        with database.writing(invocation) as connection:
            done = {one for one in wanted if outbox.cancel(connection, one)}
            if done:
                entry = {"who": who(), "action": "messages.cancel", "target": " ".join(sorted(done)), "why": why}
                connection.execute(tables.outbox_audit.insert().values(**entry))
        return [_cancelled(one, "cancelled", is_done=one in done) for one in wanted]

    change = Change(
        expected=[_cancelled(one, "would cancel", is_done=one in found) for one in wanted],
        question=f"Cancel {output.count(len(found), 'scheduled message')}?",
        apply=apply,
    )
    return confirm_and_apply(change, **options)


def _cancelled(name: str, outcome: str, *, is_done: bool) -> Result:
    reason = "" if is_done else "no scheduled message has this id, or it is due and may be at the broker"
    return Result(name=name, outcome=outcome if is_done else "refused", done=is_done, reason=reason, facts={"id": name})


def _query(wanted: dict[str, str | None], limit: int) -> Any:
    fresh = select(
        *(_HOT[name] for name in _COLUMNS),
        literal(_PENDING).label("state"),
        literal(None, _WAITING.due_at.type).label("due_at"),
        literal("").label("error"),
    )
    waiting = select(
        *(_WAITING[name] for name in _COLUMNS), _WAITING.reason.label("state"), _WAITING.due_at, _WAITING.error
    )
    every: Any = union_all(fresh, waiting).subquery().c
    values = {
        every.state: wanted["state"],
        every.topic: wanted["topic"],
        every.type: wanted["type_name"],
        every.key: None if wanted["key"] is None else pauses.unescaped(wanted["key"]),
    }
    where = [column == value for column, value in values.items() if value is not None]
    return select(every).where(*where).order_by(every.recorded_at, every.message_id).limit(limit)


def _row(row: Row[Any], now: datetime) -> tuple[object, ...]:
    due = "-" if row.due_at is None else "now" if row.due_at <= now else f"in {output.ago(row.due_at - now)}"
    age = output.ago(now - row.recorded_at)
    return (row.message_id, row.state, row.topic, row.type, output.text_of(row.key), age, due, row.error or "-")
