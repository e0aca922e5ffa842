"""The waiting room: deliveries that wait for their next try, and those that wait behind them.

It keeps a key's order: its rows of one (topic, key) are worked off in order of ``id``, and only the first one, the
head, has a ``due_at``. Whoever removes a head makes the next row the head in the same transaction. A *parked* head is a
dead letter: it has no due time, and what stands behind it waits until an operator releases the key.

All verbs are Core statements in a transaction of the caller. All instants are the database's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, delete, exists, func, select, update
from sqlalchemy.orm import Session, aliased

from outboxkit import tables
from outboxkit._sql import database_now, microseconds_of
from outboxkit.brokers import Delivery
from outboxkit.consumer.observe.stats import Backlog
from outboxkit.headers import LETTER, pack_headers, unpack_headers
from outboxkit.rows import UNREADABLE, WaitReason, microseconds

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import ColumnElement, Connection, Row

    from outboxkit.consumer.protocol import OrderingKey

__all__ = [
    "FailedAttempt",
    "WaitingDelivery",
    "append",
    "backlog",
    "defer",
    "drop_head",
    "due",
    "keys_waiting",
    "park",
    "postpone",
    "promote",
    "remove",
    "sweep",
    "take",
    "take_parked_place",
    "waiting_of",
]

_ERROR_LENGTH: Final = 2_000
_NO_PLACE: Final = -1  # in the columns of partition and offset
_room: Final = tables.inbox_waiting


@dataclass(frozen=True, slots=True)
class WaitingDelivery:
    """One waiting delivery, and the attempts that it has had."""

    id: int
    delivery: Delivery
    attempts: int
    first_failed_at: datetime


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """A failed attempt: delay before the next one, attempts so far, redacted error text."""

    delay: timedelta
    attempts: int
    error: str

    def columns(self) -> dict[str, Any]:
        """Returns the columns of ``inbox_waiting``; the due time is by the database's clock."""
        return {
            "due_at": database_now(self.delay),
            "attempts": self.attempts,
            "error": self.error[:_ERROR_LENGTH].replace("\0", "\ufffd"),
        }


def defer(session: Session, consumer: str, head: Delivery, spent: FailedAttempt) -> None:
    """Lets a failed delivery wait for its next try.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``.
    """
    values = _values(consumer, head) | {"reason": WaitReason.RETRY} | spent.columns()
    session.connection().execute(_room.insert().values(values))


def append(session: Session, consumer: str, followers: Sequence[Delivery]) -> None:
    """Lets deliveries wait behind the rows that their key has already; `promote` must follow after the commit.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``.
    """
    if followers:
        rows = [_values(consumer, delivery) | {"reason": WaitReason.FOLLOWER} for delivery in followers]
        session.connection().execute(_room.insert(), rows)


def park(session: Session, consumer: str, head: Delivery, letter: UUID, *, room_id: int | None = None) -> None:
    """Keeps a dead head's place in its key, under the number of its letter, so that what follows waits behind it.

    Transaction: joins the caller's, which also stores the letter; does not commit. Writes: ``inbox_waiting``.
    """
    others = tuple(header for header in head.headers if header[0] != LETTER)
    place = replace(head, headers=(*others, (LETTER, str(letter).encode())))
    values = _values(consumer, place) | {"reason": WaitReason.PARKED, "due_at": None}
    if room_id is not None:
        session.connection().execute(update(_room).where(_room.c.id == room_id).values(values))
    else:
        session.connection().execute(_room.insert().values(values))


def take_parked_place(session: Session, consumer: str, sent_again: Delivery, letters: Collection[UUID]) -> bool:
    """Puts the replay of a parked head in its place, due now; False when the key is not parked by one of the letters.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``.
    """
    head = _parked_head(session.connection(), consumer, (sent_again.topic, sent_again.key))
    named = {str(letter).encode() for letter in letters}
    if head is None or dict(unpack_headers(head.headers)).get(LETTER) not in named:
        return False
    values = _values(consumer, sent_again) | {"reason": WaitReason.RETRY, "due_at": database_now(), "attempts": 0}
    session.connection().execute(update(_room).where(_room.c.id == head.id).values(values))
    return True


