"""The tables' own migrations: callable from an application's revision, from `outboxkit db`, or from a test.

Every step is idempotent: it creates what is missing and changes nothing that is there. A database that is newer than
this package is refused, never touched. Rules for a new version: *expand* first (new tables, nullable or defaulted
columns, so that the code of the version before goes on working), *contract* only one release later.

On PostgreSQL the functions ``outboxkit_emit`` and ``outboxkit_capture`` (`emit.sql`) serve writers that bypass the ORM.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from sqlalchemy import Connection, create_mock_engine, inspect, make_url, select, text

from outboxkit import tables
from outboxkit.errors import ConfigurationError
from outboxkit.migrations.expand import expand, lacking, unproven

__all__ = ["check", "current", "sql", "upgrade"]

_SCRIPTS: Final = {"postgresql": "emit.sql"}


def upgrade(connection: Connection, to: int | None = None) -> None:
    """Brings the tables to a version: creates those that are missing and the rows that they need.

    Transaction: joins the caller's; does not commit.
    Guarantee: on PostgreSQL and SQLite all of it or, if the transaction fails, nothing; running it again adds nothing.

    Args:
        connection: as the owner of the tables.
        to: the version to reach; the newest when None.

    Raises:
        ConfigurationError: an unknown version, or the database is newer than this package.
    """
    target = tables.VERSION if to is None else to
    if not 1 <= target <= tables.VERSION:
        raise ConfigurationError(f"there is no version {target} of the tables; expected 1 to {tables.VERSION}")
    found = current(connection)
    if found > target:
        raise ConfigurationError(
            f"the outbox tables have version {found}, newer than {target}: update outboxkit, there is no way back"
        )
    expand(connection)
    _fill(connection, target)
    for function in _functions(connection.dialect.name):
        connection.exec_driver_sql(function, execution_options={"no_parameters": True})  # it holds percent signs


def current(connection: Connection) -> int:
    """The version of the tables in the database, 0 when there are none.

    Transaction: joins the caller's.
    """
    if not inspect(connection).has_table(tables.outbox_version.name):
        return 0
    return connection.scalar(select(tables.outbox_version.c.version)) or 0


def sql(dialect: str) -> str:
    """The same as `upgrade` on an empty database, as a script for people who run their own.

    Args:
        dialect: as SQLAlchemy names it: ``postgresql`` or ``sqlite``.
    """
    statements: list[str] = []

    def collect(statement: Any, *_: Any, **__: Any) -> None:
        compiled = statement.compile(dialect=engine.dialect, compile_kwargs={"literal_binds": True})
        statements.append(str(compiled).strip())

    engine = create_mock_engine(make_url(f"{dialect}://"), collect)
    tables.METADATA.create_all(engine, checkfirst=False)
    collect(tables.outbox_version.insert().values(id=1, version=tables.VERSION, shards=tables.SHARDS))
    for shard in range(tables.SHARDS):
        collect(tables.outbox_shards.insert().values(shard=shard))
    return ";\n\n".join((*statements, *_functions(dialect))) + ";\n"


def check(connection: Connection) -> list[str]:
    """What is wrong with the tables, one sentence each; empty when nothing is.

    Transaction: joins the caller's; only reads.
    """
    found = current(connection)
    if found != tables.VERSION:
        return [f"the tables have version {found or 'none'}, expected {tables.VERSION}: run `outboxkit db upgrade`"]
    inspector = inspect(connection)
    problems: list[str] = []
    for table in tables.METADATA.sorted_tables:
        if not inspector.has_table(table.name):
            problems.append(f"the table {table.name} is missing: run `outboxkit db upgrade`")
            continue
        problems += [f"{table.name} lacks {part}: run `outboxkit db upgrade`" for part in lacking(inspector, table)]
    problems += [
        f"rows of {table} from before the constraint {name} break it: repair or delete them, "
        f"then ALTER TABLE {table} VALIDATE CONSTRAINT {name}"
        for table, name in unproven(connection)
    ]
    return problems + _wrong_rows(connection) + _wrong_sequences(connection)


def _fill(connection: Connection, version: int) -> None:
    rows, shards = tables.outbox_version, tables.outbox_shards
    if connection.execute(rows.update().values(version=version)).rowcount == 0:
        connection.execute(rows.insert().values(id=1, version=version, shards=tables.SHARDS))
    known = set(connection.scalars(select(shards.c.shard)))
    wanted = connection.scalar(select(rows.c.shards)) or tables.SHARDS
    if missing := [{"shard": shard} for shard in range(wanted) if shard not in known]:
        connection.execute(shards.insert(), missing)


def _functions(dialect: str) -> list[str]:
    """The statements that create a database's functions, one by one, because not every driver takes several at once."""
    if dialect not in _SCRIPTS:
        return []
    script = files(__package__).joinpath(_SCRIPTS[dialect]).read_text("utf-8")
    return [f"{function.strip()}\n$$" for function in script.split("\n$$;\n")[:-1]]


def _wrong_rows(connection: Connection) -> list[str]:
    if not inspect(connection).has_table(tables.outbox_shards.name):
        return []
    shards = connection.scalar(select(tables.outbox_version.c.shards))
    numbers = list(connection.scalars(select(tables.outbox_shards.c.shard).order_by(tables.outbox_shards.c.shard)))
    right = numbers == list(range(shards or 0))
    return (
        [] if right else [f"outbox_shards has {len(numbers)} rows, expected 0 to {shards}: run `outboxkit db upgrade`"]
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
