"""Every dialect of ours passes the suite that ships for others."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit.testing.dialect_conformance import DialectConformance


def engine_with_tables(url: str) -> Iterator[Engine]:
    engine = open_engine(url, patience=timedelta(seconds=3))
    with engine.begin() as connection:
        migrations.upgrade(connection)
    yield engine
    engine.dispose()


class TestSQLite(DialectConformance):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[Engine]:
        yield from engine_with_tables(f"sqlite:///{tmp_path / 'outbox.db'}")


class TestPostgreSQL(DialectConformance):
    @pytest.fixture
    def engine(self, database_url: str) -> Iterator[Engine]:
        yield from engine_with_tables(database_url)
