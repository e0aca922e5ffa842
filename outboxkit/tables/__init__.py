"""The tables, portable types included. They join the user's own ``MetaData``, so that Alembic sees them.

State is presence: a row in ``outbox_messages`` is unpublished, a row in ``outbox_waiting`` waits for its instant, its
key or its retry, a row in ``dead_letters`` is dead. There is no status column on the way of a healthy message.

Statements are built from the module's own tables (``tables.outbox_messages``); the copies in the user's metadata have
the same names.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Computed,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    text,
)

from outboxkit._sql import Array, CurrentXid, Instant, Xid8, database_now
from outboxkit.tables.completion import complete, simplify, store_small
from outboxkit.tables.letters import letter_tables
from outboxkit.tables.rules import MAX_SHARDS, constrain

__all__ = [
    "KEY_START",
    "METADATA",
    "MISSING",
    "SHARDS",
    "VERSION",
    "WRITABLE_FROM",
    "dead_letter_groups",
    "dead_letter_replay_items",
    "dead_letter_replays",
    "dead_letters",
    "inbox_batches",
    "inbox_consumers",
    "inbox_messages",
    "inbox_suspects",
    "inbox_waiting",
    "outbox_audit",
    "outbox_control",
    "outbox_idempotency",
    "outbox_ledger",
    "outbox_messages",
    "outbox_relays",
    "outbox_sagas",
    "outbox_schemas",
    "outbox_shards",
    "outbox_stopped_keys",
    "outbox_tables",
    "outbox_version",
    "outbox_waiting",
]

VERSION: Final = 2  #: of these tables; stored in ``outbox_version``
#: Tables from this version on take what applications write: an application may be deployed before its tables.
WRITABLE_FROM: Final = 1
MISSING: Final = "the outbox tables are missing in this database: run `outboxkit init` (or your migration)"
KEY_START: Final = 200  #: bytes of a foreign key, of whatever length, that the index of those who wait knows
SHARDS: Final = MAX_SHARDS  #: default number of shards; stored in ``outbox_version`` and read from there by everyone

METADATA: Final = MetaData()
_Big: Final = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only an INTEGER PRIMARY KEY
_EMPTY: Final = text("''")  # not "", whose quotes Alembic does not recognise on SQLite


def _identity(name: str) -> Column[int]:
    return Column(name, _Big, Identity(always=True), primary_key=True)


def _message_columns() -> list[Column[Any]]:
    """Columns of a stored message: the same in the hot table and in the waiting room."""
    return [
        Column("shard", SmallInteger, nullable=False),
        Column("message_id", Uuid, nullable=False),
        Column("topic", Text, nullable=False),
        Column("key", LargeBinary),
        Column("type", Text, nullable=False),
        Column("kind", String(8), nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column("headers", LargeBinary, nullable=False),
        Column("content_type", Text, nullable=False),
        Column("schema_fingerprint", Text),
        Column("occurred_at", Instant, nullable=False),
        Column("recorded_at", Instant, nullable=False, server_default=database_now()),
        Column("expires_at", Instant),
    ]


# --- the way out -------------------------------------------------------------------------------------------------

outbox_messages = Table(
    "outbox_messages",
    METADATA,
    Column("xid", Xid8().with_variant(Integer(), "sqlite"), server_default=CurrentXid()),
    _identity("position"),
    *_message_columns(),
    Index("outbox_messages_xid", "xid"),
    sqlite_autoincrement=True,  # SQLite would give a deleted highest position out again
    comment="unpublished messages; a relay deletes what the broker acknowledged",
)

store_small(outbox_messages)

outbox_waiting = Table(
    "outbox_waiting",
    METADATA,
    _identity("id"),
    Column("position", BigInteger),
    *_message_columns(),
    Column("reason", String(16), nullable=False),
    Column("due_at", Instant),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("error", Text),
    Index("outbox_waiting_key", "topic", "key", "position"),
    Index("outbox_waiting_due", "due_at"),
    comment="messages that wait: retry (a failed head), follower (behind one), scheduled",
)

outbox_stopped_keys = Table(
    "outbox_stopped_keys",
    METADATA,
    Column("topic", Text, nullable=False),
    Column("key", LargeBinary, nullable=False),
    Column("shard", SmallInteger, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("reason", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due_at", Instant),
    Column("request", String(8)),
    Column("requested_by", Text),
    PrimaryKeyConstraint("topic", "key"),
    comment="keys whose order is held: retry (the head waits for its next try), parked (the head is dead)",
)

outbox_relays = Table(
    "outbox_relays",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("host", Text, nullable=False),
    Column("started_at", Instant, nullable=False, server_default=database_now()),
    Column("expires_at", Instant, nullable=False),
    Column("version", Text, nullable=False),
    Column("routing", Text),
    Column("state", Text),
    Column("told_at", Instant),
    Column("ended", Text),
    comment="leases; the id is the fencing token of one start of one relay; and what each relay has told of itself",
)

outbox_shards = Table(
    "outbox_shards",
    METADATA,
    Column("shard", SmallInteger, primary_key=True, autoincrement=False),
    Column("owner", Uuid),
    comment="which relay reads which shard",
)

outbox_ledger = Table(
    "outbox_ledger",
    METADATA,
    _identity("id"),
    Column("relay", Uuid, nullable=False),
    Column("topic", Text, nullable=False),
    Column("published_at", Instant, nullable=False, server_default=database_now()),
    Column("outcome", String(16), nullable=False),
    Column("min_id", Uuid, nullable=False),
    Column("max_id", Uuid, nullable=False),
    Column("ids", Array(Uuid()), nullable=False),
    Column("partitions", Array(Integer()), nullable=False),
    Column("offsets", Array(BigInteger()), nullable=False),
    Index("outbox_ledger_published", "published_at"),
    comment="evidence: one row per batch that the broker acknowledged",
)

outbox_control = Table(
    "outbox_control",
    METADATA,
    _identity("id"),
    Column("scope", String(16), nullable=False),
    Column("target", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("set_by", Text, nullable=False),
    Column("set_at", Instant, nullable=False, server_default=database_now()),
    Column("until", Instant),
    comment="pauses and kill switches that operators set",
)

outbox_audit = Table(
    "outbox_audit",
    METADATA,
    _identity("id"),
    Column("at", Instant, nullable=False, server_default=database_now()),
    Column("who", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("why", Text, nullable=False, server_default=_EMPTY),
    Column("login", Text),
    comment="who did what, append only; on PostgreSQL a trigger writes the login, and when",
)

# --- the way in --------------------------------------------------------------------------------------------------

inbox_messages = Table(
    "inbox_messages",
    METADATA,
    Column("consumer", Text, nullable=False),
    Column("source", Text, nullable=False, server_default=_EMPTY),
    Column("message_id", Text, nullable=False),
    Column("content_hash", LargeBinary),
    Column("handled_at", Instant, nullable=False, server_default=database_now()),
    Column("outcome", LargeBinary),
    PrimaryKeyConstraint("consumer", "source", "message_id"),
    Index("inbox_messages_handled", "handled_at"),
    comment="messages whose effect is committed: a second one is a duplicate",
)

inbox_waiting = Table(
    "inbox_waiting",
    METADATA,
    _identity("id"),
    Column("consumer", Text, nullable=False),
    Column("topic", Text, nullable=False),
    Column("key", LargeBinary),
    Column("payload", LargeBinary),
    Column("headers", LargeBinary, nullable=False),
    Column("origin", Text, nullable=False),
    Column("partition", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("reason", String(16), nullable=False),
    Column("due_at", Instant),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("error", Text),
    Column("first_failed_at", Instant, nullable=False, server_default=database_now()),
    # A whole key may be longer than an index entry can be.
    Column("key_start", LargeBinary, Computed(f"substr(key, 1, {KEY_START})", persisted=True)),
    Index("inbox_waiting_order", "consumer", "topic", "key_start", "id"),
    Index("inbox_waiting_due", "consumer", "due_at"),
    comment="deliveries that wait: retry (a failed head), follower (behind one), parked (a dead head)",
)

inbox_batches = Table(
    "inbox_batches",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("consumer", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("expires_at", Instant, nullable=False),
    Column("messages", JSON, nullable=False),
    Index("inbox_batches_consumer", "consumer", "expires_at"),
    comment="what a consumer process is handling right now: finds the message that kills it",
)

inbox_suspects = Table(
    "inbox_suspects",
    METADATA,
    Column("consumer", Text, nullable=False),
    Column("identity", Text, nullable=False),
    Column("deaths", Integer, nullable=False),
    Column("seen_at", Instant, nullable=False, server_default=database_now()),
    PrimaryKeyConstraint("consumer", "identity"),
    comment="deliveries that dead processes were handling: each runs under a marker of its own until it is settled",
)

inbox_consumers = Table(
    "inbox_consumers",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("consumer", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("started_at", Instant, nullable=False, server_default=database_now()),
    Column("expires_at", Instant, nullable=False),
    Column("stopped_at", Instant),
    Column("in_hand", Integer, nullable=False, server_default="0"),
    Column("lag", BigInteger),
    Column("trouble", Text),
    Column("renamed_to", Text),
    Index("inbox_consumers_consumer", "consumer", "started_at"),
    comment="starts of consumer processes: who runs now (expires_at is a heartbeat), and who ran lately or was renamed",
)

# --- what failed, and what schemas are in use --------------------------------------------------------------------

dead_letters, dead_letter_groups, dead_letter_replays, dead_letter_replay_items = letter_tables(METADATA)

outbox_schemas = Table(
    "outbox_schemas",
    METADATA,
    Column("fingerprint", String(64), nullable=False),
    Column("role", String(8), nullable=False),
    Column("consumer", Text, nullable=False, server_default=_EMPTY),
    Column("type", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("seen_at", Instant, nullable=False, server_default=database_now()),
    PrimaryKeyConstraint("fingerprint", "role", "consumer", "type"),
    comment="schemas that writers used and readers read with",
)

outbox_sagas = Table(
    "outbox_sagas",
    METADATA,
    Column("saga", String(100), nullable=False),
    Column("key", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("status", String(16), nullable=False),
    Column("step", Text, nullable=False),
    Column("at", Integer, nullable=False),
    Column("number", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("done", JSON, nullable=False),
    Column("undo", JSON, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("history", JSON, nullable=False),
    Column("started_at", Instant, nullable=False, server_default=database_now()),
    Column("updated_at", Instant, nullable=False, server_default=database_now()),
    Column("due_at", Instant),
    Column("correlation_id", Text, nullable=False, server_default=_EMPTY),
    PrimaryKeyConstraint("saga", "key"),
    Index("outbox_sagas_status", "status", "updated_at"),
    comment="instances of sagas: their progress, state and history",
)

outbox_idempotency = Table(
    "outbox_idempotency",
    METADATA,
    Column("scope", String(255), nullable=False),
    Column("key", String(255), nullable=False),
    Column("request_hash", LargeBinary),
    Column("outcome", LargeBinary),
    Column("created_at", Instant, nullable=False, server_default=database_now()),
    Column("expires_at", Instant, nullable=False),
    PrimaryKeyConstraint("scope", "key"),
    Index("outbox_idempotency_expires", "expires_at"),
    comment="idempotency keys of requests, and the outcome that each had",
)

outbox_version = Table(
    "outbox_version",
    METADATA,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("shards", SmallInteger, nullable=False),
    comment="one row: the version of these tables and the number of shards; without it, those of this outboxkit",
)


for _table in METADATA.sorted_tables:
    constrain(_table)


def outbox_tables(metadata: MetaData) -> None:
    """Adds outboxkit's tables to an application's metadata, so that ``create_all`` and Alembic include them.

    Calling it twice adds nothing. ``create_all`` makes them as ``outboxkit init`` does, first rows and SQL functions
    included. They are where the connection's search path says (or a ``schema_translate_map`` for None), also when the
    metadata has a schema of its own: relays and commands find them by the path, too.

    Args:
        metadata: usually ``Base.metadata``.
    """
    new = [table for table in METADATA.sorted_tables if table.name not in metadata.tables]
    schema, metadata.schema = metadata.schema, None  # which a copy would take over
    try:
        for table in new:
            simplify(table.to_metadata(metadata))
    finally:
        metadata.schema = schema
    if new:
        complete(metadata, VERSION)
