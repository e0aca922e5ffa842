"""Row-level security: who may see and write which rows, where a right on the whole table is too wide. PostgreSQL only.

An application records the schemas that it writes with, and no consumer's reader: by that, replays are judged. And where
consumers do not trust each other, each login sees the rows of its own consumers only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Text, case, cast, func, or_, true
from sqlalchemy.dialects.postgresql import array
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import ExecutableDDLElement

from outboxkit import tables

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection, Table

__all__ = ["PREFIX", "keep_readers_to_consumers", "separate_consumers"]

PREFIX: Final = "outboxkit_"  #: begins the roles' names
_SCHEMAS: Final = tables.outbox_schemas
_EVERY_ROW: Final = "outboxkit_every_row"
_OWN_ROWS: Final = "outboxkit_own_rows"
_BY_CONSUMER: Final = tuple(table for table in tables.METADATA.sorted_tables if "consumer" in table.c)


def keep_readers_to_consumers(connection: Connection, prefix: str = PREFIX) -> None:
    """Lets everybody read schemas, applications add those that they write with, and consumers keep their readers.

    Transaction: joins the caller's; does not commit. Running it again changes nothing.
    """
    _enable(connection, _SCHEMAS)
    _policy(connection, _SCHEMAS, "outboxkit_read", "FOR SELECT TO PUBLIC USING ({rows})", rows=true())
    is_writer, add = _SCHEMAS.c.role == "writer", "FOR INSERT TO {role} WITH CHECK ({rows})"
    _policy(connection, _SCHEMAS, "outboxkit_write", add, rows=is_writer, role=prefix + "app")
    _policy(connection, _SCHEMAS, _EVERY_ROW, "FOR ALL TO {role} USING ({rows})", rows=true(), role=prefix + "consumer")


def separate_consumers(connection: Connection, logins: Mapping[str, Collection[str]], prefix: str = PREFIX) -> None:
    """Lets each login that is a consumer see and write the rows of its own consumers only; others see none.

    Relays, repairers, operators and the owner see all rows as before. Without logins it takes the separation back.

    Transaction: joins the caller's; does not commit. Running it again changes nothing.

    Args:
        connection: as the owner of the tables.
        logins: login -> the names of its consumers.
        prefix: of the roles' names, as `create_roles` was given it.
    """
    for table in _BY_CONSUMER:
        if not logins:
            connection.execute(_Policy(table, "DROP POLICY IF EXISTS {name} ON {table}", name=_OWN_ROWS))
            continue
        _enable(connection, table)
        if table is not _SCHEMAS:  # which has narrower ones
            _policy(connection, table, _EVERY_ROW, "FOR ALL TO PUBLIC USING ({rows})", rows=true())
        own = "AS RESTRICTIVE FOR ALL TO {role} USING ({rows})"
        _policy(connection, table, _OWN_ROWS, own, rows=_own_rows(table, logins), role=prefix + "consumer")


def _own_rows(table: Table, logins: Mapping[str, Collection[str]]) -> ColumnElement[bool]:
    """The rows of the consumers of who asks; what writes a type belongs to nobody, a replay to both its consumers."""
    named = {login: array(sorted(consumers), type_=Text) for login, consumers in sorted(logins.items())}
    mine = func.any(case(named, value=cast(func.current_user(), Text)))
    own = [table.c.consumer == mine]
    if table is _SCHEMAS:
        own.append(table.c.role == "writer")
    if "replay_to" in table.c:
        own.append(table.c.replay_to == mine)
    return or_(*own)


def _enable(connection: Connection, table: Table) -> None:
    connection.execute(_Policy(table, "ALTER TABLE {table} ENABLE ROW LEVEL SECURITY"))


def _policy(
    connection: Connection, table: Table, name: str, what: str, *, rows: ColumnElement[bool], role: str = ""
) -> None:
    """Creates a policy in place of the one of that name."""
    connection.execute(_Policy(table, "DROP POLICY IF EXISTS {name} ON {table}", name=name))
    connection.execute(_Policy(table, "CREATE POLICY {name} ON {table} " + what, name=name, role=role, rows=rows))


class _Policy(ExecutableDDLElement):
    """A statement about the rows of a table, with the names that the dialect quotes."""

    def __init__(
        self, table: Table, what: str, *, name: str = "", role: str = "", rows: ColumnElement[bool] | None = None
    ) -> None:
        self.table, self.what, self.name, self.role, self.rows = table, what, name, role, rows


@compiles(_Policy)
def _compile(element: _Policy, compiler: Any, **_: Any) -> str:
    prepare, sql = compiler.preparer, compiler.sql_compiler
    rows = "" if element.rows is None else sql.process(element.rows, literal_binds=True, include_table=False)
    names = {key: name and prepare.quote(name) for key, name in (("name", element.name), ("role", element.role))}
    return element.what.format(table=prepare.format_table(element.table), rows=rows, **names)
