"""Brings tables of an older version to what `outboxkit.tables` describes now, without losing a row.

A new version only adds: tables, columns that are nullable or have a default, indexes, constraints. So nobody writes
statements for that: what the database lacks is found by looking, and added. What a look cannot tell (a column with
another name, an index that is no longer needed) stands in `RENAMED` and `RETIRED`.

PostgreSQL adds to the tables where they are. SQLite cannot add a constraint to a table: a table that lacks anything is
made anew beside the old one and takes over its rows.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Index,
    Inspector,
    MetaData,
    Table,
    exists,
    func,
    insert,
    inspect,
    not_,
    select,
    table,
    text,
)
from sqlalchemy import column as named
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CreateColumn, DropIndex, ExecutableDDLElement, SetTableComment

from outboxkit import tables

__all__ = ["RENAMED", "RETIRED", "expand", "lacking", "unproven"]

#: (table, name in an older version) -> name now.
RENAMED: Final[dict[tuple[str, str], str]] = {
    ("dead_letters", "fingerprint"): "group",
    ("dead_letters", "position"): "source_position",
}
#: Indexes of older versions that others have taken the place of: their entries had no bound.
RETIRED: Final = frozenset(("inbox_waiting_key",))


def expand(connection: Connection) -> None:
    """Adds what the tables lack, and creates those that are missing.

    Transaction: joins the caller's; does not commit. Running it again adds nothing.
    """
    for wanted in tables.METADATA.sorted_tables:
        inspector = inspect(connection)  # a new one each time: it remembers what it has seen
        if not inspector.has_table(wanted.name):
            wanted.create(connection)
        elif connection.dialect.name == "sqlite":
            if _renamed(inspector, wanted) or lacking(inspector, wanted):
                _rebuild(connection, inspector, wanted)
        else:
            _widen(connection, inspector, wanted)
    if connection.dialect.name != "sqlite":
        _prove(connection)


def lacking(inspector: Inspector, wanted: Table) -> list[str]:
    """Lists the columns, indexes and constraints that a table lacks: ``the column due_at``, …"""
    columns, indexes, checks = _present(inspector, wanted)
    lacks = [f"the column {column.name}" for column in wanted.c if column.name not in columns]
    lacks += [f"the index {index.name}" for index in wanted.indexes if index.name not in indexes]
    return lacks + [f"the constraint {check.name}" for check in _checks(wanted) if check.name not in checks]


def unproven(connection: Connection) -> list[tuple[str, str]]:
    """Lists the (table, constraint) pairs that rows from before the constraint break. New rows cannot.

    Transaction: joins the caller's; only reads.
    """
    every = [(wanted, check) for wanted in tables.METADATA.sorted_tables for check in _checks(wanted)]
    if connection.dialect.name != "postgresql":  # where nothing tells, so that the rows must
        broken = [pair for pair in every if connection.scalar(select(exists().where(not_(pair[1].sqltext))))]
        return [(wanted.name, str(check.name)) for wanted, check in broken]
    found = connection.execute(_UNPROVEN, {"names": [str(check.name) for _, check in every]})
    return [(row.relation, row.name) for row in found]


_UNPROVEN: Final = text(
    """
    SELECT c.relname AS relation, k.conname AS name
    FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = current_schema() AND NOT k.convalidated AND k.conname = ANY(:names)
    ORDER BY 1, 2
    """
)


def _present(inspector: Inspector, wanted: Table) -> tuple[set[str], set[str | None], set[str | None]]:
    """The names of the columns, indexes and checks that the database has."""
    return (
        {column["name"] for column in inspector.get_columns(wanted.name)},
        {index["name"] for index in inspector.get_indexes(wanted.name)},
        {check["name"] for check in inspector.get_check_constraints(wanted.name)},
    )


def _checks(wanted: Table) -> list[CheckConstraint]:
    found = [constraint for constraint in wanted.constraints if isinstance(constraint, CheckConstraint)]
    return sorted(found, key=lambda check: str(check.name))


def _renamed(inspector: Inspector, wanted: Table) -> dict[str, str]:
    """The columns that still have their old names: old -> new."""
    present = {column["name"] for column in inspector.get_columns(wanted.name)}
    return {old: new for (of, old), new in RENAMED.items() if of == wanted.name and old in present}


# --- in place ----------------------------------------------------------------------------------------------------


def _widen(connection: Connection, inspector: Inspector, wanted: Table) -> None:
    for old, new in _renamed(inspector, wanted).items():
        connection.execute(_Alter(wanted, "RENAME COLUMN {name} TO {to}", name=old, to=new))
    inspector = inspect(connection)
    columns, indexes, checks = _present(inspector, wanted)
    for column in (column for column in wanted.c if column.name not in columns):
        connection.execute(_Alter(wanted, "ADD COLUMN {column}", column=column))
    for index in (index for index in wanted.indexes if index.name not in indexes):
        index.create(connection)
    for name in indexes & RETIRED:
        connection.execute(DropIndex(Index(name)))
    for check in (check for check in _checks(wanted) if check.name not in checks):
        connection.execute(_Alter(wanted, "ADD {check} NOT VALID", check=check))  # `_prove` looks at the old rows
    if inspector.get_table_comment(wanted.name)["text"] != wanted.comment:
        connection.execute(SetTableComment(wanted))


def _prove(connection: Connection) -> None:
    """Declares the constraints that all rows keep by now as kept; the others go on holding for new rows only."""
    for name, constraint in unproven(connection):
        try:
            with connection.begin_nested():
                wanted = tables.METADATA.tables[name]
                connection.execute(_Alter(wanted, "VALIDATE CONSTRAINT {name}", name=constraint))
        except IntegrityError:
            continue  # `check` tells of it, and the old rows stay


class _Alter(ExecutableDDLElement):
    """``ALTER TABLE … what``, with the names that the dialect quotes."""

    def __init__(
        self,
        altered: Table,
        what: str,
        *,
        name: str = "",
        to: str = "",
        column: Column[Any] | None = None,
        check: CheckConstraint | None = None,
    ) -> None:
        self.altered, self.what, self.name, self.to, self.column, self.check = altered, what, name, to, column, check


@compiles(_Alter)
def _alter(element: _Alter, compiler: Any, **_: Any) -> str:
    prepare = compiler.preparer
    column = "" if element.column is None else compiler.process(CreateColumn(element.column))
    # Not AddConstraint, which takes the constraint out of every later CREATE TABLE.
    check = "" if element.check is None else compiler.process(element.check)
    # SQLAlchemy 2.0 cannot quote an empty name.
    names = {key: name and prepare.quote(name) for key, name in (("name", element.name), ("to", element.to))}
    what = element.what.format(column=column, check=check, **names)
    return f"ALTER TABLE {prepare.format_table(element.altered)} {what}"


# --- anew --------------------------------------------------------------------------------------------------------


def _rebuild(connection: Connection, inspector: Inspector, wanted: Table) -> None:
    """The new table under the old one's name, with its rows and the count that its positions have reached."""
    renamed = _renamed(inspector, wanted)
    present = [column["name"] for column in inspector.get_columns(wanted.name)]
    old = Table(f"{wanted.name}_before", MetaData(), *(Column(name) for name in present))
    for index in inspector.get_indexes(wanted.name):
        connection.execute(DropIndex(Index(index["name"])))
    connection.execute(_Alter(wanted, "RENAME TO {to}", to=old.name))
    wanted.create(connection)
    kept = {name: renamed.get(name, name) for name in present if renamed.get(name, name) in wanted.c}
    taken = {new: old.c[name] for name, new in kept.items() if wanted.c[new].computed is None}
    connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")  # rows from before a constraint stay
    connection.execute(insert(wanted).from_select(list(taken), select(*taken.values())))
    connection.exec_driver_sql("PRAGMA ignore_check_constraints = OFF")
    if wanted.dialect_options["sqlite"]["autoincrement"]:
        _keep_count(connection, wanted.name, old.name)
    old.drop(connection)


def _keep_count(connection: Connection, new: str, old: str) -> None:
    """A position that was given out and deleted must not be given out again."""
    counts = table("sqlite_sequence", named("name"), named("seq"))
    reached = select(func.coalesce(func.max(counts.c.seq), 0)).where(counts.c.name.in_((new, old)))
    seq = connection.scalar(reached)
    connection.execute(counts.delete().where(counts.c.name == new))
    connection.execute(counts.insert().values(name=new, seq=seq))
