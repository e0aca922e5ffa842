"""``outboxkit status --message ID``: where is this message, and why is it still there?

People name a message by what a list printed: the first characters of its id, or of its letter's.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Uuid, and_, literal, select

from outboxkit import outbox, tables
from outboxkit._legible import Lost, legible
from outboxkit._sql import contains_bytes
from outboxkit.errors import DecodeError, OutboxKitError
from outboxkit.headers import from_wire, unpack_headers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ColumnElement, Connection, Row

__all__ = ["find", "id_of", "made_at", "named", "published"]

_LEDGER: Final = tables.outbox_ledger.c
_PAGE: Final = 100
_MAX: Final = 20  # places: a replayed message has several
_CLOCKS: Final = timedelta(minutes=5)  # the application's clock, which the id has, may be ahead of the database's
_VERSION_WITH_TIME: Final = 7
_SHORTEST_PREFIX: Final = 8  # characters, what lists print at least
_ID_DIGITS: Final = 32
_SHOWN: Final = 5  # of several ids


def find(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    """Every place where a message is or was: the outbox, the waiting room, dead letters, and the evidence of brokers.

    Transaction: reads only.

    Index used: of the ledger the one on the time: an id of version 7 tells when its message was made. Of the outbox and
    the waiting room none.
    """
    row_id = outbox.stored_id(message_id)
    return [
        *_unpublished(connection, row_id),
        *_waiting(connection, row_id),
        *_dead(connection, message_id),
        *published(connection, row_id),
    ]


def named(connection: Connection, name: str) -> str:
    """Returns the id of the message that a name means; the name itself when it is an id, or nothing begins so.

    Transaction: reads only. Index used: those of `find`; of the inbox none.

    Args:
        connection: the caller's.
        name: an id, or the first characters of a message's id or of a letter's, eight at least.

    Raises:
        OutboxKitError: several messages are meant.
    """
    if len(name) < _SHORTEST_PREFIX or "\0" in name:
        return name
    found: set[str] = set()
    for one in _beginning(connection, name):
        if one == name:
            return name
        found.add(one)
    if len(found) > 1:
        some = ", ".join(sorted(found)[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        raise OutboxKitError(f"{name} names several messages: give more of the id ({some})")
    return found.pop() if found else name


def _beginning(connection: Connection, name: str) -> Iterator[str]:
    """Yields ids of messages that begin so, or whose letter's id does, with repetitions."""
    for text in (tables.dead_letters.c.message_id, tables.inbox_messages.c.message_id):
        yield from connection.scalars(select(text).where(text.startswith(name, autoescape=True)).distinct().limit(_MAX))
    headers = tables.inbox_waiting.c.headers
    for packed in connection.scalars(select(headers).where(contains_bytes(headers, name.encode())).limit(_PAGE)):
        if (found := id_of(packed)).startswith(name):
            yield found
    digits = name.replace("-", "").lower()
    if len(digits) <= _ID_DIGITS and not set(digits) - set("0123456789abcdef"):
        yield from _between(connection, *(UUID(digits.ljust(_ID_DIGITS, end)) for end in "0f"))


def _between(connection: Connection, first: UUID, last: UUID) -> Iterator[str]:
    letters = tables.dead_letters.c
    yield from connection.scalars(select(letters.message_id).where(letters.id.between(first, last)).limit(_MAX))
    for own in (tables.outbox_messages.c.message_id, tables.outbox_waiting.c.message_id):
        found = connection.scalars(select(legible(own)).where(own.between(first, last)).distinct().limit(_MAX))
        yield from (str(one) for one in found if not isinstance(one, Lost))
    for row in _batches(connection, _window(first, last)):
        yield from {str(one) for one in row.ids if first <= UUID(str(one)) <= last}


def id_of(packed: bytes) -> str:
    """Returns the id in packed headers; empty when they cannot be read."""
    try:
        return from_wire("", None, unpack_headers(bytes(packed)), b"").id
    except DecodeError:
        return ""


