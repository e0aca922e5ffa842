"""The outbox: messages written with the domain's transaction, read and settled by relays.

Verbs of writers: `write`, `schedule`. Verbs of relays: `read`, `claim`, `settle` … All are Core statements on a
connection that the caller owns.
"""

from __future__ import annotations

import weakref
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import bindparam, select

from outboxkit import tables
from outboxkit.errors import ConfigurationError
from outboxkit.message import Message, pack_headers, shard_of, wire_headers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Engine

__all__ = ["schedule", "shards_of", "stored_id", "write"]

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
        connection.execute(tables.outbox_messages.insert(), [_values(message, shards) for message in messages])


def schedule(connection: Connection, messages: Sequence[tuple[Message, datetime | timedelta]]) -> None:
    """Inserts messages that are published later: at an instant, or a time after now by the database's clock.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `write`.
    """
    shards = shards_of(connection)
    waiting = tables.outbox_waiting
    for message, due in messages:
        due_at = tables.database_now(due) if isinstance(due, timedelta) else bindparam("due", due, waiting.c.due_at.type)
        connection.execute(waiting.insert().values(reason="scheduled", due_at=due_at, **_values(message, shards)))


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
