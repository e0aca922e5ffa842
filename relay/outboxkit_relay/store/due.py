"""Due messages: selects waiting messages that may be published now: retries, followers whose head has gone, scheduled.

All are Core statements in a transaction of the caller that `outboxkit.outbox.fence` has fenced.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, exists, func, insert, or_, select, union_all
from sqlalchemy.exc import DBAPIError

from outboxkit import dialects, tables
from outboxkit._sql import any_of, database_now
from outboxkit.rows import NOTHING_PAUSED, PauseSet, Row, StopReason, WaitReason, exact
from outboxkit_relay.store import burial, salvage
from outboxkit_relay.store.stopped_keys import COPIED, row_columns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import CTE, Connection, Select

__all__ = ["due_rows", "enqueue_scheduled", "is_due"]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys
_NOW: Final = select(database_now()).scalar_subquery()  # once, so that the index on due_at can serve
_SOMETHING_IS_DUE: Final = select(
    or_(
        exists().where(_WAITING.c.due_at <= _NOW),
        exists().where(_STOPPED.c.reason == StopReason.RETRY, _STOPPED.c.due_at <= _NOW),
    ),
)


def is_due(connection: Connection) -> bool:
    """Tells whether a waiting message may be due, of any shard: cheap enough to ask many times a second.

    Transaction: joins the caller's; reads only.
    """
    return bool(connection.execute(_SOMETHING_IS_DUE).scalar_one())


def due_rows(
    connection: Connection,
    shards: Collection[int],
    *,
    without: Collection[str],
    limit: int,
    paused: PauseSet = NOTHING_PAUSED,
    max_bytes: int = 16 << 20,
    whenever: bool = False,
) -> tuple[list[Row], dict[int, str]]:
    """Returns waiting rows that are due (or will be, ``whenever``): heads of stopped keys, and rows without a key.

    Beside them the flaws of those that cannot be read as they are, by position.

    At most one row per key, and at most ``max_bytes`` of payload in total (always at least one row). Paused rows are
    skipped, and so is everything behind them in the same key.

    Transaction: joins the caller's; reads only, under a savepoint.
    """
    due = _within(connection.execute(_due(shards, without, paused, whenever=whenever).limit(limit)), max_bytes)
    return salvage.rows_of(connection, due, functools.partial(_stored, connection)) if due else ([], {})


def _stored(connection: Connection, ids: Sequence[int]) -> list[Row]:
    rows = select(*row_columns()).where(_WAITING.c.id.in_(ids)).order_by(_WAITING.c.position)
    # All at once: of a file, a statement that a bad row interrupts would go on reading, and let nobody write meanwhile.
    return [_exact(Row.stored(*row)) for row in connection.execute(rows).all()]


def _exact(row: Row) -> Row:
    """The row as it is stored: a file has text that is none, and text in columns of bytes."""
    for told in (row.topic, row.type, row.kind):
        exact(told)
    key, payload, headers = map(_bytes, (row.key, row.payload, row.headers))
    return row._replace(key=key, payload=payload or b"", headers=headers or b"")


def _bytes(stored: str | bytes | None) -> bytes | None:
    return exact(stored).encode() if isinstance(stored, str) else stored


def _due(shards: Collection[int], without: Collection[str], paused: PauseSet, *, whenever: bool) -> Select[Any]:
    """Selects id and size of due rows, in order."""
    waits, now_due = _WAITING.c, [] if whenever else [_WAITING.c.due_at <= database_now()]
    mine = [any_of(waits.shard, shards), waits.topic.not_in(sorted(without)), *_not_paused(paused)]
    columns = (waits.id, func.length(waits.payload).label("size"), waits.position)
    alone = select(*columns).where(waits.key.is_(None), waits.reason == WaitReason.RETRY, *now_due, *mine)
    heads = _heads(whenever=whenever)
    due = union_all(select(*columns).join(heads, heads.c.id == waits.id).where(*mine), alone).subquery()
    return select(due.c.id, due.c.size).order_by(due.c.position)


def _heads(*, whenever: bool) -> CTE:
    """Selects the first waiting row of every key that is due: asked key by key, whatever waits behind it."""
    line, stopped = _WAITING.alias(), _STOPPED.c
    first = (
        select(line.c.id)
        .where(line.c.topic == stopped.topic, line.c.key == stopped.key, line.c.reason != WaitReason.SCHEDULED)
        .order_by(line.c.position)
        .limit(1)
        .scalar_subquery()
    )
    is_due = [] if whenever else [stopped.due_at <= database_now()]
    return select(first.label("id")).where(stopped.reason == StopReason.RETRY, *is_due).cte("heads")


def _within(sized: Iterable[Any], max_bytes: int) -> list[int]:
    """Returns the first ids whose sizes fit together, at least one."""
    fitting: list[int] = []
    size = 0
    for waiting_id, length in sized:
        size += length
        if fitting and size > max_bytes:
            break
        fitting.append(waiting_id)
    return fitting


def _not_paused(paused: PauseSet) -> list[Any]:
    types = [_WAITING.c.type.not_in(sorted(paused.types))] if paused.types else []
    keys = [~and_(_WAITING.c.topic == topic, _WAITING.c.key == key) for topic, key in sorted(paused.keys)]
    return [*types, *(or_(_WAITING.c.key.is_(None), key) for key in keys)]


def enqueue_scheduled(connection: Connection, shards: Collection[int], limit: int) -> int:
    """Moves scheduled messages that are due into the hot table: their order is their due time.

    Transaction: the caller's, fenced; uses savepoints.
    """
    due = [
        row.id
        for row in connection.execute(
            select(_WAITING.c.id)
            .where(
                _WAITING.c.reason == WaitReason.SCHEDULED,
                any_of(_WAITING.c.shard, shards),
                _WAITING.c.due_at <= database_now(),
            )
            .order_by(_WAITING.c.due_at, _WAITING.c.id)
            .limit(limit),
        )
    ]
    if due:
        _enqueue(connection, due)
    return len(due)


def _enqueue(connection: Connection, ids: Sequence[int]) -> None:
    """Moves scheduled rows; one that the outbox itself does not take becomes a dead letter, and holds up no other."""
    try:
        with connection.begin_nested():
            _move(connection, ids)
    except DBAPIError as error:
        if not dialects.is_about_the_row(error):
            raise
        if len(ids) > 1:
            half = len(ids) // 2
            _enqueue(connection, ids[:half])
            _enqueue(connection, ids[half:])
            return
        (row,), _ = salvage.rows_of(connection, ids, functools.partial(_stored, connection))
        burial.bury_in_place(connection, row._replace(position=row.position or 0), error)


def _move(connection: Connection, ids: Sequence[int]) -> None:
    mine = _WAITING.c.id.in_(ids)
    rows = select(*(_WAITING.c[name] for name in COPIED)).where(mine).order_by(_WAITING.c.due_at, _WAITING.c.id)
    connection.execute(insert(_HOT).from_select(COPIED, rows))
    connection.execute(delete(_WAITING).where(mine))