def _unpublished(connection: Connection, row_id: UUID) -> list[dict[str, Any]]:
    hot = tables.outbox_messages.c
    columns = map(legible, (hot.topic, hot.type, hot.recorded_at))
    found = connection.execute(select(*columns).where(hot.message_id == row_id).limit(_MAX))
    return [{"place": "outbox", "topic": row.topic, "type": row.type, "since": _text(row.recorded_at)} for row in found]


def _waiting(connection: Connection, row_id: UUID) -> list[dict[str, Any]]:
    waits, stopped = tables.outbox_waiting.c, tables.outbox_stopped_keys.c
    same_key = (waits.topic == stopped.topic) & (waits.key == stopped.key)
    columns = (waits.topic, waits.type, waits.recorded_at, waits.reason, waits.due_at, waits.error)
    statement = (
        select(*map(legible, columns), waits.attempts, stopped.reason.label("stop"))
        .select_from(tables.outbox_waiting)
        .outerjoin(tables.outbox_stopped_keys, same_key)
        .where(waits.message_id == row_id)
        .limit(_MAX)
    )
    return [
        {
            "place": "waiting",
            "topic": row.topic,
            "type": row.type,
            "since": _text(row.recorded_at),
            "reason": row.reason,
            "key": row.stop or "not stopped",
            "attempts": row.attempts,
            "due_at": _text(row.due_at),
            "error": row.error or "",
        }
        for row in connection.execute(statement)
    ]


def _dead(connection: Connection, message_id: str) -> list[dict[str, Any]]:
    letters = tables.dead_letters.c
    found = connection.execute(
        select(letters.id, letters.topic, letters.consumer, letters.state, letters.died_at, letters.failure)
        .where(letters.message_id == message_id)
        .order_by(letters.died_at)
        .limit(_MAX)
    )
    return [
        {
            "place": "dead letter",
            "topic": row.topic,
            "id": str(row.id),
            "consumer": row.consumer or "(relay)",
            "state": row.state,
            "since": _text(row.died_at),
            "failure": row.failure,
        }
        for row in found
    ]


def published(connection: Connection, row_id: UUID) -> list[dict[str, Any]]:
    """Looks into the ledger, one row a batch: by the window of its ids, and by the time that the id tells.

    Transaction: reads only.
    """
    found: list[dict[str, Any]] = []
    for row in _batches(connection, _window(row_id, row_id)):
        ids = [str(one) for one in row.ids]
        if str(row_id) in ids and len(found) < _MAX:
            at = ids.index(str(row_id))
            place = {"place": "broker", "topic": row.topic, "outcome": row.outcome, "since": _text(row.published_at)}
            place["relay"] = str(row.relay)
            found.append({**place, "partition": row.partitions[at], "offset": row.offsets[at]})
    return found


def _window(first: UUID, last: UUID) -> ColumnElement[bool]:
    """The batches that may hold an id from first to last."""
    window = [_LEDGER.min_id <= literal(last, Uuid()), _LEDGER.max_id >= literal(first, Uuid())]
    if (made := made_at(first)) is not None:
        window.append(_LEDGER.published_at >= made - _CLOCKS)
    return and_(*window)


def _batches(connection: Connection, window: ColumnElement[bool]) -> Iterator[Row[Any]]:
    """Yields rows of the ledger, some at a time: a cursor of the server would need a transaction."""
    last = 0
    while rows := connection.execute(
        select(tables.outbox_ledger).where(window, _LEDGER.id > last).order_by(_LEDGER.id).limit(_PAGE)
    ).all():
        yield from rows
        last = rows[-1].id


def made_at(row_id: UUID) -> datetime | None:
    """Returns when a message was made, by its id; None when the id does not tell."""
    if row_id.version != _VERSION_WITH_TIME:
        return None
    return datetime.fromtimestamp((row_id.int >> 80) / 1000, UTC)


def _text(at: datetime | Lost | None) -> str | None:
    return at.isoformat() if isinstance(at, datetime) else None
