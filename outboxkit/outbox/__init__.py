"""The outbox: messages written with the domain's transaction, read and settled by relays.

Verbs of writers: `write`, `schedule`, `cancel`. Verbs of relays: `read`, `confirm_lease`, `fence`, `remove`. All are
Core statements on a connection that the caller owns.

State is presence: a row lives in ``outbox_messages`` from its commit to the broker's acknowledgement. What becomes of a
message that fails for reasons of its own is told in `outboxkit_relay.store.stopped_keys`.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from sqlalchemy import and_, delete, func, literal, select

from outboxkit import tables
from outboxkit._sql import database_now, microseconds_of
from outboxkit.dialects import dialect_of, naming_missing_tables
from outboxkit.errors import ConfigurationError, EncodeError, LeaseLost
from outboxkit.headers import RESERVED_NAMES, from_wire, is_reserved, unpack_headers
from outboxkit.message import Message
from outboxkit.outbox.insert import insert_messages, insert_waiting, stored_id
from outboxkit.rows import UNREADABLE, Evidence, Page, Reading, Row, WaitReason, microseconds, shard_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sqlalchemy import ColumnElement, Connection, Dialect


__all__ = [
    "Lag",
    "Original",
    "Row",
    "cancel",
    "confirm_lease",
    "fence",
    "is_scheduled",
    "lag",
    "read",
    "remove",
    "rewrite",
    "row_of",
    "schedule",
    "shards_of",
    "stored_id",
    "write",
]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_IDENTITY: Final = attrgetter("position", "raw_id")
_RAW_ID: Final = attrgetter("raw_id")
_WAITING_ID: Final = attrgetter("waiting_id")

_RIGHT: Final[weakref.WeakSet[Dialect]] = weakref.WeakSet()  # databases whose tables have our version


def write(connection: Connection, messages: Sequence[Message]) -> None:
    """Inserts messages as unpublished rows, in order, by one statement.

    Transaction: joins the caller's; does not commit.
    Guarantee: the rows live and die with the transaction (and savepoint) that is open on the connection.

    Raises:
        ConfigurationError: the tables are missing or have another version.
        EncodeError: a header has a name that the library writes itself.
    """
    _refuse_reserved(messages)
    _require_version(connection)
    with naming_missing_tables():  # they were there when the version was looked at, once for each engine
        if messages:
            insert_messages(connection, messages)


def schedule(connection: Connection, messages: Sequence[tuple[Message, datetime | timedelta]]) -> None:
    """Inserts messages that are published later: at an instant, or a time after now by the database's clock.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `write`.

    Raises:
        ConfigurationError: as `write`.
        EncodeError: as `write`.
    """
    _refuse_reserved(message for message, _ in messages)
    _require_version(connection)
    with naming_missing_tables():
        if messages:
            insert_waiting(connection, messages)


def _refuse_reserved(messages: Iterable[Message]) -> None:
    """Headers of ours say what happened to a message; a message that was received has some, and is another one now."""
    for message in messages:
        for name, _ in message.headers:
            if is_reserved(name):
                raise EncodeError(
                    f"the header {name!r} of a message for {message.topic} is reserved: the library writes "
                    f"{RESERVED_NAMES} itself; leave it out, or choose another name"
                )


class Original(Protocol):
    """A message that was on the wire already: a dead letter, for one. Its headers are packed."""

    @property
    def message_id(self) -> str: ...
    @property
    def topic(self) -> str: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def type(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def payload(self) -> bytes | None: ...
    @property
    def headers(self) -> bytes: ...


def rewrite(connection: Connection, originals: Sequence[Original]) -> None:
    """Inserts messages again as unpublished rows, in order, with their own wire headers, byte for byte.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `write`.

    Raises:
        DecodeError: the headers of one cannot be read.
    """
    if originals:
        shards = shards_of(connection)
        connection.execute(_HOT.insert(), [row_of(original, shards) for original in originals])


def row_of(original: Original, shards: int) -> dict[str, Any]:
    """Returns the columns of an outbox row for a message whose wire headers exist already; it does not expire again.

    Raises:
        DecodeError: the headers cannot be read.
    """
    payload, row_id = original.payload or b"", stored_id(original.message_id)
    message = from_wire(original.topic, original.key, unpack_headers(original.headers), payload)
    return {
        "shard": shard_of(original.topic, original.key, row_id, shards),
        "message_id": row_id,
        "topic": original.topic,
        "key": original.key,
        "type": original.type,
        "kind": original.kind,
        "payload": payload,
        "headers": original.headers,
        "content_type": message.content_type,
        "schema_fingerprint": message.schema or None,
        "occurred_at": message.occurred_at or datetime.now(UTC),  # no expression: one statement takes many rows
        "expires_at": None,
    }


def shards_of(connection: Connection) -> int:
    """The number of shards of this database, as it is now.

    Transaction: joins the caller's.

    Raises:
        ConfigurationError: the tables are missing or have another version.
    """
    version = tables.outbox_version
    with naming_missing_tables():
        found = connection.execute(select(version.c.version, version.c.shards)).one_or_none()
    # Emptied tables are tables of ours: a suite that deletes all rows between its tests need not know this one.
    if found is not None and not tables.WRITABLE_FROM <= found.version <= tables.VERSION:
        raise ConfigurationError(
            f"the outbox tables have version {found.version}, expected {tables.VERSION}: "
            + ("run `outboxkit init` (or your migration)" if found.version < tables.VERSION else "update outboxkit"),
        )
    _RIGHT.add(connection.dialect)
    shards: int = tables.SHARDS if found is None else found.shards
    return shards


def _require_version(connection: Connection) -> None:
    """Looks once for each engine; copies of it with other execution options share its dialect."""
    if connection.dialect not in _RIGHT:
        shards_of(connection)


@naming_missing_tables()
def cancel(connection: Connection, message_id: str) -> bool:
    """Removes a scheduled message; False when there is none, or it is due: then it may be at the broker.

    Transaction: joins the caller's, which should be short: a message that becomes due before the commit goes out.
    Index used: none; the waiting room is small.
    """
    return connection.execute(delete(_WAITING).where(_scheduled(message_id))).rowcount > 0


@naming_missing_tables()
def is_scheduled(connection: Connection, message_id: str) -> bool:
    """Tells whether `cancel` would remove a message.

    Transaction: joins the caller's; reads only.
    """
    return connection.execute(select(literal(1)).where(_scheduled(message_id)).limit(1)).first() is not None


def _scheduled(message_id: str) -> ColumnElement[bool]:
    same = _WAITING.c.message_id == stored_id(message_id)
    return and_(same, _WAITING.c.reason == WaitReason.SCHEDULED, _WAITING.c.due_at > database_now())


# --- relays ------------------------------------------------------------------------------------------------------


def read(connection: Connection, reading: Reading) -> Page:
    """A page of fresh unpublished rows in position order; see `outboxkit.dialects.Dialect.read`.

    Transaction: one statement of its own: each call sees what is committed now.

    Raises:
        LeaseLost: the connection has reached another server session: everything read must be forgotten.
    """
    return dialect_of(connection).read(connection, reading)


def confirm_lease(connection: Connection, relay: UUID) -> timedelta:
    """Makes what was read durable and confirms the lease; to be called after reading and before publishing.

    Transaction: its own; it is committed when this returns.
    Guarantee: no message of a transaction that a server crash would lose is published.

    Raises:
        LeaseLost: another relay may own the shards.
    """
    left = dialect_of(connection).confirm_lease(connection, relay)
    if left is None:
        raise LeaseLost
    return left


def fence(connection: Connection, relay: UUID) -> None:
    """Locks the relay's lease for the rest of the transaction, so that a take-over waits for it or excludes it.

    Transaction: the caller's; the first statement in it.
    Guarantee: what follows in this transaction is done by the owner of the shards, or not at all.

    Raises:
        LeaseLost: the lease has ended.
    """
    relays = tables.outbox_relays
    # FOR SHARE, not a look: under READ COMMITTED a bare sub-select lets a stale relay win the race.
    alive = (
        select(literal(1)).where(relays.c.id == relay, relays.c.expires_at > database_now()).with_for_update(read=True)
    )
    if connection.execute(alive).one_or_none() is None:
        raise LeaseLost


def remove(connection: Connection, relay: UUID, evidence: Sequence[Evidence]) -> int:
    """Deletes acknowledged (or expired) rows and writes their evidence to the ledger, one row a batch.

    Transaction: the caller's.
    Guarantee: needs no fence: what the broker acknowledged is published, whoever removes it. Idempotent.

    Returns:
        How many fresh rows were deleted.
    """
    settled = list(chain.from_iterable(batch.rows for batch in evidence))
    waited = list(filter(None, map(_WAITING_ID, settled)))
    fresh = [row for row in settled if row.waiting_id is None] if waited else settled
    removed = dialect_of(connection).remove(connection, list(map(_IDENTITY, fresh))) if fresh else 0
    if waited:
        connection.execute(delete(_WAITING).where(_WAITING.c.id.in_(waited)))
    entries = [_ledger_entry(relay, batch) for batch in evidence if batch.rows]
    if entries:
        connection.execute(tables.outbox_ledger.insert(), entries)
    return removed


def _ledger_entry(relay: UUID, batch: Evidence) -> dict[str, Any]:
    ids = list(map(_RAW_ID, batch.rows))
    return {
        "relay": relay,
        "topic": batch.topic,
        "outcome": batch.outcome,
        "min_id": UUID(bytes=min(ids)),
        "max_id": UUID(bytes=max(ids)),
        "ids": ids,
        "partitions": list(batch.partitions),
        "offsets": list(batch.offsets),
    }


# --- looking


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """Distance by which the relays are behind.

    Attributes:
        oldest: age of the oldest message that is not published yet; zero when there is none.
        depth: at most so many messages are not published yet: positions between the oldest and the newest.
    """

    oldest: timedelta
    depth: int


@naming_missing_tables()
def lag(connection: Connection) -> Lag:
    """Tells how far the relays are behind: cheap enough to ask before every bulk write.

    Transaction: joins the caller's; reads only.

    Index used: the primary key, at both ends.
    """
    newest = select(func.max(_HOT.c.position)).scalar_subquery()
    recorded = microseconds_of(_HOT.c.recorded_at)
    oldest = select(_HOT.c.position, newest, recorded, database_now()).order_by(_HOT.c.position).limit(1)
    found = connection.execute(oldest).one_or_none()
    if found is None:
        return Lag(oldest=timedelta(0), depth=0)
    first, last, since, now = found
    age = 0 if since == UNREADABLE else max(0, microseconds(now) - since)
    return Lag(oldest=timedelta(microseconds=age), depth=last - first + 1)
