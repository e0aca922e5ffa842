"""A world on PostgreSQL for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.consuming import World


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    found = World(database_url)
    yield found
    await found.close()
