"""Mending: finds rows that no statement of ours would ever look at again, and brings them back on their way.

Others write to the tables, too: a script that moves messages by hand, an older version, a person at two in the night.
What cannot be right (a shard that does not exist) becomes a dead letter; what only lacks something gets it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, exists, func, literal, not_, or_, select, update
from sqlalchemy.exc import DBAPIError

from outboxkit import dead_letters, dialects, tables
from outboxkit._sql import any_of, database_now, microseconds_of
from outboxkit.policy import Failure
from outboxkit.rows import Row, StopReason, WaitReason
from outboxkit_relay.store import stopped_keys

if TYPE_CHECKING:
    from collections.abc import Collection

    from sqlalchemy import Connection, Table

__all__ = ["mend"]

_log: Final = logging.getLogger(__name__)

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys
_REASONS: Final = [reason.value for reason in WaitReason]
_AT_ONCE: Final = 100  # rows: it looks again soon
_SHORT: Final = 20_000  # rows that are read through in milliseconds


def mend(connection: Connection, shards: Collection[int]) -> int:
    """Mends what has fallen out of every statement; returns how many rows that were.

    A table that is long is left for a quieter time: nothing here is worth a slow statement.

    Transaction: the caller's, fenced; uses a savepoint. Index used: none.
    """
    try:
        with connection.begin_nested():
            mended = _bury_without_shard(connection) if _is_short(connection, _HOT) else 0
            if _is_short(connection, _WAITING):
                mended += _wake_without_time(connection) + _stop_orphaned_keys(connection, shards)
    except (DBAPIError, ValueError, TypeError) as error:
        if not (dialects.is_about_the_row(error) or dialects.is_unreadable(error)):
            raise
        cause = error.orig if isinstance(error, DBAPIError) else error
        _log.warning("rows.not_mended", extra={"error": type(cause).__name__})
        return 0
    if mended:
        _log.warning("rows.mended", extra={"rows": mended})
    return mended


def _is_short(connection: Connection, table: Table) -> bool:
    return connection.execute(select(literal(1)).select_from(table).offset(_SHORT).limit(1)).first() is None


def _bury_without_shard(connection: Connection) -> int:
    shards = select(tables.outbox_shards.c.shard)
    hot = _HOT.c
    message = (hot.message_id, hot.topic, hot.key, hot.type, hot.kind, hot.payload, hot.headers)
    times = (microseconds_of(hot.recorded_at), microseconds_of(hot.expires_at))
    lost = select(hot.position, *message, *times).where(hot.shard.not_in(shards)).limit(_AT_ONCE)
    found = [Row.stored(*row) for row in connection.execute(lost).all()]
    for row in found:
        text = "its shard does not exist: the table was written past outboxkit"
        dead_letters.bury(connection, dead_letters.of_row(row, Failure.INVALID, text, 1))
        stopped_keys.remove_dead(connection, row)
    return len(found)


def _wake_without_time(connection: Connection) -> int:
    """Makes rows due that wait for no instant, and stopped keys that are tried at none."""
    waits = _WAITING.c
    alone = and_(waits.key.is_(None), waits.reason != WaitReason.SCHEDULED)
    timeless = and_(waits.due_at.is_(None), or_(alone, waits.reason == WaitReason.SCHEDULED))
    odd = and_(waits.key.is_(None), or_(waits.reason == WaitReason.FOLLOWER, waits.reason.not_in(_REASONS)))
    values: dict[str, Any] = {"due_at": database_now()}
    woken = connection.execute(update(_WAITING).where(timeless).values(values)).rowcount
    woken += connection.execute(update(_WAITING).where(odd).values(**values, reason=WaitReason.RETRY)).rowcount
    never = and_(_STOPPED.c.reason != StopReason.PARKED, _STOPPED.c.due_at.is_(None))
    values["reason"] = StopReason.RETRY
    return woken + connection.execute(update(_STOPPED).where(never).values(values)).rowcount


def _stop_orphaned_keys(connection: Connection, mine: Collection[int]) -> int:
    """Stops the keys of rows that wait behind nobody, so that they leave in order."""
    waits = _WAITING.c
    stopped = exists().where(_STOPPED.c.topic == waits.topic, _STOPPED.c.key == waits.key)
    waiting = and_(
        any_of(waits.shard, mine),
        waits.key.is_not(None),
        waits.position.is_not(None),
        waits.reason != WaitReason.SCHEDULED,
    )
    keys = select(waits.topic, waits.key, func.min(waits.shard), func.min(waits.position))
    orphaned = keys.where(waiting, not_(stopped)).group_by(waits.topic, waits.key)
    found = connection.execute(orphaned.limit(_AT_ONCE)).all()
    for topic, key, shard, position in found:
        values = {"topic": topic, "key": key, "shard": shard, "position": position, "reason": StopReason.RETRY}
        connection.execute(dialects.insert_ignoring(connection, _STOPPED).values(**values, due_at=database_now()))
    return len(found)
