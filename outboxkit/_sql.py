"""SQL that differs by database: column types, and expressions that compile for each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, cast
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    TIMESTAMP,
    BigInteger,
    Boolean,
    ColumnElement,
    Float,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    TypeDecorator,
    bindparam,
    literal,
)
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import UserDefinedType

from outboxkit.rows import UNREADABLE, microseconds

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine

__all__ = [
    "MICROSECONDS_POSTGRESQL",
    "Array",
    "ClaimedHere",
    "CurrentXid",
    "Instant",
    "Xid8",
    "any_bound",
    "any_of",
    "array_literal",
    "byte_length",
    "contains_bytes",
    "database_now",
    "in_calendar",
    "is_packed",
    "list_length",
    "microseconds_of",
    "seconds_between",
]


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
        # Not strftime, whose years before 1000 have fewer than four digits.
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        """Aware, always."""
        del dialect
        if isinstance(value, str):
            return datetime.fromisoformat(value).replace(tzinfo=UTC)
        return value  # type: ignore[no-any-return]


class Array(TypeDecorator[list[Any]]):
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


class Xid8(UserDefinedType[int]):
    """PostgreSQL's 64-bit transaction id; it never wraps around, ``xmin`` does."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "pg_catalog.xid8"


ischema_names["xid8"] = Xid8  # so that reflection, and with it Alembic, knows the type of our column


class CurrentXid(FunctionElement[int]):
    type = BigInteger()
    inherit_cache = True


@compiles(CurrentXid)
def _no_xid(_element: CurrentXid, _compiler: Any, **_options: Any) -> str:
    return "NULL"


@compiles(CurrentXid, "postgresql")
def _postgresql_xid(_element: CurrentXid, _compiler: Any, **_options: Any) -> str:
    return "pg_current_xact_id()"


class ClaimedHere(FunctionElement[bytes]):
    """The mark of a claim that the current transaction has not finished.

    On PostgreSQL it names the transaction, so that an end of the transaction by any door is noticed; elsewhere it is
    the parameter that was given.
    """

    type = LargeBinary()
    inherit_cache = True


