"""A world on SQLite for every test, in this process alone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.consumer_fixture import ConsumerFixture, create_tables
from tests.sqlite_template import copied
from tests.unit.alone import alone


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with alone() as tried:
        yield
    assert not tried


@pytest.fixture(autouse=True, scope="module")
def _no_connection_is_left() -> Iterator[None]:
    """Clients written in C tell the interpreter nothing; what they opened shows here."""
    ours = psutil.Process(os.getpid())
    before = {(one.laddr, one.raddr) for one in ours.net_connections("inet")}
    yield
    opened = [one for one in ours.net_connections("inet") if (one.laddr, one.raddr) not in before]
    assert not opened  # one from before may have ended meanwhile


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[ConsumerFixture]:
    found = ConsumerFixture(copied(tmp_path / "test.db", create_tables), has_tables=True)
    yield found
    await found.close()
