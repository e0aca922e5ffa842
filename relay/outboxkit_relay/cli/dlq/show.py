"""Dead letters on the command line as they are listed and shown. Payloads are masked unless revealed."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from outboxkit.dead_letters import DeadLetter, Group, Side, State, progress
from outboxkit.errors import DecodeError
from outboxkit.headers import unpack_headers
from outboxkit_relay.cli.console import output

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["as_json", "late", "show", "show_cause", "show_groups", "show_list"]

_OUR_HEADERS: Final = ("ce_", "outboxkit-", "content-type")
_COLUMNS: Final = ("ID", "STATE", "CONSUMER", "TYPE", "KEY", "ERROR", "DIED")
_GROUPS: Final = ("GROUP", "COUNT", "LAST HOUR", "LAST", "CONSUMER", "TYPE", "ERROR", "NOTE")


def show_list(found: Sequence[DeadLetter], reasons: Mapping[UUID, str]) -> None:
    """Prints a table, one line a letter; ``reasons`` tells why some are still being replayed."""
    now = datetime.now(UTC)
    output.table(_COLUMNS, [_row(letter, now, reasons.get(letter.id, "")) for letter in found])


def show_groups(found: Sequence[Group]) -> None:
    """Prints a table, one line a group."""
    now = datetime.now(UTC)
    output.table(_GROUPS, [_group_row(group, now) for group in found], whole=("GROUP",))


def late(connection: Connection, found: Sequence[DeadLetter]) -> dict[UUID, str]:
    """Says of each replay that nobody has closed for long where it is.

    Transaction: joins the caller's; reads only.
    """
    before = datetime.now(UTC) - progress.LATE
    return {
        letter.id: progress.why_open(connection, letter)
        for letter in found
        if letter.state is State.REPLAYING and (letter.replaying_since or before) <= before
    }


def _group_row(group: Group, now: datetime) -> tuple[object, ...]:
    trend = group.last_hour - group.hour_before
    recent = f"{group.last_hour:,}" + (f" ({trend:+,})" if trend else "")
    note = " ".join(filter(None, (group.note, f"({group.owner})" if group.owner else "")))
    last = f"{output.ago(now - group.last_seen)} ago"
    error = group.error if group.error.startswith(group.error_class) else f"{group.error_class}: {group.error}"
    return (group.group, group.count, recent, last, group.consumer or "(relay)", group.type, error, note)


def _row(letter: DeadLetter, now: datetime, open_because: str) -> tuple[object, ...]:
    died = output.ago(now - letter.died_at) + " ago" if letter.died_at else "-"
    who = letter.consumer or "(relay)"
    told = open_because or _summary(letter)
    return (str(letter.id)[:8], letter.state.value, who, letter.type, output.text_of(letter.key), told, died)


def show(letter: DeadLetter, content: str | None, open_because: str = "") -> None:
    """Prints everything about a letter: what it is, why it died, what would repair it."""
    who = letter.consumer if letter.side is Side.CONSUMER else "the relay"
    output.field(
        "letter", f"{letter.id}  {letter.state.value}" + (f", replay {letter.generation}" if letter.generation else "")
    )
    if open_because:
        since = letter.replaying_since or datetime.now(UTC)
        output.field("replaying", f"for {output.ago(datetime.now(UTC) - since)}: {open_because}")
    known = f"{letter.message_id or '(no id)'}  {letter.type or '(no type)'}"
    output.field("message", f"{known}  key {'(none)' if letter.key is None else output.text_of(letter.key)}")
    output.field("from", f"{letter.origin or letter.topic}")
    output.field(
        "gave up",
        f"{who}, after {letter.attempts} attempt{'s' * (letter.attempts != 1)}, at {output.instant(letter.died_at)}",
    )
    output.field("failure", f"{letter.failure.value} in {letter.stage.value}: {letter.error_class}")
    output.field("error", letter.error)
    if letter.path:
        output.field("field", letter.path + (f" (byte {letter.byte_offset})" if letter.byte_offset is not None else ""))
    for problem in letter.problems or ():
        output.field("problem", f"{problem.get('field', '')}: {problem.get('message', '')}".lstrip(": "))
        if problem.get("fix"):
            output.field("fix", problem["fix"])
    for name in ("constraint", "table", "column", "sqlstate"):
        if name in (letter.details or {}):
            output.field(name, letter.details[name])
    output.field("group", letter.group)
    _show_content(letter, content)


def show_cause(letter: DeadLetter) -> None:
    """Prints the chain of errors and the places where it broke, those in the application's own code first."""
    details = letter.details or {}
    if not details.get("chain"):
        return
    for number, class_name in enumerate(details["chain"]):
        output.field("error" if not number else "caused by", class_name)
    for text in details.get("texts", ("masked, it may quote data: Consumer(keep_error_text=True) keeps it",)):
        output.field("text", text)
    own = details.get("own", ())
    for place in own:
        output.field("your code", place)
    for place in details.get("places", ()):
        if place not in own:
            output.field("place", place)


def _show_content(letter: DeadLetter, content: str | None) -> None:
    for name, value in _headers(letter):
        shown = (
            value.decode("utf-8", "backslashreplace")
            if content is not None or name.startswith(_OUR_HEADERS)
            else "(masked)"
        )
        output.field("header", f"{name}: {shown}")
    output.field("payload", _masked(letter.payload) if content is None else content)


def as_json(letter: DeadLetter, content: str | None = None) -> dict[str, object]:
    """Returns a letter as JSON has it; the payload only when revealed."""
    hidden = ("payload", "headers", "key", "problems", "details")
    values = {field.name: getattr(letter, field.name) for field in fields(letter) if field.name not in hidden}
    headers = {
        name: value.decode("utf-8", "backslashreplace")
        for name, value in _headers(letter)
        if content is not None or name.startswith(_OUR_HEADERS)
    }
    extra = {"payload": content} if content is not None else {"payload_bytes": len(letter.payload or b"")}
    return {
        **output.plain(values),
        "key": output.text_of(letter.key),
        "problems": letter.problems,
        "details": letter.details,
        "headers": headers,
        **extra,
    }


def _headers(letter: DeadLetter) -> list[tuple[str, bytes]]:
    try:
        return unpack_headers(letter.headers)
    except DecodeError:  # whatever is wrong with one letter, it must not hide the others
        return [("(unreadable)", letter.headers)]


def _summary(letter: DeadLetter) -> str:
    first = next(iter(letter.problems or ()), None)
    if first and first.get("field"):
        return f"{first['field']}: {first.get('message', '')}"
    told = letter.error or letter.error_class
    return told if told.startswith(letter.error_class) else f"{letter.error_class}: {told}"


def _masked(payload: bytes | None) -> str:
    if payload is None:
        return "(none: a tombstone)"
    return f"{len(payload):,} bytes, sha256 {hashlib.sha256(payload).hexdigest()[:12]}…; --reveal shows it"
