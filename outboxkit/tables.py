"""The tables, portable types included. They join the user's own ``MetaData``, so that Alembic sees them.

State is presence: a row in ``outbox_messages`` is unpublished, a row in ``outbox_waiting`` waits for its instant, its
key or its retry, a row in ``dead_letters`` is dead. There is no status column on the way of a healthy message.

Statements are built from the module's own tables (``tables.outbox_messages``); the copies in the user's metadata have
the same names.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    DDL,
    JSON,
    TIMESTAMP,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
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
    TypeDecorator,
    Uuid,
    bindparam,
    event,
    literal,
    text,
)
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import UserDefinedType

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine

__all__ = [
    "METADATA",
    "SHARDS",
    "VERSION",
    "Instant",
    "any_of",
    "array_literal",
    "database_now",
    "dead_letters",
    "inbox_batches",
    "inbox_messages",
    "inbox_waiting",
    "outbox_audit",
    "outbox_control",
    "outbox_ledger",
    "outbox_messages",
    "outbox_relays",
    "outbox_schemas",
    "outbox_shards",
    "outbox_stopped_keys",
    "outbox_tables",
    "outbox_version",
    "outbox_waiting",
]

VERSION: Final = 1  #: of these tables; stored in ``outbox_version``
SHARDS: Final = 64  #: default number of shards; stored in ``outbox_version`` and read from there by everyone

METADATA: Final = MetaData()

# --- types and functions that differ by database -----------------------------------------------------------------


class Instant(TypeDecorator[datetime]):
    """An aware instant: ``timestamptz``, or sortable UTC text where the database has no such type."""

    impl = TIMESTAMP(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Text on SQLite."""
        return dialect.type_descriptor(String(32) if dialect.name == "sqlite" else TIMESTAMP(timezone=True))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        """UTC, always."""
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Aware, always."""
        del dialect
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        return value  # type: ignore[no-any-return]


class _Array(TypeDecorator[list[Any]]):
    """A list in one column: an array where the database has them, else JSON."""

    impl = JSON
    cache_ok = True

    def __init__(self, item: type[TypeEngine[Any]] | TypeEngine[Any]) -> None:
        super().__init__()
        self.item = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(ARRAY(self.item) if dialect.name == "postgresql" else JSON())

    def bind_processor(self, dialect: Dialect) -> Any:
        # A literal: the driver would adapt each item by itself, and a relay writes thousands a second.
        return array_literal if dialect.name == "postgresql" else super().bind_processor(dialect)

    def process_bind_param(self, value: list[Any] | None, dialect: Dialect) -> Any:
        del dialect
        return value and [str(UUID(bytes=item)) if isinstance(item, bytes) else item for item in value]


def array_literal(items: Sequence[int | bytes] | None) -> str | None:
    """Numbers, or ids of 16 bytes each, as PostgreSQL writes an array."""
    if items is None:
        return None
    if items and isinstance(items[0], bytes):
        return "{" + b"".join(cast("Sequence[bytes]", items)).hex(",", 16) + "}"
    return "{" + ",".join(map(str, items)) + "}"


class _Xid8(UserDefinedType[int]):
    """PostgreSQL's 64-bit transaction id; it never wraps around, ``xmin`` does."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


ischema_names["xid8"] = _Xid8  # so that reflection, and with it Alembic, knows the type of our column


class _CurrentXid(FunctionElement[int]):
    type = BigInteger()
    inherit_cache = True


@compiles(_CurrentXid)
def _no_xid(_element: _CurrentXid, _compiler: Any, **_options: Any) -> str:
    return "NULL"


@compiles(_CurrentXid, "postgresql")
def _postgresql_xid(_element: _CurrentXid, _compiler: Any, **_options: Any) -> str:
    return "pg_current_xact_id()"


class _DatabaseNow(FunctionElement[datetime]):
    type = Instant()
    inherit_cache = True


@compiles(_DatabaseNow, "postgresql")
def _postgresql_now(element: _DatabaseNow, compiler: Any, **options: Any) -> str:
    # clock_timestamp, not now(): now() is the start of the transaction and reverses two writers.
    offset = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {offset}))" if offset else "clock_timestamp()"


@compiles(_DatabaseNow, "sqlite")
def _sqlite_now(element: _DatabaseNow, compiler: Any, **options: Any) -> str:
    offset = compiler.process(element.clauses, **options)
    shift = f", ({offset}) || ' seconds'" if offset else ""
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now'{shift})"


def database_now(offset: timedelta | ColumnElement[float] | None = None) -> ColumnElement[datetime]:
    """The database's own clock, plus an offset: the only clock that leases, retries and due times are compared with.

    Args:
        offset: added to it; an expression is a number of seconds, and null makes the whole null.
    """
    if offset is None:
        return _DatabaseNow()
    return _DatabaseNow(literal(offset.total_seconds()) if isinstance(offset, timedelta) else offset)


class _AnyOf(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


@compiles(_AnyOf, "postgresql")
def _postgresql_any_of(element: _AnyOf, compiler: Any, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} = ANY({values})"


@compiles(_AnyOf, "sqlite")
def _sqlite_any_of(element: _AnyOf, compiler: Any, **options: Any) -> str:
    column, values = (compiler.process(clause, **options) for clause in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({values}))"  # noqa: S608  a column, and a placeholder


def any_of(column: ColumnElement[int], numbers: Collection[int]) -> ColumnElement[bool]:
    """``column IN numbers`` with one bound value: a list of as many values would be compiled again and again."""
    return _AnyOf(column, bindparam(None, sorted(numbers), _Array(SmallInteger())))


_Big: Final = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only an INTEGER PRIMARY KEY


_EMPTY: Final = text("''")  # not "", whose quotes Alembic does not recognise on SQLite


def _identity(name: str) -> Column[int]:
    return Column(name, _Big, Identity(always=True), primary_key=True)


def _message_columns() -> list[Column[Any]]:
    """What makes a stored message: the same in the hot table and in the waiting room."""
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
        Column("recorded_at", Instant, nullable=False, server_default=_DatabaseNow()),
        Column("expires_at", Instant),
    ]


