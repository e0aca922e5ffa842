"""Completes tables for ``create_all`` and Alembic: plain types, storage options, first rows, SQL functions."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, DDL, JSON, TIMESTAMP, Integer, String, event, func, select
from sqlalchemy.dialects.postgresql import ENUM
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from outboxkit._sql import Array, Instant, Xid8
from outboxkit.tables.rules import MAX_SHARDS

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData, Table
    from sqlalchemy.types import TypeEngine

__all__ = ["Script", "complete", "create_functions", "functions", "simplify", "store_small"]

# --- types as Alembic writes them --------------------------------------------------------------------------------


def simplify(table: Table) -> None:
    """Gives the columns types of SQLAlchemy's own, for the same columns in the database.

    A revision that Alembic writes for this table then runs without an import of ours.
    """
    for column in table.c:
        column.type = _simple(column.type)


def _simple(found: TypeEngine[Any]) -> TypeEngine[Any]:
    if isinstance(found, Instant):
        return TIMESTAMP(timezone=True).with_variant(String(32), "sqlite")
    if isinstance(found, Array):
        return ARRAY(found.item).with_variant(JSON(), "sqlite")
    if isinstance(found, Xid8):
        return Integer().with_variant(_Named(name="xid8", schema="pg_catalog", create_type=False), "postgresql")
    return found


class _Named(ENUM):
    """A type that the database has: SQLAlchemy knows no xid8, but an ENUM that is not created is just a name."""

    __module__ = ENUM.__module__  # so that Alembic writes it as a type of SQLAlchemy

    def __repr__(self) -> str:
        # SQLAlchemy 2.0 leaves out that it is not created, and the revision would create it.
        return f"ENUM(name={self.name!r}, schema={self.schema!r}, create_type=False)"


# --- what comes with the tables ----------------------------------------------------------------------------------


def store_small(table: Table) -> None:
    """Has the hot table vacuumed by the number of its dead rows, however large it once was."""
    options = DDL(  # type: ignore[no-untyped-call]  # as DDL: SQLAlchemy 2.0 has no storage parameters of tables
        "ALTER TABLE %(fullname)s SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)"
    )
    event.listen(table, "after_create", options.execute_if(dialect="postgresql"), propagate=True)


def complete(metadata: MetaData, version: int) -> None:
    """Makes ``create_all`` of a metadata that our tables joined write their first rows and the SQL functions."""

    def fill(table: Table, connection: Connection, **_: Any) -> None:
        if table.name == "outbox_version":
            connection.execute(table.insert(), {"id": 1, "version": version, "shards": MAX_SHARDS})
        elif table.name == "outbox_shards":
            connection.execute(table.insert(), [{"shard": shard} for shard in range(MAX_SHARDS)])
        else:
            create_functions(connection)

    for name in ("outbox_version", "outbox_shards", "outbox_waiting"):  # the last of all: functions name the others
        event.listen(metadata.tables[name], "after_create", fill)


class Script(ExecutableDDLElement):
    """A statement as it stands."""

    def __init__(self, statement: str) -> None:
        self.statement = statement


@compiles(Script)
def _as_it_stands(element: Script, _compiler: Any, **_: Any) -> str:
    return element.statement


def create_functions(connection: Connection) -> None:
    """Creates the SQL functions of writers that bypass the ORM, or replaces them.

    Transaction: joins the caller's; does not commit.
    """
    if connection.dialect.name != "postgresql":
        return
    schema = connection.get_execution_options().get("schema_translate_map", {}).get(None)
    found = schema or connection.scalar(select(func.current_schema()))
    for statement in functions("postgresql", connection.dialect.identifier_preparer.quote(found or "public")):
        # Without parameters, because the bodies hold percent signs.
        connection.execute(Script(statement), execution_options={"no_parameters": True})


def functions(dialect: str, schema: str = "") -> list[str]:
    """The statements that create a database's functions, one by one, because not every driver takes several at once.

    Args:
        dialect: as SQLAlchemy names it.
        schema: where our tables are, quoted; empty in a script, which asks when it runs.
    """
    if dialect != "postgresql":
        return []
    # Not by importing the package: it imports this module.
    script = files("outboxkit").joinpath("migrations", "emit.sql").read_text("utf-8")
    *bodies, pinning = [f"{body.strip()}\n$$" for body in script.split("\n$$;\n")[:-1]]
    at, path = (f"{schema}.", f"= {schema}, pg_temp") if schema else ("", "FROM CURRENT")
    statements = [body.replace("{at}", at).replace("{path}", path) for body in bodies]
    return statements if schema else [*statements, pinning]
