"""The outbox: messages written with the domain's transaction, read and settled by relays.

Verbs of writers: `write`, `schedule`. Verbs of relays: `read`, `due_rows`, `claim`, `remove`, `hold`, `park` … All are
Core statements on a connection that the caller owns.

A fresh row of a healthy key lives in ``outbox_messages`` from its commit to the broker's acknowledgement. When a
message fails for reasons of its own, its key is *stopped*: the message and its followers wait in ``outbox_waiting``
under their old positions, and leave in that order.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import and_, bindparam, delete, exists, func, insert, literal, or_, select, update

from outboxkit import tables
from outboxkit.dialects import Reading, dialect_of
from outboxkit.errors import ConfigurationError, LeaseLost
from outboxkit.message import Message, Row, from_wire, pack_headers, shard_of, wire_headers

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection, Engine

    from outboxkit.message import Headers

__all__ = [
    "Evidence",
    "Hold",
    "StoppedKey",
    "bring_back",
    "claim",
    "due_rows",
    "enqueue_scheduled",
    "fence",
    "hold",
    "park",
    "read",
    "remove",
    "rewrite",
    "schedule",
    "set_aside",
    "shards_of",
    "stopped_keys",
    "stored",
    "stored_id",
    "write",
]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_STOPPED: Final = tables.outbox_stopped_keys

StoppedKey = tuple[str, bytes]  #: (topic, key)

_ERROR_TEXT: Final = 500  # characters: enough to understand, never a payload
_COPIED: Final = [column.name for column in _HOT.columns if column.name not in ("xid", "position")]

_SHARDS: weakref.WeakKeyDictionary[Engine, int] = weakref.WeakKeyDictionary()


def write(connection: Connection, messages: Sequence[Message]) -> None:
    """Inserts messages as unpublished rows, in order, by one statement.

    Transaction: joins the caller's; does not commit.
    Guarantee: the rows live and die with the transaction (and savepoint) that is open on the connection.

    Raises:
        ConfigurationError: the tables are missing or have another version.
    """
    shards = shards_of(connection)
    if messages:
        connection.execute(tables.outbox_messages.insert().inline(), [_values(message, shards) for message in messages])


def schedule(connection: Connection, messages: Sequence[tuple[Message, datetime | timedelta]]) -> None:
    """Inserts messages that are published later: at an instant, or a time after now by the database's clock.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `write`.
    """
    shards = shards_of(connection)
    waiting = tables.outbox_waiting
    for message, due in messages:
        due_at = (
            tables.database_now(due) if isinstance(due, timedelta) else bindparam("due", due, waiting.c.due_at.type)
        )
        row = _values(message, shards)
        connection.execute(waiting.insert().inline().values(reason="scheduled", due_at=due_at, **row))


def rewrite(
    connection: Connection,
    *,
    message_id: str,
    topic: str,
    key: bytes | None,
    type_name: str,
    kind: str,
    payload: bytes,
    headers: Headers,
) -> None:
    """Inserts a message again as an unpublished row, with its own wire headers, byte for byte.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `write`.
    """
    row = stored(
        connection,
        message_id=message_id,
        topic=topic,
        key=key,
        type_name=type_name,
        kind=kind,
        payload=payload,
        headers=headers,
    )
    connection.execute(tables.outbox_messages.insert().values(row))


def stored(
    connection: Connection,
    *,
    message_id: str,
    topic: str,
    key: bytes | None,
    type_name: str,
    kind: str,
    payload: bytes,
    headers: Headers,
) -> dict[str, Any]:
    """The columns of a row whose wire headers exist already; it does not expire again.

    Transaction: joins the caller's.

    Raises:
        DecodeError: the headers cannot be read.
    """
    row_id, message = stored_id(message_id), from_wire(topic, key, headers, payload)
    return {
        "shard": shard_of(topic, key, row_id, shards_of(connection)),
        "message_id": row_id,
        "topic": topic,
        "key": key,
        "type": type_name,
        "kind": kind,
        "payload": payload,
        "headers": pack_headers(headers),
        "content_type": message.content_type,
        "schema_fingerprint": message.schema or None,
        "occurred_at": message.occurred_at or tables.database_now(),
        "expires_at": None,
    }


def shards_of(connection: Connection) -> int:
    """The number of shards of this database; read once per engine.

    Transaction: joins the caller's.

    Raises:
        ConfigurationError: the tables are missing or have another version.
    """
    engine = connection.engine
    if engine not in _SHARDS:
        version = tables.outbox_version
        found = connection.execute(select(version.c.version, version.c.shards)).one_or_none()
        if found is None or found.version != tables.VERSION:
            raise ConfigurationError(
                f"the outbox tables have version {found.version if found else 'none'}, expected {tables.VERSION}: "
                "run `outboxkit init` (or your migration)",
            )
        _SHARDS[engine] = found.shards
    return _SHARDS[engine]


def stored_id(message_id: str) -> UUID:
    """The id of a row: the message's own when it is a UUID, else derived from it (foreign messages in a replay)."""
    try:
        return UUID(message_id)
    except ValueError:
        return uuid5(NAMESPACE_URL, message_id)


