"""Legible columns: reading them raises nothing, whatever a program has written there. For what people are shown.

A database or a driver refuses bytes that are no text, an instant outside of the calendar, an id that is no UUID, and
with such a value every row beside it. Here each column is asked for as it is stored, and made a value one by one.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import UUID

from sqlalchemy import ColumnElement, String, TypeDecorator, Uuid, type_coerce
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import NullType

from outboxkit._sql import MICROSECONDS_POSTGRESQL, Instant
from outboxkit.rows import UNREADABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Dialect

__all__ = ["Lost", "as_stored", "flaw_of", "legible"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Lost(str):
    """The text of a stored value that is none of its column's kind, as it can be shown; ``kind`` is what it is not."""

    __slots__ = ("kind",)
    kind: str

    def __new__(cls, text: str, kind: str = "") -> Self:  # a kind may come later: copies are made like that
        found = super().__new__(cls, text)
        found.kind = kind
        return found


def flaw_of(row: Mapping[str, Any]) -> str:
    """Says which columns of a row hold what they cannot; empty when none does."""
    lost = [f"{name} is no {value.kind}" for name, value in row.items() if isinstance(value, Lost)]
    return ", ".join(lost)


def legible(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The column under its name, whose values are what it should hold, or `Lost`."""
    kinds = {Instant: _Instant, Uuid: _Id, String: _Text}
    reader = next((reader for kind, reader in kinds.items() if isinstance(column.type, kind)), _Bytes)
    return type_coerce(as_stored(column), reader()).label(column.key)


class _AsStored(FunctionElement[Any]):
    type = NullType()
    inherit_cache = True


def as_stored(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The bytes of a column as they are stored; of one whose values are sound on this database, the column itself."""
    return _AsStored(column)


@compiles(_AsStored)
def _sqlite_as_stored(element: _AsStored, compiler: Any, **options: Any) -> str:
    """A column of a file holds any kind of value."""
    return f"CAST({compiler.process(element.clauses, **options)} AS BLOB)"


@compiles(_AsStored, "postgresql")
def _postgresql_as_stored(element: _AsStored, compiler: Any, **options: Any) -> str:
    (column,) = element.clauses
    name = compiler.process(column, **options)
    if isinstance(column.type, Instant):
        return f"({MICROSECONDS_POSTGRESQL.format(name)})"
    # SQL_ASCII means: as they are. Any other encoding would be a conversion, which is what cannot be done.
    return f"convert_to({name}, 'SQL_ASCII')" if isinstance(column.type, String) else str(name)


class _Stored(TypeDecorator[Any]):
    """A value that comes as bytes, but where the database holds nothing else than its kind."""

    impl = NullType
    cache_ok = True
    kind = "value"

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """Made from its bytes; what cannot be made is lost."""
        del dialect
        if not isinstance(value, bytes | memoryview):
            return self.of_number(value) if isinstance(value, int) else value
        try:
            return self.of_bytes(bytes(value))
        except ValueError:
            return Lost(bytes(value).decode("utf-8", "backslashreplace"), self.kind)

    def of_bytes(self, stored: bytes) -> Any:
        return stored

    def of_number(self, number: int) -> Any:
        return number


class _Bytes(_Stored):
    """Bytes, also where a program has stored text or a number as them."""

    cache_ok = True


class _Text(_Stored):
    cache_ok = True
    kind = "text"

    def of_bytes(self, stored: bytes) -> str:
        return stored.decode()


class _Id(_Stored):
    cache_ok = True
    kind = "UUID of 32 digits"  # in any other form no statement of ours finds it

    def of_bytes(self, stored: bytes) -> UUID:
        found = UUID(stored.decode())
        if found.hex != stored.decode():
            raise ValueError(found)
        return found


class _Instant(_Stored):
    cache_ok = True
    kind = "instant between the years 1 and 9999"

    def of_bytes(self, stored: bytes) -> datetime:
        return datetime.fromisoformat(stored.decode()).replace(tzinfo=UTC)

    def of_number(self, number: int) -> Any:
        return Lost("infinity", self.kind) if number == UNREADABLE else _EPOCH + timedelta(microseconds=number)
