"""A world on SQLite for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.consuming import World


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    found = World(f"sqlite:///{tmp_path}/test.db")
    yield found
    await found.close()
