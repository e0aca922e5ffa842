"""Durable attempts: deliveries that wait for their next try, and the marker that finds the one that kills the process.

The waiting room keeps a key's order: its rows of one (topic, key) are worked off in order of ``id``, and only the first
one, the head, has a ``due_at``. Whoever removes a head makes the next row the head in the same transaction.

A marker is written per batch before anything is decoded. When its owner dies, what it names is suspect and runs alone
under a marker of its own, so that every further death counts against one message only.

All verbs are Core statements in a transaction of the caller. All instants are the database's.
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

from sqlalchemy import and_, delete, exists, func, select, update
from sqlalchemy.orm import Session, aliased

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.brokers import Delivery
from outboxkit.dialects import insert_ignoring
from outboxkit.headers import pack_headers, unpack_headers
from outboxkit.rows import WaitReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Row

__all__ = [
    "FailedAttempt",
    "Marker",
    "OrderingKey",
    "WaitingDelivery",
    "append",
    "clear",
    "defer",
    "due",
    "identity",
    "keys_waiting",
    "mark",
    "postpone",
    "promote",
    "remove",
    "renew",
    "suspects",
    "sweep",
    "take",
    "unmark",
]

OrderingKey = tuple[str, bytes | None]  #: (topic, key)

_ERROR_LENGTH: Final = 2_000
_NO_PLACE: Final = -1  # in the columns of partition and offset
_SUSPICION: Final = timedelta(days=1)  # a suspect that was not seen again for so long was settled elsewhere
_START: Final = uuid4().hex[:8]  # tells this process from an earlier one under the same number
_room: Final = tables.inbox_waiting
_batches: Final = tables.inbox_batches


def identity(delivery: Delivery) -> str:
    """Names a delivery before decoding: by its place in the log, else by the hash of its id or content."""
    if delivery.offset is not None:
        return f"{delivery.topic}/{delivery.partition}/{delivery.offset}"
    given = next((value for name, value in delivery.headers if name == "ce_id"), b"") or delivery.payload or b""
    return hashlib.sha256(delivery.topic.encode() + b"\0" + given).hexdigest()[:32]


# --- the waiting room --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WaitingDelivery:
    """One waiting delivery, and the attempts that it has had."""

    id: int
    delivery: Delivery
    attempts: int
    first_failed_at: datetime


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """How a delivery stands after a failed attempt: when to try again, attempts so far, our words for the error."""

    delay: timedelta
    attempts: int
    error: str

    def columns(self) -> dict[str, Any]:
        """As ``inbox_waiting`` keeps it; the due time is by the database's clock."""
        return {
            "due_at": database_now(self.delay),
            "attempts": self.attempts,
            "error": self.error[:_ERROR_LENGTH],
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


def promote(session: Session, consumer: str, lane: OrderingKey) -> None:
    """Makes the first row of a key its head, due now, if it is not one already.

    A head that ends while followers are appended may see none of them: so does both, the one who removes a head and
    the one who has appended, each looks after the other's possible commit.

    Transaction: joins the caller's; does not commit. Index used: ``inbox_waiting_key``.
    """
    first = select(func.min(_room.c.id)).where(_in_lane(consumer, lane)).scalar_subquery()
    make_due = update(_room).where(_room.c.id == first, _room.c.due_at.is_(None)).values(due_at=database_now())
    session.connection().execute(make_due)


def sweep(session: Session, consumer: str) -> None:
    """Makes every first row of a key a head: repairs what a crash left between `append` and `promote`.

    Transaction: joins the caller's; does not commit. Reads: all rows of the consumer; for the start.
    """
    earlier = aliased(_room)
    has_earlier = exists().where(
        earlier.c.consumer == consumer,
        earlier.c.topic == _room.c.topic,
        earlier.c.key == _room.c.key,
        earlier.c.id < _room.c.id,
    )
    orphan = and_(_room.c.consumer == consumer, _room.c.due_at.is_(None), ~has_earlier)
    session.connection().execute(update(_room).where(orphan).values(due_at=database_now()))


def keys_waiting(session: Session, consumer: str, lanes: Iterable[OrderingKey]) -> set[OrderingKey]:
    """Those of these keys that have waiting rows.

    Transaction: joins the caller's. Index used: ``inbox_waiting_key``.
    """
    wanted = {lane for lane in lanes if lane[1] is not None}
    if not wanted:
        return set()
    topics, keys = {topic for topic, _ in wanted}, {key for _, key in wanted}
    query = select(_room.c.topic, _room.c.key).distinct()
    query = query.where(_room.c.consumer == consumer, _room.c.topic.in_(topics), _room.c.key.in_(keys))
    return wanted & {(topic, bytes(key)) for topic, key in session.connection().execute(query)}


def due(session: Session, consumer: str, limit: int) -> list[WaitingDelivery]:
    """Heads whose instant has come, the longest overdue first. They are not locked: `take` decides.

    Transaction: joins the caller's. Index used: ``inbox_waiting_due``.
    """
    query = select(_room).where(_room.c.consumer == consumer, _room.c.due_at <= database_now())
    return [
        _waiting(row) for row in session.connection().execute(query.order_by(_room.c.due_at, _room.c.id).limit(limit))
    ]


def take(session: Session, waiting: WaitingDelivery) -> bool:
    """Locks a waiting row for this transaction; False when another process has it or had it.

    Transaction: joins the caller's. Locks: the row, without waiting.
    """
    query = select(_room.c.id).where(_is(waiting)).with_for_update(skip_locked=True)
    return session.connection().execute(query).one_or_none() is not None


def postpone(session: Session, waiting: WaitingDelivery, spent: FailedAttempt) -> None:
    """Lets a waiting head wait again, with one more attempt spent; nothing when another process was faster.

    Transaction: joins the caller's; does not commit.
    """
    session.connection().execute(update(_room).where(_is(waiting)).values(reason=WaitReason.RETRY, **spent.columns()))


def remove(session: Session, consumer: str, waiting: WaitingDelivery) -> bool:
    """Takes a settled head out and makes the next row of its key the head; False when it was gone.

    Transaction: joins the caller's, which also holds what settled it; does not commit.
    """
    gone = session.connection().execute(delete(_room).where(_room.c.id == waiting.id)).rowcount == 1
    if gone and waiting.delivery.key is not None:
        promote(session, consumer, (waiting.delivery.topic, waiting.delivery.key))
    return gone


def _is(waiting: WaitingDelivery) -> ColumnElement[bool]:
    return and_(_room.c.id == waiting.id, _room.c.attempts == waiting.attempts, _room.c.due_at <= database_now())


def _in_lane(consumer: str, lane: OrderingKey) -> ColumnElement[bool]:
    return and_(_room.c.consumer == consumer, _room.c.topic == lane[0], _room.c.key == lane[1])


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


def _waiting(row: Row[Any]) -> WaitingDelivery:
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


# --- the marker --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Marker:
    """Who is at work: one start of one consumer process."""

    id: UUID
    consumer: str
    lease: timedelta

    @property
    def host(self) -> str:
        """Machine and process, so that the next start on this machine recognises a dead predecessor at once."""
        return f"{socket.gethostname()}/{os.getpid()}/{_START}"


def mark(session: Session, marker: Marker, identities: Sequence[str]) -> None:
    """Says what this process is about to handle.

    Transaction: joins the caller's short one; it must be committed before the first delivery is decoded.
    """
    connection = session.connection()
    values = {"messages": list(identities), "expires_at": database_now(marker.lease)}
    if connection.execute(update(_batches).where(_batches.c.id == marker.id).values(values)).rowcount == 0:
        values |= {"id": marker.id, "consumer": marker.consumer, "host": marker.host}
        connection.execute(_batches.insert().values(values))


def renew(session: Session, marker: Marker) -> None:
    """Says that this process is alive."""
    until = database_now(marker.lease)
    session.connection().execute(update(_batches).where(_batches.c.id == marker.id).values(expires_at=until))


def unmark(session: Session, marker: Marker) -> None:
    """Says that the batch is over."""
    session.connection().execute(delete(_batches).where(_batches.c.id == marker.id))


def suspects(session: Session, marker: Marker, *, starting: bool = False) -> dict[str, int]:
    """Deaths by identity: what dead processes were handling, this look's findings included.

    Transaction: joins the caller's; does not commit. Locks: the consumer's row of suspects, when somebody died.

    Args:
        session: of the caller.
        marker: of the caller.
        starting: also take over from dead processes of this machine whose lease still runs.
    """
    known = _known(session, marker.consumer)
    dead = _dead(session, marker, starting=starting)
    if dead:
        _register(session, marker.consumer)
        known = _known(session, marker.consumer, lock=True)
        for marked in dead:
            # Another process may have counted the same death: the one that deletes the marker counts.
            if session.connection().execute(delete(_batches).where(_batches.c.id == marked.id)).rowcount == 1:
                known |= {name: known.get(name, 0) + 1 for name in marked.messages}
        _remember(session, marker.consumer, known)
    return known


def clear(session: Session, marker: Marker, settled: Iterable[str]) -> None:
    """Forgets suspects that are settled.

    Transaction: joins the caller's; does not commit.
    """
    known = _known(session, marker.consumer, lock=True)
    left = {name: deaths for name, deaths in known.items() if name not in set(settled)}
    if left != known:
        _remember(session, marker.consumer, left)


def _dead(session: Session, marker: Marker, *, starting: bool) -> list[Row[Any]]:
    expired = _batches.c.expires_at < database_now()
    query = select(_batches.c.id, _batches.c.host, _batches.c.messages, expired.label("expired"))
    query = query.where(
        _batches.c.consumer == marker.consumer, _batches.c.id.not_in([marker.id, _suspects_id(marker.consumer)])
    )
    found = session.connection().execute(query if starting else query.where(expired))
    return [marked for marked in found if marked.expired or _is_dead(marked.host)]


def _is_dead(host: str) -> bool:
    machine, process, start = (*host.split("/"), "", "")[:3]
    if machine != socket.gethostname() or not process.isdigit():
        return False
    if int(process) == os.getpid():
        return start != _START  # a predecessor in a container, where every process has the same number
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _suspects_id(consumer: str) -> UUID:
    return uuid5(NAMESPACE_URL, f"urn:outboxkit:suspects:{consumer}")


def _known(session: Session, consumer: str, *, lock: bool = False) -> dict[str, int]:
    fresh = _batches.c.expires_at > database_now()
    query = select(_batches.c.messages).where(_batches.c.id == _suspects_id(consumer), fresh)
    found: dict[str, int] | None = session.connection().scalar(query.with_for_update() if lock else query)
    return dict(found or {})


def _register(session: Session, consumer: str) -> None:
    values = {
        "id": _suspects_id(consumer),
        "consumer": consumer,
        "host": "",
        "messages": {},
        "expires_at": database_now(),
    }
    session.connection().execute(insert_ignoring(session.connection(), _batches).values(values))


def _remember(session: Session, consumer: str, known: dict[str, int]) -> None:
    row = _batches.c.id == _suspects_id(consumer)
    if known:
        until = database_now(_SUSPICION)
        session.connection().execute(update(_batches).where(row).values(messages=known, expires_at=until))
    else:
        session.connection().execute(delete(_batches).where(row))
