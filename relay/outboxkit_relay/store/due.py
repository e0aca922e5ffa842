"""What of the waiting room may go out: heads that are tried again, what stands behind heads that went, the scheduled.

All are Core statements in a transaction of the caller that `outboxkit.outbox.fence` has fenced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, exists, func, insert, or_, select

from outboxkit import tables
from outboxkit._sql import any_of, database_now
from outboxkit.rows import NOTHING_PAUSED, PauseSet, Row
from outboxkit_relay.store.stopped_keys import COPIED, row_columns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sqlalchemy import Connection, Select

__all__ = ["due_rows", "enqueue_scheduled", "is_due"]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys
_NOW: Final = select(database_now()).scalar_subquery()  # once, so that the index on due_at can serve
_SOMETHING_IS_DUE: Final = select(
    or_(
        exists().where(_WAITING.c.due_at <= _NOW),
        exists().where(_STOPPED.c.reason == "retry", _STOPPED.c.due_at <= _NOW),
    ),
)


def is_due(connection: Connection) -> bool:
    """Whether some message that waits may be due, of any shard: so cheap that it can be asked many times a second.

    Transaction: joins the caller's; reads only.
    """
    return bool(connection.execute(_SOMETHING_IS_DUE).scalar_one())


def due_rows(
    connection: Connection,
    shards: Collection[int],
    *,
    without: Collection[str],
    limit: int,
    holds: PauseSet = NOTHING_PAUSED,
    max_bytes: int = 16 << 20,
    whenever: bool = False,
) -> list[Row]:
    """Waiting rows whose time has come (or will come, ``whenever``): heads of stopped keys, and rows without a key.

    At most one row a key. No more of them than have payloads of so many bytes together, but one. What operators have
    paused is not among them, and what stands behind it in its key is no head.

    Transaction: joins the caller's; reads only.
    """
    due = _within(connection.execute(_due(shards, without, holds, whenever=whenever).limit(limit)), max_bytes)
    rows = select(*row_columns()).where(_WAITING.c.id.in_(due)).order_by(_WAITING.c.position)
    return [Row.of(*row) for row in connection.execute(rows)] if due else []


def _due(shards: Collection[int], without: Collection[str], holds: PauseSet, *, whenever: bool) -> Select[Any]:
    """Id and size of what may go out, in order."""
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
        *([] if whenever else [_STOPPED.c.due_at <= database_now()]),
    )
    now_due = [] if whenever else [waits.due_at <= database_now()]
    alone = and_(waits.key.is_(None), waits.reason == "retry", *now_due)
    return (
        select(waits.id, func.length(waits.payload))
        .outerjoin(_STOPPED, key_is_due)
        .where(
            any_of(waits.shard, shards),
            waits.topic.not_in(sorted(without)),
            or_(alone, and_(_STOPPED.c.topic.is_not(None), waits.reason != "scheduled", is_head)),
            *_not_held(holds),
        )
        .order_by(waits.position)
    )


def _within(sized: Iterable[Any], max_bytes: int) -> list[int]:
    """The first ids whose sizes fit together, at least one."""
    fitting: list[int] = []
    size = 0
    for waiting_id, length in sized:
        size += length
        if fitting and size > max_bytes:
            break
        fitting.append(waiting_id)
    return fitting


def _not_held(holds: PauseSet) -> list[Any]:
    types = [_WAITING.c.type.not_in(sorted(holds.types))] if holds.types else []
    keys = [~and_(_WAITING.c.topic == topic, _WAITING.c.key == key) for topic, key in sorted(holds.keys)]
    return [*types, *(or_(_WAITING.c.key.is_(None), key) for key in keys)]


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
                any_of(_WAITING.c.shard, shards),
                _WAITING.c.due_at <= database_now(),
            )
            .order_by(_WAITING.c.due_at, _WAITING.c.id)
            .limit(limit),
        )
    ]
    if due:
        mine = _WAITING.c.id.in_(due)
        rows = select(*(_WAITING.c[name] for name in COPIED)).where(mine).order_by(_WAITING.c.due_at, _WAITING.c.id)
        connection.execute(insert(_HOT).from_select(COPIED, rows))
        connection.execute(delete(_WAITING).where(mine))
    return len(due)
