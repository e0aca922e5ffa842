"""SQLite: transactions that begin where SQLAlchemy begins them.

Python's driver begins a transaction before the first INSERT, UPDATE or DELETE only. A savepoint that comes earlier is
then a transaction of its own: its RELEASE commits, and what it did survives the rollback of what stands around it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Engine, event

from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["begin_sqlite_transactions"]


def begin_sqlite_transactions(engine: Engine | AsyncEngine) -> None:
    """Makes an SQLite engine begin every transaction at once, so that savepoints roll back with it.

    Call it where the engine is made, before it connects; with a pysqlite or aiosqlite engine. A second time does
    nothing.

    Raises:
        ConfigurationError: the engine is of another database.
    """
    blocking = engine if isinstance(engine, Engine) else engine.sync_engine
    if blocking.dialect.name != "sqlite":
        raise ConfigurationError(f"this engine is for {blocking.dialect.name}, which begins transactions by itself")
    if not event.contains(blocking, "begin", _begin):
        event.listen(blocking, "connect", _let_sqlalchemy_begin)
        event.listen(blocking, "begin", _begin)


def _let_sqlalchemy_begin(driver: Any, _record: object) -> None:
    driver.isolation_level = None


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")
