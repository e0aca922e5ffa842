"""``outboxkit messages``: what waits in the outbox, is no longer wanted, or goes to a mistyped destination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import click
from sqlalchemy import literal, select, union_all

from outboxkit import outbox, tables
from outboxkit._legible import Lost, flaw_of, legible
from outboxkit.errors import DecodeError
from outboxkit.headers import unpack_headers
from outboxkit.outbox import pauses
from outboxkit.rows import WaitReason
from outboxkit_relay.cli.console import database, output
from outboxkit_relay.cli.console.change import Change, Result, asking, confirm_and_apply
from outboxkit_relay.cli.console.operator import who
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.store import unpublished
from outboxkit_relay.store.unpublished import PENDING, Unpublished

if TYPE_CHECKING:
    from sqlalchemy import Connection, Row

    from outboxkit_relay.cli.main import Invocation

__all__ = ["command"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_COLUMNS: Final = ("message_id", "topic", "key", "type", "kind", "recorded_at")
_OUR_HEADERS: Final = ("ce_", "outboxkit-", "content-type")


@click.group()
def command() -> None:
    """See what waits in the outbox; cancel what is scheduled, send elsewhere or give up what is pending.

    Payloads are not shown. A message that is out already is found by `outboxkit status --message ID`.
    """


@command.command("list")
@click.option("--state", type=click.Choice([PENDING, *(reason.value for reason in WaitReason)]), help="Why it waits.")
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
            output.print_json({**output.plain(_told(row)), "key": output.text_of(row.key)})
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
        *(_HOT[name] for name in (*_COLUMNS, "position")),
        literal(PENDING).label("state"),
        literal(None, _WAITING.due_at.type).label("due_at"),
        literal("").label("error"),
    )
    waiting = select(
        *(_WAITING[name] for name in _COLUMNS),
        _WAITING.id,
        _WAITING.reason.label("state"),
        _WAITING.due_at,
        _WAITING.error,
    )
    every: Any = union_all(fresh, waiting).subquery().c
    values = {
        every.state: wanted["state"],
        every.topic: wanted["topic"],
        every.type: wanted["type_name"],
        every.key: None if wanted["key"] is None else pauses.unescaped(wanted["key"]),
    }
    where = [column == value for column, value in values.items() if value is not None]
    shown = [every.position, *(legible(column) for column in every if column is not every.position)]
    return select(*shown).where(*where).order_by(every.recorded_at, every.message_id).limit(limit)


def _told(row: Row[Any]) -> dict[str, Any]:
    """The columns of a row; of one that cannot be sent as it is, the error says where it stands and why."""
    told = row._asdict()
    position, flaw = told.pop("position"), flaw_of(told)
    place = unpublished.place_of(row.state, position)
    return told | {"error": f"{place}: {flaw}" if flaw else told["error"]}


def _row(row: Row[Any], now: datetime) -> tuple[object, ...]:
    told = _told(row)
    names = (told[name] for name in ("message_id", "state", "topic", "type"))
    age = "-" if isinstance(row.recorded_at, Lost) else output.ago(now - row.recorded_at)
    return (*names, output.text_of(row.key), age, _due(row.due_at, now), told["error"] or "-")


def _due(at: datetime | Lost | None, now: datetime) -> str:
    if at is None or isinstance(at, Lost):
        return "-"
    return "now" if at <= now else f"in {output.ago(at - now)}"


# --- what is pending ---------------------------------------------------------------------------------------------


def _mending(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what `redirect` and `discard` take."""
    for decorate in (
        click.pass_obj,
        asking,
        click.option("--why", required=True, metavar="TEXT", help="The reason, for the audit log."),
        click.option(
            "--limit", default=1_000, show_default=True, type=click.IntRange(1, 100_000), help="At most so many."
        ),
        click.option("--topic", help="All of this destination."),
        click.argument("ids", metavar="[ID]...", nargs=-1),
    ):
        function = decorate(function)
    return function


@command.command("redirect")
@click.option("--to", required=True, metavar="TOPIC", help="The destination that is meant.")
@_mending
def redirect(invocation: Invocation, /, ids: Sequence[str], *, to: str, **options: Any) -> int:
    """Send unpublished messages to another destination, in their order.

    A mistyped destination is mended here. A message that a relay may have at the broker is refused: pause its
    destination first. It keeps its id, its key and its bytes.
    """
    verb = _Verb("redirect", f"redirected to {to}", partial(unpublished.redirect, to=to))
    return _mend(invocation, verb, ids, options)


@command.command("discard")
@_mending
def discard(invocation: Invocation, /, ids: Sequence[str], **options: Any) -> int:
    """Give unpublished messages up: each becomes a discarded dead letter.

    A message that a relay may have at the broker is refused: pause its destination first.
    """
    return _mend(invocation, _Verb("discard", "discarded", unpublished.discard), ids, options)


