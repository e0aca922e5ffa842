"""Messages become rows: the INSERT of the write side, one statement however many messages.

It runs inside the applications' own transactions, so it is made to cost little. Where the database has arrays, many
rows travel as one text for each column, and a single row by a statement that was compiled before, with values that the
driver sends as they are. All run on SQLAlchemy's connection: logging, cursor events, quoting and
``schema_translate_map`` work as for any other statement.

The database computes the shard from the number of shards that is stored there: a process that has been running since
before that number changed cannot put a row where nobody reads.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import ARRAY, Float, Integer, MetaData, Text, bindparam, cast, column, func, literal_column, select
from sqlalchemy.types import UserDefinedType

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dialects import dialect_of
from outboxkit.headers import packed_headers
from outboxkit.message import Message
from outboxkit.rows import WaitReason, shard_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Table
    from sqlalchemy.sql.dml import Insert
    from sqlalchemy.types import TypeEngine

__all__ = ["insert_messages", "insert_waiting", "stored_id"]

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_MAX_BYTES: Final = 8_000_000  # of payload in one statement: PostgreSQL takes 1 GB, memory is dear long before
_CANONICAL: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")

# The first two bytes of the hash that spreads messages over shards; the database takes it modulo its number of shards.
_SPREAD: Final = "spread"
_ALL: Final = 1 << 16
_NO_ID: Final = UUID(int=0)
_NAMES: Final = (
    "message_id",
    "topic",
    "key",
    "type",
    "kind",
    "payload",
    "headers",
    "content_type",
    "schema_fingerprint",
    "occurred_at",
    "expires_at",
)
_BINDS: Final = tuple(f"_{name}" for name in (_SPREAD, *_NAMES))  # a bind may not be called as a column


def insert_messages(connection: Connection, messages: Sequence[Message]) -> None:
    """Inserts messages as unpublished rows, in order.

    Transaction: joins the caller's; does not commit.
    """
    if not dialect_of(connection).features.arrays:
        connection.execute(_TYPED, [_typed(message) for message in messages])
    elif len(messages) == 1:
        _insert_one(connection, messages[0])
    else:
        for part in _parts(messages):
            connection.execute(_MANY, _arrays([_values(message) for message in part]))


def _insert_one(connection: Connection, message: Message) -> None:
    """SQLAlchemy's way from a statement to text and values costs more than the row, so the text is kept."""
    schema = connection.get_execution_options().get("schema_translate_map", {}).get(None)
    known = _COMPILED.setdefault(connection.dialect, {})
    compiled = known.get(schema)
    if compiled is None:
        compiled = known[schema] = _raw(schema).compile(dialect=connection.dialect)
    values = dict(zip(_BINDS, _values(message), strict=True))
    places = compiled.positiontup
    connection.exec_driver_sql(compiled.string, values if places is None else tuple(values[name] for name in places))


def insert_waiting(connection: Connection, messages: Sequence[tuple[Message, datetime | timedelta]]) -> None:
    """Inserts messages into the waiting room, each with its instant, or a time after now by the database's clock.

    Transaction: joins the caller's; does not commit.
    """
    rows = [
        {
            **_typed(message),
            "_due": None if isinstance(due, timedelta) else due,
            "_delay": due.total_seconds() if isinstance(due, timedelta) else None,
        }
        for message, due in messages
    ]
    connection.execute(_SCHEDULED, rows)


def stored_id(message_id: str) -> UUID:
    """The id of a row: the message's own when it is a UUID, else derived from it (foreign messages in a replay)."""
    try:
        return UUID(message_id)
    except ValueError:
        return uuid5(NAMESPACE_URL, message_id)


# --- statements --------------------------------------------------------------------------------------------------


