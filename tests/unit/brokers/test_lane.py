"""A destination's task ends when it is told to, whatever it is doing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from outboxkit.brokers import Batch
from outboxkit.brokers.rabbitmq.channel import Pending
from outboxkit.brokers.rabbitmq.publish import _Lane
from outboxkit.rows import Row

DEADLINE = 1.0
ROW = Row.of(1, UUID(int=1), "orders", b"k", "t", "event", b"", b"", datetime(2026, 1, 1, tzinfo=UTC), None, 0, None)


class Owner:
    """A publisher whose broker is ready when the test says so, and then refuses everything."""

    class settings:  # noqa: N801  stands for a value
        blocked_seconds = 60.0

    is_closed = False

    def __init__(self) -> None:
        self.asked, self.is_ready = asyncio.Event(), asyncio.Event()

    async def connection(self) -> Owner:
        return self

    async def ready(self) -> None:
        self.asked.set()
        await self.is_ready.wait()

    async def channel(self, **_: object) -> None:
        raise ConnectionError

    def refuse_waiting(self, destination: str, trouble: Exception) -> None:
        """Nobody waits."""


@pytest.mark.parametrize("turns", range(6))
async def test_a_lane_stops_though_what_it_waited_for_comes_in_the_same_moment(turns: int) -> None:
    owner: Any = Owner()
    lane = _Lane(owner, "orders")
    lane.queue.put_nowait(Pending(Batch("orders", [ROW])))
    await owner.asked.wait()

    owner.is_ready.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    stopping = asyncio.create_task(lane.stop())
    await asyncio.wait({stopping}, timeout=DEADLINE)

    assert stopping.done()
    await stopping
