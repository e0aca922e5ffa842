"""A world on SQLite for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.consumer_fixture import ConsumerFixture


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ConsumerFixture]:
    found = ConsumerFixture(f"sqlite:///{tmp_path}/test.db")
    yield found
    await found.close()
