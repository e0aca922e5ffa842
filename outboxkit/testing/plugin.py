"""Pytest fixtures for applications: their outbox and their consumers, without a broker and without waiting.

In the ``conftest.py`` at the root of the tests::

    pytest_plugins = ["outboxkit.testing.plugin"]


    @pytest.fixture
    def outbox_metadata():
        return Base.metadata

It is no entry point on purpose: that would import outboxkit, and with it SQLAlchemy, into every run of pytest in an
environment where outboxkit is installed.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, MetaData, create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from outboxkit import migrations
from outboxkit.tables import outbox_tables
from outboxkit.testing.delivery import ConsumerHarness, asynchronous
from outboxkit.testing.emitted import EmittedMessages
from outboxkit.testing.schema_gate import schema_gate

__all__ = [
    "harness",
    "outbox",
    "outbox_async_sessions",
    "outbox_engine",
    "outbox_metadata",
    "outbox_session",
    "schema_gate",
]


@pytest.fixture
def outbox_metadata() -> MetaData:
    """The tables of the test's database. Override it: ``return Base.metadata``; ours are added if they are missing."""
    found = MetaData()
    outbox_tables(found)
    return found


@pytest.fixture
def outbox_engine(outbox_metadata: MetaData) -> Iterator[Engine]:
    """An empty database for one test: SQLite in memory, which several connections and threads can share."""
    engine = create_engine(f"sqlite:///file:/outboxkit-{uuid4().hex}?vfs=memdb&uri=true")
    with engine.connect() as keeper:  # the database lives as long as somebody is connected
        with contextlib.closing(sqlite3.connect(":memory:")) as made:
            made.deserialize(_template(outbox_metadata, frozenset(outbox_metadata.tables)))
            made.backup(_driver(keeper))
        yield engine
    engine.dispose()


@functools.lru_cache(maxsize=8)
def _template(metadata: MetaData, _names: frozenset[str]) -> bytes:
    """Makes the tables once: a copy for each test takes a hundredth of the time."""
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        metadata.create_all(connection)
        migrations.upgrade(connection)
        connection.commit()
        made = _driver(connection).serialize()
    engine.dispose()
    return made


def _driver(connection: Connection) -> sqlite3.Connection:
    found = connection.connection.driver_connection
    assert isinstance(found, sqlite3.Connection)  # noqa: S101  pysqlite is what these URLs mean
    return found


@pytest.fixture
def outbox_session(outbox_engine: Engine) -> Iterator[Session]:
    """A session of the test's database; what is not committed is rolled back."""
    with Session(outbox_engine) as session:
        yield session
        session.rollback()


@pytest.fixture
def outbox_async_sessions(outbox_engine: Engine) -> async_sessionmaker[AsyncSession]:
    """Makes sessions of the test's database for coroutines."""
    return async_sessionmaker(asynchronous(outbox_engine), expire_on_commit=False)


@pytest.fixture
def outbox(outbox_engine: Engine, outbox_session: Session) -> EmittedMessages:
    """The committed messages of the outbox, and assertions about them."""
    return EmittedMessages(outbox_engine, outbox_session)


@pytest.fixture
def harness(outbox_engine: Engine, outbox_session: Session) -> ConsumerHarness:
    """Delivers events to consumers, in the test's database."""
    return ConsumerHarness(outbox_engine, outbox_session)
