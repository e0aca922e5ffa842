"""The waiting room: messages that wait for their next try, for the head of their key, or for their instant.

When a message fails for reasons of its own, its key is *stopped*: a row in ``outbox_stopped_keys``, and the message
(the head) and its followers in ``outbox_waiting`` under their old positions, in which order they leave again. A head
that became a dead letter leaves its followers *parked*. A message without a key waits alone.

All verbs are Core statements in a transaction of the caller that `outboxkit.outbox.fence` has fenced.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, exists, func, insert, literal, or_, select, update

from outboxkit import tables
from outboxkit.dialects import dialect_of
from outboxkit.message import Row, shard_of
from outboxkit.outbox import shards_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection

__all__ = [
    "Hold",
    "StoppedKey",
    "bring_back",
    "bury",
    "due_rows",
    "enqueue_scheduled",
    "go_on",
    "hold",
    "join_the_line",
    "park",
    "set_aside",
    "stopped_keys",
]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys

StoppedKey = tuple[str, bytes]  #: (topic, key)

_ERROR_TEXT: Final = 500  # characters: enough to understand, never a payload
_COPIED: Final = [column.name for column in _HOT.columns if column.name not in ("xid", "position")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A head that failed and waits for its next try, with the followers that must wait behind it.

    Attributes:
        row: the head.
        failure: its class.
        text: what went wrong.
        attempts: tries so far.
        delay: time until the next one.
        followers: later rows of its key that were read, but not acknowledged.
    """

    row: Row
    failure: str
    text: str
    attempts: int
    delay: timedelta
    followers: tuple[Row, ...] = ()


def stopped_keys(connection: Connection, shards: Collection[int]) -> frozenset[StoppedKey]:
    """The keys of these shards whose order is held.

    Transaction: joins the caller's; reads only.
    """
    found = connection.execute(select(_STOPPED.c.topic, _STOPPED.c.key).where(_STOPPED.c.shard.in_(sorted(shards))))
    return frozenset((topic, bytes(key)) for topic, key in found)


def due_rows(
    connection: Connection,
    shards: Collection[int],
    *,
    without: Collection[str],
    limit: int,
) -> list[Row]:
    """Waiting rows whose time has come: heads of stopped keys, and rows without a key. At most one row a key.

    Transaction: joins the caller's; reads only.
    """
    waits = _WAITING.c
    ahead = _WAITING.alias()
    is_head = ~exists().where(
        ahead.c.topic == waits.topic,
        ahead.c.key == waits.key,
        ahead.c.reason != "scheduled",
        ahead.c.position < waits.position,
    )
    key_is_due = and_(
        _STOPPED.c.topic == waits.topic,
        _STOPPED.c.key == waits.key,
        _STOPPED.c.reason == "retry",
        _STOPPED.c.due_at <= tables.database_now(),
    )
    alone = and_(waits.key.is_(None), waits.reason == "retry", waits.due_at <= tables.database_now())
    statement = (
        select(
            waits.position,
            waits.message_id,
            waits.topic,
            waits.key,
            waits.type,
            waits.kind,
            waits.payload,
            waits.headers,
            waits.recorded_at,
            waits.expires_at,
            waits.attempts,
            waits.id,
        )
        .outerjoin(_STOPPED, key_is_due)
        .where(
            waits.shard.in_(sorted(shards)),
            waits.topic.not_in(sorted(without)),
            or_(alone, and_(_STOPPED.c.topic.is_not(None), waits.reason != "scheduled", is_head)),
        )
        .order_by(waits.position)
        .limit(limit)
    )
    return [Row._make(row) for row in connection.execute(statement)]


def enqueue_scheduled(connection: Connection, shards: Collection[int], limit: int) -> int:
    """Moves scheduled messages that are due into the hot table: their order is their due time.

    Transaction: the caller's, fenced.
    """
    due = [
        row.id
        for row in connection.execute(
            select(_WAITING.c.id)
            .where(
                _WAITING.c.reason == "scheduled",
                _WAITING.c.shard.in_(sorted(shards)),
                _WAITING.c.due_at <= tables.database_now(),
            )
            .order_by(_WAITING.c.due_at, _WAITING.c.id)
            .limit(limit),
        )
    ]
    if due:
        mine = _WAITING.c.id.in_(due)
        rows = select(*(_WAITING.c[name] for name in _COPIED)).where(mine).order_by(_WAITING.c.due_at, _WAITING.c.id)
        connection.execute(insert(_HOT).from_select(_COPIED, rows))
        connection.execute(delete(_WAITING).where(mine))
    return len(due)


