"""A world on PostgreSQL for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.consumer_fixture import ConsumerFixture, create_tables
from tests.servers.postgres import Templates


@pytest.fixture
def database_url(templates: Templates) -> Iterator[str]:
    """A database of its own with our tables and the application's."""
    yield from templates.lend(create_tables)


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[ConsumerFixture]:
    found = ConsumerFixture(database_url, has_tables=True)
    yield found
    await found.close()
