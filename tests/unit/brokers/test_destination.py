"""A destination's task ends when it is told to, whatever it is doing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from outboxkit.brokers import Batch
from outboxkit.brokers._in_flight import InFlight, Pending
from outboxkit.brokers.rabbitmq.destination import DestinationTask
from outboxkit.rows import Row

DEADLINE = 1.0
ROW = Row.of(1, UUID(int=1), "orders", b"k", "t", "event", b"", b"", datetime(2026, 1, 1, tzinfo=UTC), None, 0, None)


class Connection:
    """As aio-pika's: its broker is ready when the test says so, and then refuses everything."""

    is_closed = False

    def __init__(self) -> None:
        self.asked, self.is_ready = asyncio.Event(), asyncio.Event()
        self.transport = self.connection = self

    async def ready(self) -> None:
        self.asked.set()
        await self.is_ready.wait()

    def channel(self, **_: object) -> None:
        raise ConnectionError


class Owner:
    """A publisher with that connection."""

    class settings:  # noqa: N801  stands for a value
        blocked_seconds = 60.0

    def __init__(self) -> None:
        self.book = InFlight()
        self.opened = Connection()

    async def connection(self) -> Connection:
        return self.opened


@pytest.mark.parametrize("turns", range(6))
async def test_a_task_stops_though_what_it_waited_for_comes_in_the_same_moment(turns: int) -> None:
    owner: Any = Owner()
    task = DestinationTask(owner, "orders")
    task.queue.put_nowait(Pending(Batch("orders", [ROW])))
    await owner.opened.asked.wait()

    owner.opened.is_ready.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    stopping = asyncio.create_task(task.stop())
    await asyncio.wait({stopping}, timeout=DEADLINE)

    assert stopping.done()
    await stopping
