"""One database with the shop's tables, reached by one driver: every edge runs on each of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from outboxkit import migrations, tables
from outboxkit.capture import begin_sqlite_transactions
from tests.integration.capture.model import Base


@dataclass(frozen=True, slots=True)
class CaptureDatabase:
    """The application's engine under test, and one of our own to look at what is committed."""

    engine: Engine | AsyncEngine
    observer: Engine

    @property
    def is_async(self) -> bool:
        return isinstance(self.engine, AsyncEngine)

    @property
    def sync_engine(self) -> Engine:
        return self.engine.sync_engine if isinstance(self.engine, AsyncEngine) else self.engine

    @property
    def async_engine(self) -> AsyncEngine:
        assert isinstance(self.engine, AsyncEngine)
        return self.engine

    def run(self, scenario: Callable[[Session], Any], **options: Any) -> Any:
        """Runs a scenario on a session; on an asyncio driver inside `AsyncSession.run_sync`."""
        if isinstance(self.engine, AsyncEngine):
            return asyncio.run(self._run(scenario, options))
        with Session(self.engine, **options) as session:
            return scenario(session)

    async def _run(self, scenario: Callable[[Session], Any], options: dict[str, Any]) -> Any:
        assert isinstance(self.engine, AsyncEngine)
        try:
            async with AsyncSession(self.engine, **options) as session:
                return await session.run_sync(scenario)
        finally:
            await self.engine.dispose()  # the connections belong to this event loop

    def events(self) -> list[Any]:
        """The payloads of the committed messages, in the order of their positions."""
        return [json.loads(row.payload) for row in self.rows()]

    def rows(self) -> list[Any]:
        with self.observer.connect() as connection:
            hot = tables.outbox_messages
            return list(connection.execute(select(hot).order_by(hot.c.position)))

    def waiting(self) -> list[Any]:
        with self.observer.connect() as connection:
            return list(connection.execute(select(tables.outbox_waiting).order_by(tables.outbox_waiting.c.id)))

    def scalar(self, statement: str) -> Any:
        with self.observer.connect() as connection:
            return connection.scalar(text(statement))


def prepare(connection: Connection) -> None:
    """Makes the shop's tables and ours."""
    Base.metadata.create_all(connection)
    migrations.upgrade(connection)


def open_world(url: URL, driver: str) -> CaptureDatabase:
    """A world on a database that `prepare` has seen."""
    named = url.set(drivername=driver)
    observer = create_engine(url)
    if driver.endswith(("asyncpg", "aiosqlite", "_async")):
        engine: Engine | AsyncEngine = create_async_engine(named, poolclass=NullPool)
    else:
        engine = create_engine(named)
    if driver.startswith("sqlite"):
        begin_sqlite_transactions(engine)
    return CaptureDatabase(engine, observer)