def drop_head(connection: Connection, consumer: str, lane: OrderingKey, room_id: int) -> None:
    """Takes a head out that the caller has locked, and makes the next row of its key the head.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_waiting``.
    """
    connection.execute(delete(_room).where(_room.c.id == room_id))
    if lane[1] is not None:
        _promote(connection, consumer, lane)


def backlog(connection: Connection, consumer: str) -> Backlog:
    """Counts what waits, over all processes of a consumer.

    Transaction: joins the caller's; only reads. Index used: ``inbox_waiting_due``, for all rows of the consumer.
    """
    since = microseconds_of(_room.c.first_failed_at)
    oldest = func.min(func.nullif(since, UNREADABLE), type_=since.type)
    query = select(_room.c.reason, func.count(), oldest).where(_room.c.consumer == consumer).group_by(_room.c.reason)
    rows = connection.execute(query).all()
    now = microseconds(connection.scalars(select(database_now())).one()) if rows else 0
    ages = [now - began for _, _, began in rows if began is not None]
    counts = {reason: number for reason, number, _ in rows}
    return Backlog(
        retry=counts.get(WaitReason.RETRY, 0),
        follower=counts.get(WaitReason.FOLLOWER, 0),
        parked=counts.get(WaitReason.PARKED, 0),
        oldest=timedelta(microseconds=max(0, *ages, 0)),
    )


def promote(session: Session, consumer: str, lane: OrderingKey) -> None:
    """Makes the first row of a key its head, due now, if it is not one already and is not parked.

    A head that ends while followers are appended may see none of them: so both do it, the one who removes a head and
    the one who has appended, and each sees the other's possible commit.

    Transaction: joins the caller's; does not commit. Index used: ``inbox_waiting_order``.
    """
    _promote(session.connection(), consumer, lane)


def sweep(session: Session, consumer: str) -> None:
    """Makes every first row of a key a head: repairs what a crash left between `append` and `promote`.

    Transaction: joins the caller's; does not commit. Reads: all rows of the consumer; for the start.
    """
    earlier = aliased(_room)
    has_earlier = exists().where(
        earlier.c.consumer == consumer,
        earlier.c.topic == _room.c.topic,
        *_same_key(earlier, _room),
        earlier.c.id < _room.c.id,
    )
    idle = and_(_room.c.due_at.is_(None), _room.c.reason != WaitReason.PARKED)
    orphan = and_(_room.c.consumer == consumer, idle, ~has_earlier)
    session.connection().execute(update(_room).where(orphan).values(due_at=database_now()))


def keys_waiting(session: Session, consumer: str, lanes: Iterable[OrderingKey]) -> set[OrderingKey]:
    """Returns those of these keys that have waiting rows.

    Transaction: joins the caller's. Index used: ``inbox_waiting_order``.
    """
    wanted = {lane for lane in lanes if lane[1] is not None}
    if not wanted:
        return set()
    topics, keys = {topic for topic, _ in wanted}, {key for _, key in wanted}
    query = select(_room.c.topic, _room.c.key).distinct()
    starts = {key[: tables.KEY_START] for key in keys if key is not None}
    query = query.where(_room.c.consumer == consumer, _room.c.topic.in_(topics))
    query = query.where(_room.c.key_start.in_(starts), _room.c.key.in_(keys))
    return wanted & {(topic, bytes(key)) for topic, key in session.connection().execute(query)}


def due(session: Session, consumer: str, limit: int, in_hand: Collection[int] = ()) -> list[WaitingDelivery]:
    """Returns heads whose instant has come, the longest overdue first, without those that somebody works on.

    Those ``in_hand`` are not touched: a look must not be in the way of their own transactions.

    Transaction: joins the caller's short one. Index used: ``inbox_waiting_due``. What is returned is not kept locked:
    `take` decides.
    """
    query = select(_room).where(_room.c.consumer == consumer, _room.c.due_at <= database_now())
    if in_hand:
        query = query.where(_room.c.id.not_in(in_hand))
    query = query.order_by(_room.c.due_at, _room.c.id).limit(limit).with_for_update(skip_locked=True)
    return [waiting_of(row) for row in session.connection().execute(query)]


