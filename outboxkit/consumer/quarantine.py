"""Quarantine: keys of a consumer whose order is held, because the message at their head failed, and operators' verbs.

A *waiting* head is tried again at its instant. A *parked* head is a dead letter (``on_dead="park"``), and what stands
behind it waits until an operator lets it go on. Each decision is a row in ``outbox_audit``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, insert, or_, select, update

from outboxkit import dead_letters, tables
from outboxkit._sql import database_now
from outboxkit.consumer import retries
from outboxkit.consumer.reading import message_of
from outboxkit.consumer.retries import WaitingDelivery
from outboxkit.dead_letters import Stage
from outboxkit.errors import OutboxKitError
from outboxkit.message import Kind
from outboxkit.policy import Failure
from outboxkit.rows import WaitReason
from outboxkit.signals import DeadLetterRequested

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.brokers import Delivery
    from outboxkit.dead_letters import DeadLetter
    from outboxkit.message import Message

__all__ = ["HeldKey", "count_held", "held", "release", "skip"]

_ROOM: Final = tables.inbox_waiting
_MAX_AUDIT: Final = 1024  # bytes of a target or a reason


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKey:
    """A key of a consumer, held by the head of its waiting room.

    Attributes:
        consumer: whose it is.
        topic: where its messages come from.
        key: the key; None for a message without one, which holds nobody.
        room_id: of the head.
        reason: ``retry`` (the head waits for its next try) or ``parked`` (it is dead).
        attempts: tries of the head so far.
        due_at: when it is tried again, None when it is parked.
        followers: deliveries behind it.
        error: why it failed the last time.
    """

    consumer: str
    topic: str
    key: bytes | None
    room_id: int
    reason: str
    attempts: int
    due_at: datetime | None
    followers: int
    error: str


def held(
    connection: Connection,
    consumer: str | None = None,
    *,
    topic: str | None = None,
    key: bytes | None = None,
    reason: WaitReason | None = None,
    limit: int | None = None,
) -> list[HeldKey]:
    """Lists held keys: all, or those of a consumer, a topic, a key, a reason; the longest held first.

    Transaction: joins the caller's; only reads. Index used: ``inbox_waiting_key``.
    """
    heads, behind = _ROOM.alias("heads"), _ROOM.alias("behind")
    same = and_(behind.c.consumer == heads.c.consumer, behind.c.topic == heads.c.topic, behind.c.key == heads.c.key)
    followers = select(func.count(behind.c.id)).where(same, behind.c.id > heads.c.id).correlate(heads).scalar_subquery()
    columns = [heads.c[name] for name in ("consumer", "topic", "key", "reason", "attempts", "due_at")]
    error = func.coalesce(heads.c.error, "").label("error")
    query = select(*columns, heads.c.id.label("room_id"), error, followers.label("followers"))
    query = query.where(*_chosen(heads, consumer=consumer, topic=topic, key=key, reason=reason))
    found = connection.execute(query.order_by(heads.c.id).limit(limit)).mappings()
    return [HeldKey(**{**row, "key": None if row["key"] is None else bytes(row["key"])}) for row in found]


def count_held(connection: Connection, consumer: str, *, topic: str | None = None) -> int:
    """Counts held keys.

    Transaction: joins the caller's; only reads.
    """
    query = select(func.count()).select_from(_ROOM).where(*_chosen(_ROOM, consumer=consumer, topic=topic))
    return connection.scalars(query).one()


def release(connection: Connection, head: HeldKey, *, by: str, why: str = "") -> bool:
    """Tries a waiting head at once; behind a parked head lets the others go on, and the letter stays as it is.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``, ``outbox_audit``.
    Guarantee: order is kept; a head that is handled just now is left alone.

    Returns:
        False when the head is another one by now, or is handled just now.
    """
    if not _lock(connection, head):
        return False
    if head.reason == WaitReason.PARKED:
        retries.drop_head(connection, head.consumer, (head.topic, head.key), head.room_id)
    else:
        connection.execute(update(_ROOM).where(_ROOM.c.id == head.room_id).values(due_at=database_now()))
    _record(connection, "release", head, by=by, why=why)
    return True


def skip(connection: Connection, head: HeldKey, *, by: str, why: str = "") -> bool:
    """Makes a waiting head a dead letter and lets the others go on; of a parked head as `release`.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``, ``dead_letters``, ``inbox_messages``,
    ``outbox_audit``.
    Guarantee: as `release`; the letter and the end of the waiting commit together.

    Returns:
        False when the head is another one by now, or is handled just now.
    """
    waiting = _lock(connection, head)
    if not waiting:
        return False
    if head.reason != WaitReason.PARKED:
        dead_letters.bury(connection, _letter(head, waiting, by))
    retries.drop_head(connection, head.consumer, (head.topic, head.key), head.room_id)
    _record(connection, "skip", head, by=by, why=why)
    return True


def _chosen(
    room: Any, *, consumer: str | None, topic: str | None = None, key: bytes | None = None, reason: str | None = None
) -> list[Any]:
    wanted = {"consumer": consumer, "topic": topic, "key": key, "reason": reason}
    heads = or_(room.c.due_at.is_not(None), room.c.reason == WaitReason.PARKED)
    return [heads, *(room.c[name] == value for name, value in wanted.items() if value is not None)]


def _lock(connection: Connection, head: HeldKey) -> WaitingDelivery | None:
    """Locks the head as it was seen; None when somebody works on it, or has worked on it since."""
    seen = and_(_ROOM.c.id == head.room_id, _ROOM.c.reason == head.reason, _ROOM.c.attempts == head.attempts)
    row = connection.execute(select(_ROOM).where(seen).with_for_update(skip_locked=True)).one_or_none()
    return None if row is None else retries.waiting_of(row)


def _letter(head: HeldKey, waiting: WaitingDelivery, by: str) -> DeadLetter:
    message = _message(waiting.delivery)
    return dead_letters.of_delivery(
        waiting.delivery,
        message,
        consumer=head.consumer,
        kind=(message.kind if message else Kind.EVENT).value,
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=DeadLetterRequested(f"skipped by {by} after {head.attempts} tries: {head.error or 'it was not tried'}"),
        attempts=head.attempts,
    )


def _message(delivery: Delivery) -> Message | None:
    try:
        return message_of(delivery)
    except OutboxKitError:
        return None


def _record(connection: Connection, what: str, head: HeldKey, *, by: str, why: str) -> None:
    key = "-" if head.key is None else head.key.decode("utf-8", "backslashreplace").replace("\0", "\\x00")
    target = f"consumer {head.consumer} {head.topic} {key}"[:_MAX_AUDIT]
    entry = {"who": by, "action": f"quarantine.{what}", "target": target, "why": why[:_MAX_AUDIT]}
    connection.execute(insert(tables.outbox_audit).values(**entry))
