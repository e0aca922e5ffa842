"""The waiting room: messages that wait for their next try, behind the head of their key, or for their instant.

When a message fails for reasons of its own, its key is *stopped*: a row in ``outbox_stopped_keys``, and the message
(the head) and its followers in ``outbox_waiting`` under their old positions, in which order they leave again. A head
that became a dead letter leaves its followers *parked*. A message without a key waits alone.

Operators look (`list_stopped`) and ask (`request`); only the relay that owns a key's shard changes its order. All other
verbs are Core statements in a transaction of the caller that `outboxkit.outbox.fence` has fenced.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, case, delete, exists, func, insert, literal, select, update

from outboxkit import tables
from outboxkit._sql import any_of, database_now, microseconds_of
from outboxkit.dialects import dialect_of
from outboxkit.outbox import shards_of
from outboxkit.rows import UNREADABLE, Request, Row, StopReason, WaitReason, shard_of
from outboxkit_relay.core.protocol import FailedHead, StoppedKey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection

__all__ = [
    "COPIED",
    "KeyStop",
    "append_followers",
    "count_stopped_keys",
    "head_of",
    "list_stopped",
    "move_to_waiting",
    "park",
    "reinsert_head",
    "remove_dead",
    "request",
    "resume_key",
    "retry_head",
    "row_columns",
    "stop_key",
    "stopped_in",
]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys
_LETTERS: Final = tables.dead_letters


_REST: Final = timedelta(minutes=1)  # a head that is to be skipped is not tried again before its relay skips it
_ERROR_TEXT: Final = 500  # characters: enough to understand, never a payload
#: what a message keeps when it moves between the hot table and the waiting room
COPIED: Final = [column.name for column in _HOT.columns if column.name not in ("xid", "position")]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyStop:
    """A stopped key, as an operator sees it.

    Attributes:
        topic: its destination.
        key: the key.
        reason: ``retry`` (the head waits for its next try) or ``parked`` (the head is dead).
        position: of the head.
        attempts: tries of the head so far.
        due_at: when the head is tried again.
        followers: messages that wait behind the head.
        error: why the head failed the last time.
        request: what was asked and is not carried out yet.
        requested_by: who asked.
    """

    topic: str
    key: bytes
    reason: str
    position: int
    attempts: int
    due_at: datetime | None
    followers: int
    error: str
    request: str | None
    requested_by: str | None


# --- operators ---------------------------------------------------------------------------------------------------


def list_stopped(
    connection: Connection, *, topic: str | None = None, key: bytes | None = None, limit: int | None = None
) -> list[KeyStop]:
    """Lists stopped keys, optionally of one topic or of one (topic, key).

    Transaction: joins the caller's; reads only.
    """
    head = _WAITING.alias()
    line = (
        _WAITING.c.topic == _STOPPED.c.topic,
        _WAITING.c.key == _STOPPED.c.key,
        _WAITING.c.reason != WaitReason.SCHEDULED,
    )
    followers = select(func.count()).where(*line, _WAITING.c.position != _STOPPED.c.position).scalar_subquery()
    is_head = and_(
        head.c.topic == _STOPPED.c.topic,
        head.c.key == _STOPPED.c.key,
        head.c.position == _STOPPED.c.position,
        head.c.reason != WaitReason.SCHEDULED,
    )
    statement = (
        select(
            *(_STOPPED.c[name] for name in ("topic", "key", "reason", "position", "due_at", "request", "requested_by")),
            func.coalesce(head.c.attempts, _of_letter(_LETTERS.c.attempts), 0).label("attempts"),
            func.coalesce(head.c.error, _of_letter(_LETTERS.c.failure + ": " + _LETTERS.c.error), "").label("error"),
            followers.label("followers"),
        )
        .outerjoin(head, is_head)
        .where(*_chosen(topic, key))
        .order_by(_STOPPED.c.topic, _STOPPED.c.key)
        .limit(limit)
    )
    found = connection.execute(statement).mappings()
    return [KeyStop(**{**row, "key": bytes(row["key"])}) for row in found]


def count_stopped_keys(connection: Connection, *, topic: str | None = None) -> int:
    """Counts stopped keys, optionally of one topic.

    Transaction: joins the caller's; reads only.
    """
    counted = select(func.count()).select_from(_STOPPED).where(*_chosen(topic, None))
    return connection.execute(counted).scalar_one()


def request(
    connection: Connection,
    topic: str,
    key: bytes,
    what: Request,
    *,
    by: str,
    why: str = "",
    position: int | None = None,
) -> bool:
    """Records what an operator asks of a stopped key, and that it was asked; the relay that owns it carries it out.

    A later request replaces an earlier one, but not the replay of a dead head.

    Transaction: joins the caller's; does not commit.
    Guarantee: a request is about the head that the key has now; when that one goes out first, nothing is left to do.

    Args:
        connection: the caller's.
        topic: of the key.
        key: the key.
        what: to do with it.
        by: who asks, for the audit.
        why: the reason, for the audit.
        position: of the head that was looked at: with another one nothing is recorded.

    Returns:
        Whether it is recorded: the key is stopped (at that head), and its head is not being replayed.
    """
    this = [_STOPPED.c.topic == topic, _STOPPED.c.key == key, func.coalesce(_STOPPED.c.request, "") != Request.REPAIR]
    if position is not None:
        this.append(_STOPPED.c.position == position)
    asked = update(_STOPPED).where(*this).values(request=what.value, requested_by=by)
    if not connection.execute(asked).rowcount:
        return False
    # PostgreSQL's text takes no NUL.
    target = f"{topic} {key.decode('utf-8', 'backslashreplace')}".replace("\0", "\\x00")
    entry = {"who": by, "action": f"quarantine.{what.value}", "target": target, "why": why}
    connection.execute(insert(tables.outbox_audit).values(**entry))
    return True


def _chosen(topic: str | None, key: bytes | None) -> list[Any]:
    topics = [] if topic is None else [_STOPPED.c.topic == topic]
    return topics if key is None else [*topics, _STOPPED.c.key == key]


def _of_letter(column: Any) -> Any:
    """Of the latest dead letter of the stopped key's head."""
    return (
        select(column)
        .where(
            _LETTERS.c.side == "relay",
            _LETTERS.c.topic == _STOPPED.c.topic,
            _LETTERS.c.key == _STOPPED.c.key,
            _LETTERS.c.source_position == _STOPPED.c.position,
        )
        .order_by(_LETTERS.c.died_at.desc())
        .limit(1)
        .scalar_subquery()
    )