def take(session: Session, waiting: WaitingDelivery, *, waits: bool = False) -> bool:
    """Locks a waiting row for this transaction; False when another process has it or had it.

    Transaction: joins the caller's. Locks: the row; ``waits`` for another transaction's lock, else that one has it.
    """
    query = select(_room.c.id).where(_is(waiting)).with_for_update(skip_locked=not waits)
    return session.connection().execute(query).one_or_none() is not None


def postpone(session: Session, waiting: WaitingDelivery, spent: FailedAttempt) -> None:
    """Lets a waiting head wait again, with one more attempt spent; nothing when another process was faster.

    Transaction: joins the caller's; does not commit.
    """
    values = {"reason": WaitReason.RETRY, **spent.columns()}
    session.connection().execute(update(_room).where(_is(waiting)).values(values))


def remove(session: Session, consumer: str, waiting: WaitingDelivery) -> bool:
    """Takes a settled head out and makes the next row of its key the head; False when it was gone.

    Transaction: joins the caller's, which also holds what settled it; does not commit.
    """
    gone = session.connection().execute(delete(_room).where(_room.c.id == waiting.id)).rowcount == 1
    if gone and waiting.delivery.key is not None:
        promote(session, consumer, (waiting.delivery.topic, waiting.delivery.key))
    return gone


def _promote(connection: Connection, consumer: str, lane: OrderingKey) -> None:
    first = select(func.min(_room.c.id)).where(_in_lane(consumer, lane)).scalar_subquery()
    idle = and_(_room.c.due_at.is_(None), _room.c.reason != WaitReason.PARKED)
    connection.execute(update(_room).where(_room.c.id == first, idle).values(due_at=database_now()))


def _parked_head(connection: Connection, consumer: str, lane: OrderingKey) -> Any:
    this = and_(_in_lane(consumer, lane), _room.c.reason == WaitReason.PARKED)
    return connection.execute(select(_room.c.id, _room.c.headers).where(this).with_for_update()).first()


def _is(waiting: WaitingDelivery) -> ColumnElement[bool]:
    return and_(_room.c.id == waiting.id, _room.c.attempts == waiting.attempts, _room.c.due_at <= database_now())


def _in_lane(consumer: str, lane: OrderingKey) -> ColumnElement[bool]:
    topic, key = lane
    same_key = and_(_room.c.key_start == (key and key[: tables.KEY_START]), _room.c.key == key)
    return and_(_room.c.consumer == consumer, _room.c.topic == topic, same_key)


def _same_key(one: Any, other: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return one.c.key_start == other.c.key_start, one.c.key == other.c.key


def _values(consumer: str, delivery: Delivery) -> dict[str, Any]:
    return {
        "consumer": consumer,
        "topic": delivery.topic,
        "key": delivery.key,
        "payload": delivery.payload,
        "headers": pack_headers(delivery.headers),
        "origin": delivery.origin,
        "partition": _NO_PLACE if delivery.partition is None else delivery.partition,
        "offset": _NO_PLACE if delivery.offset is None else delivery.offset,
    }


def waiting_of(row: Row[Any]) -> WaitingDelivery:
    """Returns a row of ``inbox_waiting`` as a value."""
    delivery = Delivery(
        topic=row.topic,
        key=row.key,
        headers=tuple(unpack_headers(row.headers)),
        payload=row.payload,
        origin=row.origin,
        partition=None if row.partition == _NO_PLACE else row.partition,
        offset=None if row.offset == _NO_PLACE else row.offset,
    )
    return WaitingDelivery(row.id, delivery, row.attempts, row.first_failed_at)
