"""Statements that run for every message: compiled once, then their text goes to the driver with bound values.

What Core does anew for each call (a cache key, the parameters, a result with its columns) costs more than the driver.
Errors, events and logging of the engine stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy import Connection, UpdateBase

__all__ = ["Prepared"]

_TRANSLATES: Final = "schema_translate_map"
_ROWCOUNT: Final = {"preserve_rowcount": True}


class Prepared:
    """An INSERT or UPDATE of constant text, of which only the number of rows is asked.

    Args:
        make: gives the statement for the name of a dialect; each of its values is a named parameter that needs no
            conversion by SQLAlchemy.
    """

    __slots__ = ("_make", "_texts")

    def __init__(self, make: Callable[[str], UpdateBase]) -> None:
        self._make = make
        self._texts: dict[tuple[str, str, str], tuple[str, list[str] | None]] = {}

    def run(self, connection: Connection, bound: Mapping[str, object]) -> int:
        """Runs it; returns how many rows were written.

        Transaction: joins the caller's.
        """
        if connection.get_execution_options().get(_TRANSLATES):  # names of schemas are put in for each call
            statement = self._make(connection.dialect.name).execution_options(**_ROWCOUNT)
            return connection.execute(statement, bound).rowcount
        text, names = self._text(connection)
        values: Any = bound if names is None else tuple(bound[name] for name in names)
        return connection.exec_driver_sql(text, values).rowcount

    def _text(self, connection: Connection) -> tuple[str, list[str] | None]:
        """The text as this driver takes it, and the order of its values where they have no names."""
        dialect = connection.dialect
        key = dialect.name, dialect.driver, dialect.paramstyle
        found = self._texts.get(key)
        if found is None:
            compiled: Any = self._make(dialect.name).compile(dialect=dialect)
            found = self._texts[key] = compiled.string, compiled.positiontup
        return found
