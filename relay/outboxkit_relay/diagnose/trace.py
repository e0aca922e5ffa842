"""Trace: what happened to a message, to an entity's messages, to a conversation? One timeline across all tables.

Keys, correlation and trace ids are known while a message is stored: in the outbox, in a waiting room, as a dead letter.
Of a message that was published and handled the ledger and the inbox keep the id: that always leads to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Connection, Table, or_, select

from outboxkit import outbox, tables
from outboxkit._legible import Lost, legible
from outboxkit._sql import contains_bytes
from outboxkit.errors import DecodeError
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.outbox.pauses import unescaped
from outboxkit_relay.diagnose.steps import Step, emitted, steps_of

if TYPE_CHECKING:
    from outboxkit.message import Message

__all__ = ["Trace", "trace"]

_STORES: Final = (tables.outbox_messages, tables.outbox_waiting, tables.inbox_waiting, tables.dead_letters)
_SAGAS: Final = tables.outbox_sagas.c
_MAX_ROWS: Final = 1_000  # of one table, for one question
_LAST: Final = datetime.max.replace(tzinfo=UTC)
_ORDER: Final = ("emitted", "published", "failed", "handled", "died", "operator", "replay", "closed", "waits")

Condition = Callable[[Table], ColumnElement[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The answer to one question.

    Attributes:
        asked: the id, key, correlation id or trace id.
        messages: what is known of the messages themselves, without payloads; parents before children.
        steps: the timeline, oldest first; what is so now comes last.
        is_whole: whether no message was left out by the limit.
    """

    asked: str
    messages: tuple[Message, ...]
    steps: tuple[Step, ...]
    is_whole: bool = True


def trace(connection: Connection, asked: str, *, limit: int = 100) -> Trace:
    """Follows a message id, a letter's id, a key, a correlation id or a W3C trace id through all tables.

    What a message caused belongs to it: messages whose causation leads to one that was found.

    Transaction: joins the caller's; reads only. Index used: see `outboxkit_relay.diagnose.steps.steps_of`; the stored
    messages are searched without one.

    Args:
        connection: the caller's.
        asked: as people have it.
        limit: at most so many messages.
    """
    name = asked.encode("utf-8", "surrogateescape").decode("utf-8", "replace").replace("\0", "\ufffd")
    if not name:
        return Trace(asked=asked, messages=(), steps=())
    found = {one.id: one for one in _asked_for(connection, name, unescaped(asked))}
    ids = list(found) or [name]
    for parent in ids:  # grows: children of children
        if len(ids) >= limit:
            break
        for child in _children(connection, parent):
            if child.id not in found and child.id != name:
                ids.append(child.id)
            found.setdefault(child.id, child)
    steps = [emitted(found[one]) for one in ids[:limit] if one in found]
    for one in ids[:limit]:
        steps += steps_of(connection, one)
    return Trace(
        asked=asked,
        messages=tuple(found[one] for one in ids[:limit] if one in found),
        steps=(*sorted(steps, key=_when), *_sagas(connection, name)),
        is_whole=len(ids) < limit,
    )


def _when(step: Step) -> tuple[datetime, int]:
    """At equal times causes stand before effects."""
    return step.at or _LAST, _ORDER.index(step.what) if step.what in _ORDER else 0


# --- messages that are stored ------------------------------------------------------------------------------------


def _asked_for(connection: Connection, asked: str, key: bytes) -> Iterator[Message]:
    def condition(table: Table) -> ColumnElement[bool]:
        by_id = [table.c.message_id == asked, table.c.id == _uuid(asked)] if table is tables.dead_letters else []
        if table in (tables.outbox_messages, tables.outbox_waiting):
            by_id = [table.c.message_id == outbox.stored_id(asked)]
        return or_(table.c.key == key, contains_bytes(table.c.headers, asked.encode()), *by_id)

    for number, message in _stored(connection, condition):
        trace_id = (message.header("traceparent") or "").split("-")[1:2]
        names = (message.id, message.correlation_id, number, *trace_id)
        if message.id and (message.key == key or asked in names):
            yield message


def _children(connection: Connection, parent: str) -> Iterator[Message]:
    if not parent:
        return
    for _, message in _stored(connection, lambda table: contains_bytes(table.c.headers, parent.encode())):
        if message.id and message.causation_id == parent:
            yield message


def _stored(connection: Connection, condition: Condition) -> Iterator[tuple[str, Message]]:
    """Yields stored messages with the number of their letter, if they are one; what cannot be read is left out."""
    for table in _STORES:
        is_letter = table is tables.dead_letters
        names = ("topic", "key", "headers", "message_id", "occurred_at", *(["id"] if is_letter else []))
        columns: list[Any] = [legible(table.c[name]) for name in names if name in table.c]
        for row in connection.execute(select(*columns).where(condition(table)).limit(_MAX_ROWS)):
            found = row._asdict()
            message, occurred_at = _read(row, str(found.get("message_id", ""))), found.get("occurred_at")
            if message.occurred_at is None and not isinstance(occurred_at, Lost):
                message = replace(message, occurred_at=occurred_at)
            yield str(row.id) if is_letter else "", message


def _read(row: Any, known_id: str) -> Message:
    key = None if row.key is None else bytes(row.key)
    try:
        message = from_wire(row.topic, key, unpack_headers(bytes(row.headers)), b"")
    except DecodeError:
        message = from_wire(row.topic, key, (), b"")
    return message if message.id else replace(message, id=known_id)


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


# --- sagas -------------------------------------------------------------------------------------------------------


def _sagas(connection: Connection, asked: str) -> Iterable[Step]:
    mine = or_(_SAGAS.correlation_id == asked, _SAGAS.key == asked)
    for row in connection.execute(select(tables.outbox_sagas).where(mine).limit(_MAX_ROWS)):
        text = f"the saga {row.saga} of {row.key} is {row.status} at {row.step}"
        facts = {"saga": row.saga, "key": row.key, "status": row.status, "step": row.step}
        yield Step(at=None, message_id="", what="waits", text=text, facts=facts)
