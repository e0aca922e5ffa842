"""Quarantine: operators' verbs for keys of a consumer whose order is held (`outboxkit.inbox.held`).

A *waiting* head is tried again at its instant. A *parked* head is a dead letter (``on_dead="park"``), and what stands
behind it waits until an operator lets it go on. Each decision is a row in ``outbox_audit``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, insert, select, update

from outboxkit import dead_letters, tables
from outboxkit._sql import database_now
from outboxkit.consumer import retries
from outboxkit.consumer.reading import message_of
from outboxkit.consumer.retries import WaitingDelivery
from outboxkit.dead_letters import Stage
from outboxkit.errors import OutboxKitError
from outboxkit.inbox.held import HeldKey
from outboxkit.message import Kind
from outboxkit.policy import Failure
from outboxkit.rows import WaitReason
from outboxkit.signals import DeadLetterRequested

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.brokers import Delivery
    from outboxkit.dead_letters import DeadLetter
    from outboxkit.message import Message

__all__ = ["release", "skip"]

_ROOM: Final = tables.inbox_waiting
_MAX_AUDIT: Final = 1024  # bytes of a target or a reason


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