def hold(connection: Connection, held: Hold) -> None:
    """Stops the key of a failed head until its next try; a head without a key waits alone.

    Transaction: the caller's, fenced.
    Guarantee: head and followers keep their positions, and nothing of the key is read as fresh meanwhile.
    """
    row, due_at = held.row, tables.database_now(held.delay)
    failed = {"attempts": held.attempts, "error": f"{held.failure}: {held.text}"[:_ERROR_TEXT], "due_at": due_at}
    if row.waiting_id is None:
        set_aside(connection, [row], reason="retry")
        connection.execute(update(_WAITING).where(_same(row)).values(**failed))
    else:
        connection.execute(update(_WAITING).where(_WAITING.c.id == row.waiting_id).values(**failed))
    set_aside(connection, held.followers)
    if row.key is not None:
        _stop(connection, row, reason="retry", attempts=held.attempts, due_at=due_at)


def park(connection: Connection, head: Row, followers: Sequence[Row]) -> None:
    """Removes a head that became a dead letter; its followers stay waiting until an operator decides.

    Transaction: the caller's, fenced; the same one that writes the dead letter.
    """
    bury(connection, head)
    set_aside(connection, followers)
    if head.key is not None:
        _stop(connection, head, reason="parked", attempts=0, due_at=None)


def bury(connection: Connection, head: Row) -> None:
    """Takes a dead row out of the way; its dead letter is written by the caller in the same transaction.

    Transaction: the caller's, fenced.
    """
    if head.waiting_id is None:
        dialect_of(connection).remove(connection, [(head.position, head.id)])
    else:
        connection.execute(delete(_WAITING).where(_WAITING.c.id == head.waiting_id))


def set_aside(connection: Connection, rows: Iterable[Row], reason: str = "follower") -> None:
    """Moves fresh rows of stopped keys into the waiting room, under their positions.

    Transaction: the caller's, fenced.
    """
    positions = [row.position for row in rows if row.waiting_id is None]
    if positions:
        chosen = _HOT.c.position.in_(positions)
        columns = ["position", *_COPIED]
        rows_of = select(*(_HOT.c[name] for name in columns), literal(reason)).where(chosen)
        connection.execute(insert(_WAITING).from_select([*columns, "reason"], rows_of))
        connection.execute(delete(_HOT).where(chosen))


def join_the_line(connection: Connection, rows: Sequence[Row]) -> None:
    """Moves fresh rows of stopped keys behind those that wait; a key that was freed meanwhile is stopped again.

    Transaction: the caller's, fenced.
    """
    set_aside(connection, rows)
    for row in rows:
        this = and_(_STOPPED.c.topic == row.topic, _STOPPED.c.key == row.key)
        if connection.execute(select(_STOPPED.c.topic).where(this)).one_or_none() is None:
            _stop(connection, row, reason="retry", attempts=0, due_at=tables.database_now())


def go_on(connection: Connection, keys: Iterable[StoppedKey]) -> None:
    """Lets keys whose head is gone continue: the next follower is due now, and a key with none left is free.

    Transaction: the caller's, fenced.
    """
    for topic, key in keys:
        this = and_(_STOPPED.c.topic == topic, _STOPPED.c.key == key)
        left = select(func.min(_WAITING.c.position)).where(
            _WAITING.c.topic == topic,
            _WAITING.c.key == key,
            _WAITING.c.reason != "scheduled",
        )
        position = connection.execute(left).scalar_one()
        if position is None:
            connection.execute(delete(_STOPPED).where(this))
        else:
            due = {"position": position, "reason": "retry", "attempts": 0, "due_at": tables.database_now()}
            connection.execute(update(_STOPPED).where(this).values(request=None, **due))


def bring_back(connection: Connection, position: int | None, message: dict[str, Any]) -> None:
    """Puts a repaired head back at its old position, due now, in front of its followers.

    Transaction: the caller's, fenced.

    Args:
        connection: the caller's.
        position: where the head stood.
        message: the columns of the row.
    """
    topic, key = message["topic"], message["key"]
    connection.execute(
        insert(_WAITING).values(position=position, reason="retry", due_at=tables.database_now(), attempts=0, **message),
    )
    go_on(connection, [(topic, key)])


def _same(row: Row) -> Any:
    return and_(_WAITING.c.position == row.position, _WAITING.c.message_id == row.id)


def _stop(connection: Connection, row: Row, *, reason: str, attempts: int, due_at: Any) -> None:
    shard = shard_of(row.topic, row.key, row.id, shards_of(connection))
    values = {"position": row.position, "reason": reason, "attempts": attempts, "due_at": due_at}
    this = and_(_STOPPED.c.topic == row.topic, _STOPPED.c.key == row.key)
    if not connection.execute(update(_STOPPED).where(this).values(request=None, **values)).rowcount:
        connection.execute(insert(_STOPPED).values(topic=row.topic, key=row.key, shard=shard, **values))
