"""What the tests of the relay share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outboxkit import migrations
from tests import servers
from tests.integration.relay.world import engine_for
from tests.servers import pgbouncer
from tests.servers.postgres import Templates
from tests.sqlite_template import copied


@pytest.fixture
def database_url(templates: Templates) -> Iterator[str]:
    """A database of its own with our tables, on PostgreSQL."""
    yield from templates.lend(migrations.upgrade)


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database of each kind."""
    url = (
        request.getfixturevalue("database_url")
        if request.param == "postgresql"
        else copied(tmp_path / "outbox.db", migrations.upgrade)
    )
    found = engine_for(url)
    yield found
    found.dispose()


@pytest.fixture
def pooler(postgres: servers.Server) -> servers.Server:
    """A PgBouncer in transaction mode before that server."""
    try:
        found = pgbouncer.find(postgres.url)
    except servers.Unavailable as error:
        pytest.fail(str(error), pytrace=False)
    found.heal()
    return found
