"""The page over a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine

from outboxkit import migrations
from outboxkit.dialects import open_engine
from tests.sqlite_template import copied
from tests.unit.relay.dashboard.world import Browser, furnish


@pytest.fixture
def furnished(tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(copied(tmp_path / "app.db", _make), patience=timedelta(seconds=30))
    yield engine
    engine.dispose()


def _make(connection: Connection) -> None:
    migrations.upgrade(connection)
    furnish(connection)


@pytest.fixture
def browser(furnished: Engine) -> Iterator[Browser]:
    """A visitor who may do everything; what it has started is over when the test is."""
    found = Browser(furnished)
    with found.client:
        yield found
