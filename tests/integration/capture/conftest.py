"""The worlds of the capture tests: one PostgreSQL database for all of them, emptied for each; a file on SQLite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url

from outboxkit import migrations
from tests import servers
from tests.integration.capture.model import Base
from tests.integration.capture.world import CaptureDatabase, open_world, prepare
from tests.servers.postgres import Templates, create_database, drop_database

POSTGRES = ("postgresql+psycopg", "postgresql+psycopg_async", "postgresql+asyncpg")
SQLITE = ("sqlite", "sqlite+aiosqlite")
_KEEP = {"outbox_version", "outbox_shards"}


@pytest.fixture(scope="session")
def shop_database(postgres: servers.Server) -> Iterator[URL]:
    url = make_url(create_database(postgres.url))
    engine = create_engine(url)
    prepare(engine)
    engine.dispose()
    yield url
    drop_database(url.render_as_string(hide_password=False))


@pytest.fixture
def empty_shop(shop_database: URL) -> URL:
    # Not TRUNCATE: it makes new files for each table, and the checkpoint of a later DROP DATABASE pays for them all.
    statements = [
        f"DELETE FROM {table.name}" for table in reversed(Base.metadata.sorted_tables) if table.name not in _KEEP
    ]
    statements += [f"SELECT setval('{name}_id_seq', 1, false)" for name in ("orders", "lines", "plain")]
    engine = create_engine(shop_database)
    with engine.begin() as connection:
        connection.exec_driver_sql("; ".join(statements))
    engine.dispose()
    return shop_database


def _world(driver: str, empty_shop: URL, folder: Path) -> Iterator[CaptureDatabase]:
    url = empty_shop
    if driver.startswith("sqlite"):
        url = URL.create("sqlite", database=str(folder / "shop.sqlite"))
        engine = create_engine(url)
        prepare(engine)
        engine.dispose()
    opened = open_world(url, driver)
    yield opened
    opened.observer.dispose()
    if not opened.is_async:
        opened.sync_engine.dispose()


@pytest.fixture(params=(*POSTGRES, *SQLITE))
def world(request: pytest.FixtureRequest, empty_shop: URL, tmp_path: Path) -> Iterator[CaptureDatabase]:
    yield from _world(request.param, empty_shop, tmp_path)


@pytest.fixture(params=POSTGRES)
def postgres_world(request: pytest.FixtureRequest, empty_shop: URL, tmp_path: Path) -> Iterator[CaptureDatabase]:
    yield from _world(request.param, empty_shop, tmp_path)


@pytest.fixture(params=(POSTGRES[0], SQLITE[0]))
def sync_world(request: pytest.FixtureRequest, empty_shop: URL, tmp_path: Path) -> Iterator[CaptureDatabase]:
    yield from _world(request.param, empty_shop, tmp_path)


@pytest.fixture(params=(*POSTGRES[1:], SQLITE[1]))
def async_world(request: pytest.FixtureRequest, empty_shop: URL, tmp_path: Path) -> Iterator[CaptureDatabase]:
    yield from _world(request.param, empty_shop, tmp_path)


@pytest.fixture
def postgres_engine(templates: Templates) -> Iterator[Engine]:
    for url in templates.lend(migrations.upgrade):
        engine = create_engine(url)
        yield engine
        engine.dispose()