# --- relays ------------------------------------------------------------------------------------------------------


def stopped_in(connection: Connection, shards: Collection[int]) -> frozenset[StoppedKey]:
    """Returns the stopped keys of these shards.

    Transaction: joins the caller's; reads only.
    """
    found = connection.execute(select(_STOPPED.c.topic, _STOPPED.c.key).where(any_of(_STOPPED.c.shard, shards)))
    return frozenset((topic, bytes(key)) for topic, key in found)


def head_of(connection: Connection, topic: str, key: bytes) -> tuple[Row, str] | None:
    """Returns the first waiting row of a key, and why it failed the last time.

    Transaction: joins the caller's; reads only.
    """
    line = (_WAITING.c.topic == topic, _WAITING.c.key == key, _WAITING.c.reason != WaitReason.SCHEDULED)
    first = select(*row_columns(), _WAITING.c.error).where(*line).order_by(_WAITING.c.position).limit(1)
    found = connection.execute(first).one_or_none()
    return None if found is None else (Row.stored(*found[:-1]), found.error or "")


def retry_head(connection: Connection, topic: str, key: bytes) -> None:
    """Makes the head of a key that waits for its next try due; its attempts stay counted.

    Transaction: the caller's, fenced.
    """
    this = and_(_STOPPED.c.topic == topic, _STOPPED.c.key == key, _STOPPED.c.reason == StopReason.RETRY)
    connection.execute(update(_STOPPED).where(this).values(request=None, due_at=database_now()))


def stop_key(connection: Connection, failed: FailedHead) -> None:
    """Stops the key of a failed head until its next try; a head without a key waits alone.

    Transaction: the caller's, fenced.
    Guarantee: head and followers keep their positions, and nothing of the key is read as fresh meanwhile.
    """
    row, due_at = failed.row, database_now(failed.delay)
    error = f"{failed.failure}: {failed.text}"[:_ERROR_TEXT]
    try_again = {"attempts": failed.attempts, "error": error, "due_at": due_at}
    if row.waiting_id is None:
        move_to_waiting(connection, [row], WaitReason.RETRY)
        connection.execute(update(_WAITING).where(_same(row)).values(**try_again))
    else:
        connection.execute(update(_WAITING).where(_WAITING.c.id == row.waiting_id).values(**try_again))
    move_to_waiting(connection, failed.followers)
    if row.key is not None and _waits(connection, row):
        _stop(connection, row, StopReason.RETRY, attempts=failed.attempts, due_at=due_at)


def park(connection: Connection, head: Row, followers: Sequence[Row]) -> None:
    """Removes a head that became a dead letter; its followers stay waiting until an operator decides.

    Transaction: the caller's, fenced; the same one that writes the dead letter.
    """
    remove_dead(connection, head)
    move_to_waiting(connection, followers)
    if head.key is not None:
        _stop(connection, head, StopReason.PARKED, attempts=0, due_at=None)


def remove_dead(connection: Connection, head: Row) -> None:
    """Deletes a dead row; the caller writes its dead letter in the same transaction.

    Transaction: the caller's, fenced.
    """
    if head.waiting_id is not None:
        connection.execute(delete(_WAITING).where(_WAITING.c.id == head.waiting_id))
    elif head.recorded_us == UNREADABLE:
        connection.execute(delete(_HOT).where(_HOT.c.position == head.position))  # its id may be none
    else:
        dialect_of(connection).remove(connection, [(head.position, head.raw_id)])


