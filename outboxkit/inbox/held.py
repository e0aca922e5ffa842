"""Held keys: those of a consumer whose order is held, because the message at their head failed; for operators.

A *waiting* head is tried again at its instant. A *parked* head is a dead letter (``on_dead="park"``), and what stands
behind it waits until an operator lets it go on (`outboxkit.consumer.quarantine`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, or_, select

from outboxkit import tables
from outboxkit.rows import WaitReason

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["HeldKey", "count_held", "held"]

_ROOM: Final = tables.inbox_waiting


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

    Transaction: joins the caller's; only reads. Index used: ``inbox_waiting_order``.
    """
    heads, behind = _ROOM.alias("heads"), _ROOM.alias("behind")
    same_topic = (behind.c.consumer == heads.c.consumer, behind.c.topic == heads.c.topic)
    same = and_(*same_topic, behind.c.key_start == heads.c.key_start, behind.c.key == heads.c.key)
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


def _chosen(
    room: Any, *, consumer: str | None, topic: str | None = None, key: bytes | None = None, reason: str | None = None
) -> list[Any]:
    wanted = {"consumer": consumer, "topic": topic, "key": key, "reason": reason}
    heads = or_(room.c.due_at.is_not(None), room.c.reason == WaitReason.PARKED)
    return [heads, *(room.c[name] == value for name, value in wanted.items() if value is not None)]