@compiles(ClaimedHere)
def _given_claim(element: ClaimedHere, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


@compiles(ClaimedHere, "postgresql")
def _postgresql_claim(element: ClaimedHere, compiler: Any, **options: Any) -> str:
    given = compiler.process(element.clauses, **options)
    return f"({given}::bytea || convert_to(pg_current_xact_id()::text, 'UTF8'))"


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


class _Microseconds(TypeDecorator[int]):
    """An instant as a number; what is not between the years 1 and 9999 is `UNREADABLE`, and raises nothing."""

    impl = BigInteger
    cache_ok = True

    def process_result_value(self, value: Any, dialect: Dialect) -> int | None:
        """PostgreSQL has counted already."""
        del dialect
        if value is None or isinstance(value, int):
            return value
        try:
            return microseconds(datetime.fromisoformat(str(value)).replace(tzinfo=UTC))
        except ValueError:
            return UNREADABLE


class _MicrosecondsOf(FunctionElement[int]):
    type = _Microseconds()
    inherit_cache = True


#: {0}: a column. Up to the last day but one, so that no rounding leads out of the calendar.
MICROSECONDS_POSTGRESQL: Final = (
    "CASE WHEN {0} >= '0001-01-01 00:00+00' AND {0} < '9999-12-31 00:00+00' "
    "THEN (date_part('epoch', {0}) * 1000000)::bigint "
    f"WHEN {{0}} IS NOT NULL THEN {UNREADABLE} END"
)


@compiles(_MicrosecondsOf, "postgresql")
def _postgresql_microseconds(element: _MicrosecondsOf, compiler: Any, **options: Any) -> str:
    return MICROSECONDS_POSTGRESQL.format(compiler.process(element.clauses, **options))


@compiles(_MicrosecondsOf, "sqlite")
def _sqlite_microseconds(element: _MicrosecondsOf, compiler: Any, **options: Any) -> str:
    return str(compiler.process(element.clauses, **options))


def microseconds_of(instant: ColumnElement[datetime] | ColumnElement[datetime | None]) -> ColumnElement[int]:
    """The instant as microseconds since 1970, whatever a program has written there: reading it never raises."""
    return _MicrosecondsOf(instant)


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
    return _AnyOf(column, bindparam(None, sorted(numbers), Array(SmallInteger())))


def any_bound(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """As `any_of`, for a list that is bound under this name later: the statement is made once."""
    return _AnyOf(column, bindparam(name, type_=Array(column.type)))


class _ListLength(FunctionElement[int]):
    type = Integer()
    inherit_cache = True


@compiles(_ListLength, "postgresql")
def _postgresql_list_length(element: _ListLength, compiler: Any, **options: Any) -> str:
    return f"cardinality({compiler.process(element.clauses, **options)})"


@compiles(_ListLength, "sqlite")
def _sqlite_list_length(element: _ListLength, compiler: Any, **options: Any) -> str:
    return f"json_array_length({compiler.process(element.clauses, **options)})"


def list_length(column: ColumnElement[Any]) -> ColumnElement[int]:
    """The number of items of an `Array`."""
    return _ListLength(column)


# --- what constraints say ----------------------------------------------------------------------------------------


class _ByteLength(FunctionElement[int]):
    type = Integer()
    inherit_cache = True


@compiles(_ByteLength)
def _byte_length(element: _ByteLength, compiler: Any, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(_ByteLength, "sqlite")
def _sqlite_byte_length(element: _ByteLength, compiler: Any, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"


def byte_length(column: ColumnElement[Any]) -> ColumnElement[int]:
    """The number of bytes of a text or of bytes."""
    return _ByteLength(column)


class _ContainsBytes(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


@compiles(_ContainsBytes, "postgresql")
def _postgresql_contains(element: _ContainsBytes, compiler: Any, **options: Any) -> str:
    column, part = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(position({part}::bytea in {column}) > 0)"


@compiles(_ContainsBytes, "sqlite")
def _sqlite_contains(element: _ContainsBytes, compiler: Any, **options: Any) -> str:
    column, part = (compiler.process(clause, **options) for clause in element.clauses)
    return f"(instr({column}, {part}) > 0)"


def contains_bytes(column: ColumnElement[bytes], part: bytes) -> ColumnElement[bool]:
    """True where these bytes stand somewhere in the column. No index serves it."""
    return _ContainsBytes(column, literal(part, LargeBinary()))


class _IsPacked(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


@compiles(_IsPacked, "postgresql")
def _postgresql_is_packed(element: _IsPacked, compiler: Any, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    return f"(get_byte({value} || '\\x01'::bytea, 0) BETWEEN 0 AND 3)"  # no byte at all is fine, too


@compiles(_IsPacked, "sqlite")
def _sqlite_is_packed(element: _IsPacked, compiler: Any, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    return f"(substr({value}, 1, 1) IN (x'', x'00', x'01', x'02', x'03'))"


def is_packed(headers: ColumnElement[bytes]) -> ColumnElement[bool]:
    """True for headers that begin as `outboxkit.headers.pack_headers` begins them, or are empty."""
    return _IsPacked(headers)


class _InCalendar(FunctionElement[bool]):
    type = Boolean()
    inherit_cache = True


@compiles(_InCalendar, "postgresql")
def _postgresql_in_calendar(element: _InCalendar, compiler: Any, **options: Any) -> str:
    value = compiler.process(element.clauses, **options)
    return f"({value} >= '0001-01-01 00:00:00+00' AND {value} < '10000-01-01 00:00:00+00')"


@compiles(_InCalendar, "sqlite")
def _sqlite_in_calendar(element: _InCalendar, compiler: Any, **options: Any) -> str:
    # As `Instant` writes it, which sorts as text. Not the fraction, which SQLite would round up to the next second. And
    # only a calculation notices the 31st of February.
    value = compiler.process(element.clauses, **options)
    second = f"substr({value}, 1, 19)"
    return (
        f"({value} >= '0001' AND datetime({second}, '+0 days') IS {second} "
        f"AND (length({value}) = 19 OR substr({value}, 20) GLOB '.[0-9]*'))"
    )


def in_calendar(instant: ColumnElement[datetime]) -> ColumnElement[bool]:
    """True for an instant of the years 1 to 9999, which Python can hold; false for ``infinity``. Null stays null."""
    return _InCalendar(instant)


class _SecondsBetween(FunctionElement[float]):
    type = Float()
    inherit_cache = True


@compiles(_SecondsBetween, "postgresql")
def _postgresql_seconds_between(element: _SecondsBetween, compiler: Any, **options: Any) -> str:
    earlier, later = (compiler.process(clause, **options) for clause in element.clauses)
    return f"extract(epoch FROM {later} - {earlier})"


@compiles(_SecondsBetween, "sqlite")
def _sqlite_seconds_between(element: _SecondsBetween, compiler: Any, **options: Any) -> str:
    earlier, later = (compiler.process(clause, **options) for clause in element.clauses)
    return f"((julianday({later}) - julianday({earlier})) * 86400.0)"


def seconds_between(earlier: ColumnElement[datetime], later: ColumnElement[datetime]) -> ColumnElement[float]:
    """The time from one instant to another, negative when it is the other way round."""
    return _SecondsBetween(earlier, later)