def move_to_waiting(connection: Connection, rows: Iterable[Row], reason: WaitReason = WaitReason.FOLLOWER) -> None:
    """Moves fresh rows of stopped keys into the waiting room, under their positions.

    Transaction: the caller's, fenced.
    """
    positions = [row.position for row in rows if row.waiting_id is None]
    if positions:
        chosen = _HOT.c.position.in_(positions)
        columns = ["position", *COPIED]
        rows_of = select(*(_HOT.c[name] for name in columns), literal(reason)).where(chosen)
        connection.execute(insert(_WAITING).from_select([*columns, "reason"], rows_of))
        connection.execute(delete(_HOT).where(chosen))


def append_followers(connection: Connection, rows: Sequence[Row]) -> None:
    """Moves fresh rows of stopped keys behind those that wait; a key that was freed meanwhile is stopped again.

    Rows without a key are due at once: they are here because they are paused.

    Transaction: the caller's, fenced.
    """
    move_to_waiting(connection, [row for row in rows if row.key is not None])
    alone = [row for row in rows if row.key is None]
    move_to_waiting(connection, alone, WaitReason.RETRY)
    for row in alone:
        connection.execute(update(_WAITING).where(_same(row)).values(due_at=database_now()))
    for row in {(row.topic, row.key): row for row in reversed(rows) if row.key is not None}.values():
        this = and_(_STOPPED.c.topic == row.topic, _STOPPED.c.key == row.key)
        # Locked: whoever frees the key at the same time sees this row, or is seen here.
        stopped = connection.execute(select(_STOPPED.c.topic).where(this).with_for_update()).one_or_none() is not None
        if not stopped and _waits(connection, row):
            _stop(connection, row, StopReason.RETRY, attempts=0, due_at=database_now())


def resume_key(connection: Connection, keys: Iterable[StoppedKey]) -> None:
    """Lets keys whose head is gone continue: the next follower is due now, and a key with none left is free.

    Transaction: the caller's, fenced.
    """
    for topic, key in keys:
        this = and_(_STOPPED.c.topic == topic, _STOPPED.c.key == key)
        left = select(func.min(_WAITING.c.position)).where(
            _WAITING.c.topic == topic,
            _WAITING.c.key == key,
            _WAITING.c.reason != WaitReason.SCHEDULED,
        )
        position = connection.execute(left).scalar_one()
        if position is None:
            connection.execute(delete(_STOPPED).where(this))
        else:
            due = {"position": position, "reason": StopReason.RETRY, "attempts": 0, "due_at": database_now()}
            connection.execute(update(_STOPPED).where(this).values(request=None, **due))


def reinsert_head(connection: Connection, position: int | None, message: dict[str, Any]) -> None:
    """Puts a repaired head back at its old position, due now, in front of its followers.

    Transaction: the caller's, fenced.

    Args:
        connection: the caller's.
        position: where the head stood.
        message: the columns of the row.
    """
    topic, key = message["topic"], message["key"]
    connection.execute(
        insert(_WAITING).values(
            position=position, reason=WaitReason.RETRY, due_at=database_now(), attempts=0, **message
        ),
    )
    resume_key(connection, [(topic, key)])


def row_columns() -> list[Any]:
    """The columns of the waiting room that make a `Row`."""
    waits = _WAITING.c
    message = (waits.topic, waits.key, waits.type, waits.kind, waits.payload, waits.headers)
    return [
        waits.position,
        waits.message_id,
        *message,
        microseconds_of(waits.recorded_at),
        microseconds_of(waits.expires_at),
        waits.attempts,
        waits.id,
    ]


def _same(row: Row) -> Any:
    return and_(_WAITING.c.position == row.position, _WAITING.c.message_id == row.id)


def _waits(connection: Connection, row: Row) -> bool:
    """Whether anything of the row's key waits: the row itself may have been settled by another relay meanwhile."""
    line = (_WAITING.c.topic == row.topic, _WAITING.c.key == row.key, _WAITING.c.reason != WaitReason.SCHEDULED)
    return connection.execute(select(literal(1)).where(exists().where(*line))).one_or_none() is not None


def _stop(connection: Connection, row: Row, reason: StopReason, *, attempts: int, due_at: Any) -> None:
    shard = shard_of(row.topic, row.key, row.id, shards_of(connection))
    values = {"position": row.position, "reason": reason, "attempts": attempts, "due_at": due_at}
    this = and_(_STOPPED.c.topic == row.topic, _STOPPED.c.key == row.key)
    # A request about this head outlives its failure; of a dead head there is nothing to try at once.
    same = _STOPPED.c.position == row.position
    to_skip = and_(same, _STOPPED.c.request == Request.SKIP.value)
    changed = {
        **values,
        "request": case((to_skip if reason is StopReason.PARKED else same, _STOPPED.c.request), else_=None),
        "due_at": None if due_at is None else case((to_skip, database_now(_REST)), else_=due_at),
    }
    if not connection.execute(update(_STOPPED).where(this).values(**changed)).rowcount:
        connection.execute(insert(_STOPPED).values(topic=row.topic, key=row.key, shard=shard, **values))