# --- the way out -------------------------------------------------------------------------------------------------

outbox_messages = Table(
    "outbox_messages",
    METADATA,
    Column("xid", _Xid8().with_variant(Integer(), "sqlite"), server_default=_CurrentXid()),
    _identity("position"),
    *_message_columns(),
    Index("outbox_messages_xid", "xid"),
    sqlite_autoincrement=True,  # SQLite would give a deleted highest position out again
    comment="unpublished messages; a relay deletes what the broker acknowledged",
)

event.listen(  # as DDL, because SQLAlchemy 2.0 has no storage parameters of tables
    outbox_messages,
    "after_create",
    DDL(  # type: ignore[no-untyped-call]
        "ALTER TABLE %(fullname)s SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)"
    ).execute_if(dialect="postgresql"),
)

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
    Column("started_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("expires_at", Instant, nullable=False),
    Column("version", Text, nullable=False),
    comment="leases; the id is the fencing token of one start of one relay",
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
    Column("published_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("outcome", String(16), nullable=False),
    Column("min_id", Uuid, nullable=False),
    Column("max_id", Uuid, nullable=False),
    Column("ids", _Array(Uuid()), nullable=False),
    Column("partitions", _Array(Integer()), nullable=False),
    Column("offsets", _Array(BigInteger()), nullable=False),
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
    Column("set_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("until", Instant),
    comment="pauses and kill switches that operators set",
)

outbox_audit = Table(
    "outbox_audit",
    METADATA,
    _identity("id"),
    Column("at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("who", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("why", Text, nullable=False, server_default=_EMPTY),
    comment="who did what, append only",
)

# --- the way in --------------------------------------------------------------------------------------------------

inbox_messages = Table(
    "inbox_messages",
    METADATA,
    Column("consumer", Text, nullable=False),
    Column("source", Text, nullable=False, server_default=_EMPTY),
    Column("message_id", Text, nullable=False),
    Column("content_hash", LargeBinary),
    Column("handled_at", Instant, nullable=False, server_default=_DatabaseNow()),
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
    Column("first_failed_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Index("inbox_waiting_key", "consumer", "topic", "key", "id"),
    Index("inbox_waiting_due", "consumer", "due_at"),
    comment="deliveries that wait: retry (a failed head), follower (behind one)",
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

# --- what failed, and what schemas are in use --------------------------------------------------------------------

dead_letters = Table(
    "dead_letters",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("side", String(8), nullable=False),
    Column("consumer", Text, nullable=False, server_default=_EMPTY),
    Column("state", String(10), nullable=False, server_default="dead"),
    Column("generation", Integer, nullable=False, server_default="0"),
    Column("parent_id", Uuid),
    # the original, byte for byte: never changed
    Column("topic", Text, nullable=False),
    Column("key", LargeBinary),
    Column("message_id", Text, nullable=False),
    Column("source", Text, nullable=False, server_default=_EMPTY),
    Column("type", Text, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("headers", LargeBinary, nullable=False),
    Column("payload", LargeBinary),
    Column("origin", Text, nullable=False, server_default=_EMPTY),
    Column("position", BigInteger),
    # the failure
    Column("failure", String(16), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("error_class", Text, nullable=False),
    Column("error", Text, nullable=False),
    Column("path", Text, nullable=False, server_default=_EMPTY),
    Column("byte_offset", BigInteger),
    Column("attempts", Integer, nullable=False),
    Column("first_failed_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("died_at", Instant, nullable=False, server_default=_DatabaseNow()),
    Column("closed_at", Instant),
    Column("fingerprint", String(16), nullable=False),
    # schema facts
    Column("writer_schema", Text, nullable=False, server_default=_EMPTY),
    Column("reader_schema", Text, nullable=False, server_default=_EMPTY),
    Column("problems", JSON),
    Index("dead_letters_state", "state", "died_at"),
    Index("dead_letters_message", "message_id"),
    comment="messages that could not be published or handled: understood, repaired and replayed from here",
)

outbox_schemas = Table(
    "outbox_schemas",
    METADATA,
    Column("fingerprint", String(64), nullable=False),
    Column("role", String(8), nullable=False),
    Column("consumer", Text, nullable=False, server_default=_EMPTY),
    Column("type", Text, nullable=False),
    Column("text", Text, nullable=False),
    Column("seen_at", Instant, nullable=False, server_default=_DatabaseNow()),
    PrimaryKeyConstraint("fingerprint", "role", "consumer", "type"),
    comment="schemas that writers used and readers read with",
)

outbox_version = Table(
    "outbox_version",
    METADATA,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("version", Integer, nullable=False),
    Column("shards", SmallInteger, nullable=False),
    comment="one row: the version of these tables and the number of shards",
)


def outbox_tables(metadata: MetaData) -> None:
    """Adds outboxkit's tables to an application's metadata, so that ``create_all`` and Alembic include them.

    Calling it twice adds nothing.

    Args:
        metadata: usually ``Base.metadata``.
    """
    for table in METADATA.sorted_tables:
        if table.name not in metadata.tables:
            table.to_metadata(metadata)
