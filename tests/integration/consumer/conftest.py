"""A world on PostgreSQL for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.consumer_fixture import ConsumerFixture


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[ConsumerFixture]:
    found = ConsumerFixture(database_url)
    yield found
    await found.close()
