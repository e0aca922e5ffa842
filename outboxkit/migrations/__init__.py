"""The tables' own migrations: callable from an application's revision, from `outboxkit db`, or from a test.

Every step is idempotent: it creates what is missing and changes nothing that is there. A database that is newer than
this package is refused, never touched. Rules for a new version: *expand* first (new tables, nullable or defaulted
columns, so that the code of the version before goes on working), *contract* only one release later.

On PostgreSQL the functions ``outboxkit_emit`` and ``outboxkit_capture`` (`emit.sql`) serve writers that bypass the ORM.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Connection, create_mock_engine, inspect, make_url, select, text
from sqlalchemy.engine.mock import MockConnection
from sqlalchemy.schema import CreateSchema

from outboxkit import tables
from outboxkit.errors import ConfigurationError
from outboxkit.migrations.expand import expand, lacking, unproven
from outboxkit.migrations.roles import foreign_grants
from outboxkit.tables.completion import Script, create_functions, functions

__all__ = ["check", "create_schema", "current", "shape", "sql", "upgrade"]

_TABLES: Final = tables.METADATA.sorted_tables


def upgrade(connection: Connection | MockConnection, to: int | None = None) -> None:
    """Brings the tables to a version: creates those that are missing and the rows that they need.

    Transaction: joins the caller's; does not commit.
    Guarantee: on PostgreSQL and SQLite all of it or, if the transaction fails, nothing; running it again adds nothing.

    Args:
        connection: as the owner of the tables; ``op.get_bind()`` in a revision of Alembic. When Alembic writes a script
            (``--sql``), the script is for an empty database, because nothing can be looked at.
        to: the version to reach; the newest when None.

    Raises:
        ConfigurationError: an unknown version, the database is newer than this package, or a script is asked for a
            step from one version to the next.
    """
    target = tables.VERSION if to is None else to
    if not 1 <= target <= tables.VERSION:
        raise ConfigurationError(f"there is no version {target} of the tables; expected 1 to {tables.VERSION}")
    if isinstance(connection, MockConnection):
        return _write_script(connection, to)
    found = current(connection)
    if found > target:
        raise ConfigurationError(
            f"the outbox tables have version {found}, newer than {target}: update outboxkit, there is no way back"
        )
    expand(connection)
    _fill(connection, target)
    create_functions(connection)
    return None


def create_schema(connection: Connection, name: str) -> None:
    """Creates the schema that the tables are to be in, unless it is there.

    Transaction: joins the caller's; does not commit.
    """
    if name not in inspect(connection).get_schema_names():
        connection.execute(CreateSchema(name))


def _write_script(connection: MockConnection, to: int | None) -> None:
    if to is not None and to > 1:
        raise ConfigurationError(
            f"the step to version {to} of the tables looks at the database, and a script (--sql) is written without one"
        )
    for statement in _statements(connection.dialect.name):
        connection.execute(Script(statement))


def current(connection: Connection) -> int:
    """The version of the tables in the database, 0 when there are none.

    Transaction: joins the caller's.
    """
    inspector = inspect(connection)
    if not inspector.has_table(tables.outbox_version.name):
        return 0
    found: int | None = connection.scalar(select(tables.outbox_version.c.version))
    if found is not None:
        return found
    # Emptied, as test suites do: the tables themselves tell.
    whole = all(inspector.has_table(table.name) and not lacking(inspector, table) for table in _TABLES)
    return tables.VERSION if whole else 1


def sql(dialect: str) -> str:
    """The same as `upgrade` on an empty database, as a script for people who run their own.

    Args:
        dialect: as SQLAlchemy names it: ``postgresql`` or ``sqlite``.
    """
    return ";\n\n".join(_statements(dialect)) + ";\n"


def _statements(dialect: str) -> list[str]:
    statements: list[str] = []

    def collect(statement: Any, *_: Any, **__: Any) -> None:
        compiled = statement.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
        statements.append(str(compiled).strip())

    engine = create_mock_engine(make_url(f"{dialect}://"), collect)
    tables.METADATA.create_all(engine, checkfirst=False)
    collect(tables.outbox_version.insert().values(id=1, version=tables.VERSION, shards=tables.SHARDS))
    for shard in range(tables.SHARDS):
        collect(tables.outbox_shards.insert().values(shard=shard))
    return [*statements, *functions(dialect)]


def check(connection: Connection) -> list[str]:
    """Lists what is wrong with the tables, one sentence each; empty when nothing is.

    Transaction: joins the caller's; only reads.
    """
    problems = shape(connection)
    if current(connection) != tables.VERSION:
        return problems
    return [*problems, *_wrong_sequences(connection), *foreign_grants(connection)]


def shape(connection: Connection) -> list[str]:
    """Lists what the tables lack, one sentence each: ``what is wrong: what to run``.

    Transaction: joins the caller's; only reads.
    """
    found = current(connection)
    if found == 0:
        return [tables.MISSING]
    if found != tables.VERSION:
        return [f"the tables have version {found}, expected {tables.VERSION}: run `outboxkit db upgrade`"]
    inspector = inspect(connection)
    problems: list[str] = []
    for table in _TABLES:
        if not inspector.has_table(table.name):
            problems.append(f"the table {table.name} is missing: run `outboxkit db upgrade`")
            continue
        problems += [f"{table.name} lacks {part}: run `outboxkit db upgrade`" for part in lacking(inspector, table)]
    problems += [
        f"rows of {table} from before the constraint {name} break it: repair or delete them, then run `db upgrade`"
        for table, name in unproven(connection)
    ]
    return [*problems, *_wrong_rows(connection)]


def _fill(connection: Connection, version: int) -> None:
    rows, shards = tables.outbox_version, tables.outbox_shards
    if connection.execute(rows.update().values(version=version)).rowcount == 0:
        connection.execute(rows.insert().values(id=1, version=version, shards=tables.SHARDS))
    known = set(connection.scalars(select(shards.c.shard)))
    wanted = connection.scalar(select(rows.c.shards)) or tables.SHARDS
    if missing := [{"shard": shard} for shard in range(wanted) if shard not in known]:
        connection.execute(shards.insert(), missing)


def _wrong_rows(connection: Connection) -> list[str]:
    if not inspect(connection).has_table(tables.outbox_shards.name):
        return []
    shards = connection.scalar(select(tables.outbox_version.c.shards))
    numbers = list(connection.scalars(select(tables.outbox_shards.c.shard).order_by(tables.outbox_shards.c.shard)))
    # A relay makes them anew when all are gone.
    right = not numbers or numbers == list(range(shards or tables.SHARDS))
    return (
        []
        if right
        else [f"outbox_shards has {len(numbers)} rows, expected {shards or tables.SHARDS}: run `outboxkit db upgrade`"]
    )


def _wrong_sequences(connection: Connection) -> list[str]:
    """Order needs a sequence without a cache: two sessions that each hold a block of numbers would reverse a key."""
    if connection.dialect.name != "postgresql":
        return []
    caches = text(
        "SELECT sequencename, cache_size FROM pg_sequences "
        "WHERE schemaname = current_schema() AND sequencename = 'outbox_messages_position_seq'"
    )
    return [
        f"the sequence {name} has CACHE {size}, expected 1: ALTER SEQUENCE {name} CACHE 1"
        for name, size in connection.execute(caches)
        if size != 1
    ]
