"""The tables' own migrations: callable from an application's revision, from `outboxkit db`, or from a test.

Every step is idempotent: it creates what is missing and changes nothing that is there. A database that is newer than
this package is refused, never touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import inspect, select

from outboxkit import tables
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["upgrade"]


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
            f"the outbox tables have version {found}, newer than {target}: update outboxkit, there is no way back",
        )
    tables.METADATA.create_all(connection)
    _fill(connection, target)


def current(connection: Connection) -> int:
    """The version of the tables in the database, 0 when there are none.

    Transaction: joins the caller's.
    """
    if not inspect(connection).has_table(tables.outbox_version.name):
        return 0
    return connection.scalar(select(tables.outbox_version.c.version)) or 0


def _fill(connection: Connection, version: int) -> None:
    rows, shards = tables.outbox_version, tables.outbox_shards
    if connection.execute(rows.update().values(version=version)).rowcount == 0:
        connection.execute(rows.insert().values(id=1, version=version, shards=tables.SHARDS))
    known = set(connection.scalars(select(shards.c.shard)))
    if missing := [{"shard": shard} for shard in range(tables.SHARDS) if shard not in known]:
        connection.execute(shards.insert(), missing)