def _values(message: Message, shards: int) -> dict[str, Any]:
    message_id = stored_id(message.id)
    return {
        "shard": shard_of(message.topic, message.key, message_id, shards),
        "message_id": message_id,
        "topic": message.topic,
        "key": message.key,
        "type": message.type,
        "kind": message.kind.value,
        "payload": message.payload,
        "headers": pack_headers(wire_headers(message)),
        "content_type": message.content_type,
        "schema_fingerprint": message.schema or None,
        "occurred_at": message.occurred_at or tables.database_now(),
        "expires_at": message.expires_at,
    }


# --- relays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a batch became: the proof that goes to the ledger.

    Attributes:
        topic: the destination.
        outcome: ``published`` or ``expired``.
        rows: the rows, in order.
        partitions: where the broker put each, -1 when it does not tell.
        offsets: likewise.
    """

    topic: str
    outcome: str
    rows: Sequence[Row]
    partitions: Sequence[int]
    offsets: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """A head that failed and waits for its next try, with the followers that must wait behind it.

    Attributes:
        row: the head.
        failure: its class.
        text: what went wrong.
        attempts: tries so far.
        delay: time until the next one.
        followers: later rows of its key that were read, but not acknowledged.
    """

    row: Row
    failure: str
    text: str
    attempts: int
    delay: timedelta
    followers: tuple[Row, ...] = ()


def read(connection: Connection, reading: Reading) -> list[Row]:
    """Fresh unpublished rows in position order.

    Transaction: must run outside a longer one: each call sees what is committed now.
    """
    return dialect_of(connection).read(connection, reading)


def claim(connection: Connection, relay: UUID) -> timedelta:
    """Makes what was read durable and confirms the lease; to be called after reading and before publishing.

    Transaction: its own; it is committed when this returns.
    Guarantee: no message of a transaction that a server crash would lose is published.

    Raises:
        LeaseLost: another relay may own the shards.
    """
    left = dialect_of(connection).claim(connection, relay)
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
        select(literal(1))
        .where(relays.c.id == relay, relays.c.expires_at > tables.database_now())
        .with_for_update(read=True)
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
    fresh = [(row.position, row.id) for batch in evidence for row in batch.rows if row.waiting_id is None]
    removed = dialect_of(connection).remove(connection, fresh) if fresh else 0
    waited = [row.waiting_id for batch in evidence for row in batch.rows if row.waiting_id is not None]
    if waited:
        connection.execute(delete(_WAITING).where(_WAITING.c.id.in_(waited)))
    entries = [_ledger_entry(relay, batch) for batch in evidence if batch.rows]
    if entries:
        connection.execute(insert(tables.outbox_ledger), entries)
    return removed


def stopped_keys(connection: Connection, shards: Collection[int]) -> frozenset[StoppedKey]:
    """The keys of these shards whose order is held.

    Transaction: joins the caller's; reads only.
    """
    found = connection.execute(select(_STOPPED.c.topic, _STOPPED.c.key).where(_STOPPED.c.shard.in_(sorted(shards))))
    return frozenset((topic, bytes(key)) for topic, key in found)


def due_rows(connection: Connection, reading: Reading) -> list[Row]:
    """Waiting rows whose time has come: heads of stopped keys, and rows without a key. At most one row a key.

    Transaction: joins the caller's; reads only.
    """
    waits = _WAITING.c
    ahead = _WAITING.alias()
    is_head = ~exists().where(
        ahead.c.topic == waits.topic,
        ahead.c.key == waits.key,
        ahead.c.reason != "scheduled",
        ahead.c.position < waits.position,
    )
    key_is_due = and_(
        _STOPPED.c.topic == waits.topic,
        _STOPPED.c.key == waits.key,
        _STOPPED.c.reason == "retry",
        _STOPPED.c.due_at <= tables.database_now(),
    )
    alone = and_(waits.key.is_(None), waits.reason == "retry", waits.due_at <= tables.database_now())
    statement = (
        select(
            waits.position,
            waits.message_id,
            waits.topic,
            waits.key,
            waits.type,
            waits.kind,
            waits.payload,
            waits.headers,
            waits.recorded_at,
            waits.expires_at,
            waits.attempts,
            waits.id,
        )
        .outerjoin(_STOPPED, key_is_due)
        .where(
            waits.shard.in_(sorted(reading.shards)),
            waits.topic.not_in(sorted(reading.without)),
            or_(alone, and_(_STOPPED.c.topic.is_not(None), waits.reason != "scheduled", is_head)),
        )
        .order_by(waits.position)
        .limit(reading.limit)
    )
    return [Row._make(row) for row in connection.execute(statement)]


def enqueue_scheduled(connection: Connection, shards: Collection[int], limit: int) -> int:
    """Moves scheduled messages that are due into the hot table: their order is their due time.

    Transaction: the caller's, fenced.
    """
    due = [
        row.id
        for row in connection.execute(
            select(_WAITING.c.id)
            .where(
                _WAITING.c.reason == "scheduled",
                _WAITING.c.shard.in_(sorted(shards)),
                _WAITING.c.due_at <= tables.database_now(),
            )
            .order_by(_WAITING.c.due_at, _WAITING.c.id)
            .limit(limit),
        )
    ]
    if due:
        mine = _WAITING.c.id.in_(due)
        rows = select(*(_WAITING.c[name] for name in _COPIED)).where(mine).order_by(_WAITING.c.due_at, _WAITING.c.id)
        connection.execute(insert(_HOT).from_select(_COPIED, rows))
        connection.execute(delete(_WAITING).where(mine))
    return len(due)


def hold(connection: Connection, held: Hold) -> None:
    """Stops the key of a failed head until its next try; a head without a key waits alone.

    Transaction: the caller's, fenced.
    Guarantee: head and followers keep their positions, and nothing of the key is read as fresh meanwhile.
    """
    row, due_at = held.row, tables.database_now(held.delay)
    failed = {"attempts": held.attempts, "error": f"{held.failure}: {held.text}"[:_ERROR_TEXT], "due_at": due_at}
    if row.waiting_id is None:
        set_aside(connection, [row], reason="retry")
        connection.execute(update(_WAITING).where(_same(row)).values(**failed))
    else:
        connection.execute(update(_WAITING).where(_WAITING.c.id == row.waiting_id).values(**failed))
    set_aside(connection, held.followers)
    if row.key is not None:
        _stop(connection, row, reason="retry", attempts=held.attempts, due_at=due_at)


def park(connection: Connection, head: Row, followers: Sequence[Row]) -> None:
    """Removes a head that became a dead letter; its followers stay waiting until an operator decides.

    Transaction: the caller's, fenced; the same one that writes the dead letter.
    """
    bury(connection, head)
    set_aside(connection, followers)
    if head.key is not None:
        _stop(connection, head, reason="parked", attempts=0, due_at=None)


def bury(connection: Connection, head: Row) -> None:
    """Takes a dead row out of the way; its dead letter is written by the caller in the same transaction.

    Transaction: the caller's, fenced.
    """
    if head.waiting_id is None:
        dialect_of(connection).remove(connection, [(head.position, head.id)])
    else:
        connection.execute(delete(_WAITING).where(_WAITING.c.id == head.waiting_id))


def set_aside(connection: Connection, rows: Iterable[Row], reason: str = "follower") -> None:
    """Moves fresh rows of stopped keys into the waiting room, under their positions.

    Transaction: the caller's, fenced.
    """
    positions = [row.position for row in rows if row.waiting_id is None]
    if positions:
        chosen = _HOT.c.position.in_(positions)
        columns = ["position", *_COPIED]
        rows_of = select(*(_HOT.c[name] for name in columns), literal(reason)).where(chosen)
        connection.execute(insert(_WAITING).from_select([*columns, "reason"], rows_of))
        connection.execute(delete(_HOT).where(chosen))


def go_on(connection: Connection, keys: Iterable[StoppedKey]) -> None:
    """Lets keys whose head is gone continue: the next follower is due now, and a key with none left is free.

    Transaction: the caller's, fenced.
    """
    for topic, key in keys:
        this = and_(_STOPPED.c.topic == topic, _STOPPED.c.key == key)
        left = select(func.min(_WAITING.c.position)).where(
            _WAITING.c.topic == topic,
            _WAITING.c.key == key,
            _WAITING.c.reason != "scheduled",
        )
        position = connection.execute(left).scalar_one()
        if position is None:
            connection.execute(delete(_STOPPED).where(this))
        else:
            due = {"position": position, "reason": "retry", "attempts": 0, "due_at": tables.database_now()}
            connection.execute(update(_STOPPED).where(this).values(request=None, **due))


def bring_back(connection: Connection, position: int | None, message: dict[str, Any]) -> None:
    """Puts a repaired head back at its old position, due now, in front of its followers.

    Transaction: the caller's, fenced.

    Args:
        connection: the caller's.
        position: where the head stood.
        message: the columns of the row.
    """
    topic, key = message["topic"], message["key"]
    connection.execute(
        insert(_WAITING).values(position=position, reason="retry", due_at=tables.database_now(), attempts=0, **message),
    )
    go_on(connection, [(topic, key)])


def _same(row: Row) -> Any:
    return and_(_WAITING.c.position == row.position, _WAITING.c.message_id == row.id)


def _stop(connection: Connection, row: Row, *, reason: str, attempts: int, due_at: Any) -> None:
    shard = shard_of(row.topic, row.key, row.id, shards_of(connection))
    values = {"position": row.position, "reason": reason, "attempts": attempts, "due_at": due_at}
    this = and_(_STOPPED.c.topic == row.topic, _STOPPED.c.key == row.key)
    if not connection.execute(update(_STOPPED).where(this).values(request=None, **values)).rowcount:
        connection.execute(insert(_STOPPED).values(topic=row.topic, key=row.key, shard=shard, **values))


def _ledger_entry(relay: UUID, batch: Evidence) -> dict[str, Any]:
    ids = [row.id for row in batch.rows]
    return {
        "relay": relay,
        "topic": batch.topic,
        "outcome": batch.outcome,
        "min_id": min(ids),
        "max_id": max(ids),
        "ids": ids,
        "partitions": list(batch.partitions),
        "offsets": list(batch.offsets),
    }