@dataclass(frozen=True, slots=True)
class _Verb:
    """A change of unpublished messages: its name, its result in words, and the function that does it."""

    name: str
    outcome: str
    change: Callable[..., set[UUID]]


def _mend(invocation: Invocation, verb: _Verb, ids: Sequence[str], options: dict[str, Any]) -> int:
    topic, limit, why = (options.pop(name) for name in ("topic", "limit", "why"))
    if bool(ids) == (topic is not None):
        raise click.UsageError("give the ids of messages, or --topic")
    rest = invocation.settings.relay.lease / 3 + invocation.settings.relay.patience

    def look(connection: Connection) -> list[Unpublished]:
        return unpublished.find(connection, ids=ids, topic=topic, rest=rest, limit=limit)

    with database.reading(invocation) as connection:
        found = look(connection)
    if topic is not None and not found:
        click.echo(f"no unpublished message goes to {output.safe(topic)}: nothing to do", err=True)
        return Exit.OK
    wanted = {one.id for one in found if not one.refusal}
    unknown = [one for one in dict.fromkeys(ids) if outbox.stored_id(one) not in {each.id for each in found}]

    def apply() -> list[Result]:
        with database.writing(invocation) as connection:
            allowed = [one.id for one in look(connection) if not one.refusal and one.id in wanted]
            done = verb.change(connection, allowed, by=who(), why=why)
        return [*(_mended(one, verb.outcome, done=one.id in done) for one in found), *map(_unknown, unknown)]

    change = Change(
        expected=[
            *(_mended(one, f"would be {verb.outcome}", done=not one.refusal) for one in found),
            *map(_unknown, unknown),
        ],
        question=f"{verb.name.capitalize()} {output.count(len(wanted), 'message')}?",
        apply=apply,
    )
    return confirm_and_apply(change, **options)


def _mended(one: Unpublished, outcome: str, *, done: bool) -> Result:
    reason = "" if done else one.refusal or "it was published meanwhile"
    name = str(one.id)
    facts = {"id": name, "topic": one.topic, "state": one.place}
    return Result(name=name, outcome=outcome if done else "refused", done=done, reason=reason, facts=facts)


def _unknown(name: str) -> Result:
    reason = "it is not in the outbox: outboxkit trace tells where it is"
    return Result(name=name, outcome="refused", done=False, reason=reason, facts={"id": name})


@command.command("show")
@click.argument("message_id", metavar="ID")
@click.option("--reveal", is_flag=True, help="Also the payload and all headers; the audit log says who looked.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def show(invocation: Invocation, message_id: str, *, reveal: bool, as_json: bool) -> Exit:
    """Show one unpublished message: its place, its headers, the size of its payload.

    Of its id the first characters are enough, as lists print them.
    """
    with database.writing(invocation) if reveal else database.reading(invocation) as connection:
        row = _stored(connection, message_id) or _stored(connection, find_message.named(connection, message_id))
        if row is not None and reveal:
            entry = {"who": who(), "action": "messages.reveal", "target": str(row.message_id)}
            connection.execute(tables.outbox_audit.insert().values(**entry))
    if row is None:
        click.echo(f"{output.safe(message_id)} is not in the outbox: `outboxkit trace` tells where it is", err=True)
        return Exit.PROBLEMS
    told = _described(row, reveal=reveal)
    if as_json:
        output.print_json(told)
        return Exit.OK
    for name, value in told.items():
        for line in [f"{key}: {text}" for key, text in value.items()] if isinstance(value, dict) else [value]:
            shown = output.instant(line) if isinstance(line, datetime) else line
            output.field(name.replace("_", " "), "-" if shown is None else shown)
    return Exit.OK


def _stored(connection: Connection, message_id: str) -> Row[Any] | None:
    for table in (tables.outbox_messages, tables.outbox_waiting):
        mine = table.c.message_id == outbox.stored_id(message_id)
        found = connection.execute(select(*map(legible, table.c)).where(mine).limit(1)).first()
        if found is not None:
            return found
    return None


def _described(row: Row[Any], *, reveal: bool) -> dict[str, Any]:
    try:
        headers = unpack_headers(bytes(row.headers))
    except DecodeError:
        headers = [("(unreadable)", bytes(row.headers))]
    waiting = {name: getattr(row, name, None) for name in ("due_at", "attempts", "error")}
    payload = bytes(row.payload)
    return {
        "message": str(row.message_id),
        "state": getattr(row, "reason", PENDING),
        "topic": row.topic,
        "key": output.text_of(row.key),
        "type": row.type,
        "recorded_at": row.recorded_at,
        **{name: value for name, value in waiting.items() if value is not None},
        "headers": {name: output.text_of(value) for name, value in headers if reveal or name.startswith(_OUR_HEADERS)},
        "payload": output.text_of(payload) if reveal else f"{len(payload):,} bytes; --reveal shows it",
    }
