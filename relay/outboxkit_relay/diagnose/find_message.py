"""``outboxkit status --message ID``: where is this message, and why is it still there?"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Uuid, and_, literal, select

from outboxkit import outbox, tables

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import ColumnElement, Connection, Row

__all__ = ["find", "made_at", "published"]

_LEDGER: Final = tables.outbox_ledger.c
_PAGE: Final = 100
_MAX: Final = 20  # places: a replayed message has several
_CLOCKS: Final = timedelta(minutes=5)  # the application's clock, which the id has, may be ahead of the database's
_VERSION_WITH_TIME: Final = 7


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


def _unpublished(connection: Connection, row_id: UUID) -> list[dict[str, Any]]:
    hot = tables.outbox_messages.c
    found = connection.execute(select(hot.topic, hot.type, hot.recorded_at).where(hot.message_id == row_id).limit(_MAX))
    return [{"place": "outbox", "topic": row.topic, "type": row.type, "since": _text(row.recorded_at)} for row in found]


def _waiting(connection: Connection, row_id: UUID) -> list[dict[str, Any]]:
    waits, stopped = tables.outbox_waiting.c, tables.outbox_stopped_keys.c
    same_key = (waits.topic == stopped.topic) & (waits.key == stopped.key)
    columns = (waits.topic, waits.type, waits.recorded_at, waits.reason, waits.attempts, waits.due_at, waits.error)
    statement = (
        select(*columns, stopped.reason.label("stop"))
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
    this = literal(row_id, Uuid())
    window = [_LEDGER.min_id <= this, _LEDGER.max_id >= this]
    if (made := made_at(row_id)) is not None:
        window.append(_LEDGER.published_at >= made - _CLOCKS)
    found: list[dict[str, Any]] = []
    for row in _batches(connection, and_(*window)):
        ids = [str(one) for one in row.ids]
        if str(row_id) in ids and len(found) < _MAX:
            at = ids.index(str(row_id))
            place = {"place": "broker", "topic": row.topic, "outcome": row.outcome, "since": _text(row.published_at)}
            place["relay"] = str(row.relay)
            found.append({**place, "partition": row.partitions[at], "offset": row.offsets[at]})
    return found


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


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()