class _Raw(UserDefinedType[Any]):
    """A value that the driver sends by itself, without a detour through SQLAlchemy's types."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        raise NotImplementedError  # a value, never a column


def _shard(spread: Any, version: Table = tables.outbox_version) -> Any:
    stored = select(version.c.shards).scalar_subquery()
    return cast(spread, Integer) % func.coalesce(stored, literal_column(str(tables.SHARDS)))


def _statement(table: Table, type_of: Any, version: Table = tables.outbox_version, **more: Any) -> Insert:
    given = {name: bindparam(f"_{name}", type_=type_of(table.c[name])) for name in _NAMES}
    shard = _shard(bindparam(f"_{_SPREAD}", type_=Integer()), version)
    return table.insert().inline().values(shard=shard, **given, **more)


def _raw(schema: str | None) -> Any:
    """The statement for one row, in the schema that ``schema_translate_map`` says."""
    there, both = MetaData(), (_HOT, tables.outbox_version)
    hot, version = both if schema is None else [table.to_metadata(there, schema=schema) for table in both]
    return _statement(hot, lambda _: _Raw(), version)


def _own_type(of: Any) -> TypeEngine[Any]:
    found: TypeEngine[Any] = of.type
    return found


def _many() -> Insert:
    names = (_SPREAD, *_NAMES)
    types = {_SPREAD: Integer(), **{name: _HOT.c[name].type for name in _NAMES}}
    arrays = [cast(bindparam(f"_{name}", type_=Text()), ARRAY(types[name])) for name in names]
    given = func.unnest(*arrays).table_valued(
        *(column(name, types[name]) for name in names), with_ordinality="place", name="given"
    )
    given = given.render_derived()
    rows = select(_shard(given.c[_SPREAD]), *(given.c[name] for name in _NAMES)).order_by(given.c.place)
    return _HOT.insert().inline().from_select(["shard", *_NAMES], rows)


_TYPED: Final = _statement(_HOT, _own_type)
_COMPILED: Final[weakref.WeakKeyDictionary[Dialect, dict[str | None, Any]]] = weakref.WeakKeyDictionary()
_MANY: Final = _many()
_SCHEDULED: Final = _statement(
    _WAITING,
    _own_type,
    reason=WaitReason.SCHEDULED,
    due_at=func.coalesce(
        bindparam("_due", type_=_WAITING.c.due_at.type), database_now(bindparam("_delay", type_=Float()))
    ),
)


# --- values ------------------------------------------------------------------------------------------------------


def _typed(message: Message) -> dict[str, Any]:
    return {**dict(zip(_BINDS, _values(message), strict=True)), "_message_id": stored_id(message.id)}


def _values(message: Message) -> tuple[Any, ...]:
    """The values of a row, in the order of `_BINDS`."""
    by_key = message.key is not None and _CANONICAL.fullmatch(message.id)  # then nobody needs the id's bytes
    found = _NO_ID if by_key else stored_id(message.id)
    return (
        shard_of(message.topic, message.key, found, _ALL),
        message.id if by_key else str(found),
        message.topic,
        message.key,
        message.type,
        message.kind.value,
        message.payload,
        packed_headers(message),
        message.content_type,
        message.schema or None,
        message.occurred_at or datetime.now(UTC),  # no expression: one statement takes many rows
        message.expires_at,
    )


def _parts(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """All of them at once, unless they are so large that a statement should not hold them."""
    start, size = 0, 0
    for at, message in enumerate(messages):
        size += len(message.payload)
        if size > _MAX_BYTES and at > start:
            yield messages[start:at]
            start, size = at, len(message.payload)
    yield messages[start:] if start else messages


def _arrays(rows: Sequence[tuple[Any, ...]]) -> dict[str, str]:
    """Each column of the rows as the text of an array."""
    columns = zip(_BINDS, _WRITE, zip(*rows, strict=True), strict=True)
    return {bind: "{" + ",".join(map(write, column)) + "}" for bind, write, column in columns}


@functools.lru_cache(maxsize=1024)
def _text(value: str | None) -> str:
    """An element of an array; topics and types repeat."""
    if value is None:
        return "NULL"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _binary(value: bytes | None) -> str:
    return "NULL" if value is None else f'"\\\\x{value.hex()}"'


def _instant(value: datetime | None) -> str:
    return "NULL" if value is None else f'"{value}"'


_WRITE: Final[tuple[Callable[[Any], str], ...]] = (
    str,
    str,
    _text,
    _binary,
    _text,
    _text,
    _binary,
    _binary,
    _text,
    _text,
    _instant,
    _instant,
)
