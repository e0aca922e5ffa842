"""Operators' requests on stopped keys, carried out by the relay that owns the shard.

Operators only *record* a request on a stopped key; the relay that owns its shard carries it out between two pages, so
that a release cannot race the reader.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, select, update
from sqlalchemy.exc import DBAPIError

from outboxkit import dead_letters, dialects, outbox, tables
from outboxkit._sql import any_of, database_now
from outboxkit.dead_letters import DeadLetter, Filter, Side, State
from outboxkit.errors import DecodeError
from outboxkit.policy import Failure
from outboxkit.rows import Request, StopReason
from outboxkit_relay.store import stopped_keys

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from uuid import UUID

    from sqlalchemy import Connection, Row

__all__ = ["carry_out_requests", "discard_letters"]

_log: Final = logging.getLogger(__name__)

_STOPPED: Final = tables.outbox_stopped_keys
_LETTERS: Final = tables.dead_letters


def carry_out_requests(connection: Connection, shards: Collection[int]) -> None:
    """Carries out the requests (`outboxkit.rows.Request`) on stopped keys of these shards.

    A waiting head that is to be skipped may be at the broker: its answer is awaited first, and it is skipped if it has
    failed again.

    Transaction: the caller's, fenced.
    Locks: the stopped keys; those that a settlement is changing are left for the next time.
    """
    asked = (
        select(
            _STOPPED.c.topic,
            _STOPPED.c.key,
            _STOPPED.c.position,
            _STOPPED.c.request,
            (_STOPPED.c.reason == StopReason.PARKED).label("parked"),
            (_STOPPED.c.due_at > database_now()).label("resting"),
        )
        .where(any_of(_STOPPED.c.shard, shards), _STOPPED.c.request.is_not(None))
        .with_for_update(skip_locked=True)
    )
    for row in connection.execute(asked).all():
        told = {"topic": row.topic, "request": row.request, "position": row.position}
        try:
            with connection.begin_nested():
                done = _carry_out(connection, row)
        except (DBAPIError, DecodeError) as error:
            if isinstance(error, DBAPIError) and not dialects.is_about_the_row(error):
                raise
            _log.warning("request.failed", extra={**told, "error": type(error).__name__})
        else:
            if done:
                _log.info("key.released", extra=told)


def discard_letters(connection: Connection, ids: Sequence[UUID], *, by: str, why: str) -> set[UUID]:
    """Closes dead letters without a replay, and asks the relay to let go on what is parked behind them.

    Transaction: joins the caller's; does not commit. Locks: the letters.

    Returns:
        Those that were dead until now. Where none was, nothing is changed, and nothing in the audit log.
    """
    dead = [one for one in dead_letters.in_order(connection, ids, lock=True) if one.state is State.DEAD]
    if dead:
        dead_letters.discard(connection, [one.id for one in dead], by=by, why=why)
        _release_behind(connection, dead, by=by)
    return {one.id for one in dead}


def _release_behind(connection: Connection, discarded: Iterable[DeadLetter], *, by: str) -> None:
    for letter in discarded:
        head = and_(
            _STOPPED.c.topic == letter.topic,
            _STOPPED.c.key == letter.key,
            _STOPPED.c.position == letter.source_position,
            _STOPPED.c.reason == StopReason.PARKED,
        )
        if letter.side is Side.RELAY:
            connection.execute(update(_STOPPED).where(head).values(request=Request.SKIP, requested_by=by))


def _carry_out(connection: Connection, asked: Row[Any]) -> bool:
    """Returns False when it must wait."""
    topic, key, position = asked.topic, bytes(asked.key), asked.position
    if asked.request == Request.REPAIR and (letter := _replaying(connection, topic, key, position)) is not None:
        _reinsert(connection, letter, position)
    elif asked.request == Request.RELEASE and not asked.parked:
        stopped_keys.retry_head(connection, topic, key)
    elif asked.request == Request.SKIP and not asked.parked:
        return bool(asked.resting) and _skip(connection, topic, key)
    else:
        stopped_keys.resume_key(connection, [(topic, key)])
    return True


def _skip(connection: Connection, topic: str, key: bytes) -> bool:
    found = stopped_keys.head_of(connection, topic, key)
    if found is not None:
        head, error = found
        failure, text = _reason(error)
        dead_letters.bury(connection, dead_letters.of_row(head, failure, text, head.attempts))
        stopped_keys.remove_dead(connection, head)
    stopped_keys.resume_key(connection, [(topic, key)])
    return True


def _reason(error: str) -> tuple[Failure, str]:
    """Why the head waits, as `outboxkit_relay.store.stopped_keys.stop_key` has written it."""
    name, _, text = error.partition(": ")
    return (Failure(name), text) if name in set(Failure) else (Failure.REJECTED, error)


def _reinsert(connection: Connection, letter: DeadLetter, position: int) -> None:
    stopped_keys.reinsert_head(
        connection, position, outbox.row_of(dead_letters.outgoing(letter), outbox.shards_of(connection))
    )
    closed = {"state": State.REPLAYED, "closed_at": database_now()}
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter.id).values(**closed))


def _replaying(connection: Connection, topic: str, key: bytes, position: int) -> DeadLetter | None:
    which = Filter(side=Side.RELAY, state=State.REPLAYING, topic=topic, key=key, source_position=position)
    return next(iter(dead_letters.find(connection, which, limit=1)), None)
