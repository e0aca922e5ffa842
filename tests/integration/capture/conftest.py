"""The worlds of the capture tests: one PostgreSQL database for all of them, emptied for each; a file on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, make_url

from outboxkit import migrations
from tests.integration.capture.model import Base
from tests.integration.capture.world import CaptureDatabase, open_world, prepare
from tests.servers.postgres import Templates, connect
from tests.sqlite_template import copied

POSTGRES = ("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg")
SQLITE = ("sqlite", "sqlite+aiosqlite")
_KEEP = {"outbox_version", "outbox_shards"}


@pytest.fixture(scope="session")
def shop_database(templates: Templates) -> Iterator[str]:
    yield from templates.lend(prepare)


@pytest.fixture
def empty_shop(shop_database: str) -> str:
    # Not TRUNCATE: it makes new files for each table, and the checkpoint of a later DROP DATABASE pays for them all.
    statements = [
        f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables) if table.name not in _KEEP
    ]
    statements += [f"SELECT setval('{name}_id_seq', 1, false)" for name in ("orders", "lines", "plain")]
    with connect(shop_database) as connection:
        connection.execute("; ".join(statements))
    return shop_database


def _world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CaptureDatabase]:
    """A shop with its tables on the database of that driver, empty."""
    on_sqlite = request.param.startswith("sqlite")
    url = copied(tmp_path / "shop.sqlite", prepare) if on_sqlite else request.getfixturevalue("empty_shop")
    opened = open_world(make_url(url), request.param)
    yield opened
    opened.observer.dispose()
    if not opened.is_async:
        opened.sync_engine.dispose()


world = pytest.fixture(params=(*POSTGRES, *SQLITE))(_world)
postgres_world = pytest.fixture(params=POSTGRES)(_world)
sync_world = pytest.fixture(params=(POSTGRES[0], SQLITE[0]))(_world)
async_world = pytest.fixture(params=(*POSTGRES[1:], SQLITE[1]))(_world)


@pytest.fixture
def postgres_engine(templates: Templates) -> Iterator[Engine]:
    for url in templates.lend(migrations.upgrade):
        engine = create_engine(url)
        yield engine
        engine.dispose()
