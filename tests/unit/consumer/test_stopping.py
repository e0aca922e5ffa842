"""A stop is never a death: nothing begins after it, what is under way has its time, the rest goes back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import tables
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import Consumer
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, impatient, order


def billing_of(world: ConsumerFixture, waits: Callable[[int], Awaitable[Any]], **options: Any) -> Consumer:
    billing = Consumer("billing", sessions=world.asynchronous, **{"retry": impatient()} | options)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id=str(placed.number), number=placed.number))
        await waits(placed.number)

    return billing


def start(world: ConsumerFixture, billing: Consumer, stop: asyncio.Event) -> tuple[asyncio.Task[None], Until]:
    subscriber = Until(MemorySubscriber(world.exchange, billing.subscription), stop, lambda: False)
    return asyncio.create_task(billing.run(subscriber, stop)), subscriber


async def test_after_a_stop_no_message_begins_and_the_rest_is_given_back(world: ConsumerFixture) -> None:
    begun, go_on, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def wait(number: int) -> None:
        begun.set()
        await go_on.wait()

    world.send(*(order(n) for n in range(20)))  # of one key
    running, ran = start(world, billing_of(world, wait), stop)
    await begun.wait()
    stop.set()
    await asyncio.sleep(0)
    go_on.set()
    await running

    assert world.effects() == [0]
    assert [len(ran.acknowledged), len(ran.released)] == [1, 19]
    assert world.count(tables.inbox_batches) == world.count(tables.inbox_suspects) == 0


async def test_what_does_not_end_within_the_drain_is_rolled_back_and_given_back(world: ConsumerFixture) -> None:
    begun, stop = asyncio.Event(), asyncio.Event()

    async def hang(number: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    world.send(order(0), order(1))
    running, ran = start(world, billing_of(world, hang, drain="50ms"), stop)
    await begun.wait()
    stop.set()
    await asyncio.wait_for(running, 5)

    assert world.effects() == []
    assert [len(ran.acknowledged), len(ran.released)] == [0, 2]
    assert world.count(tables.inbox_batches) == 0


@pytest.mark.parametrize("times", [1, 4])
async def test_a_cancellation_is_no_death_however_often_it_comes(world: ConsumerFixture, times: int) -> None:
    world.send(order(7))
    for _ in range(times):
        begun = asyncio.Event()

        async def hang(number: int, begun: asyncio.Event = begun) -> None:
            begun.set()
            await asyncio.Event().wait()

        running, _ = start(world, billing_of(world, hang), asyncio.Event())
        await begun.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert world.count(tables.inbox_batches) == 0

    async def go_on(number: int) -> None:
        return None

    await world.run(billing_of(world, go_on))

    assert world.effects() == [7]
    assert world.count(tables.dead_letters) == world.count(tables.inbox_suspects) == 0


async def test_a_second_cancellation_while_leaving_does_not_hurry_it(world: ConsumerFixture) -> None:
    begun = asyncio.Event()

    async def hang(number: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    world.send(order(7))
    running, ran = start(world, billing_of(world, hang), asyncio.Event())
    await begun.wait()
    running.cancel()
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert world.count(tables.inbox_batches) == 0
    assert len(ran.released) == 1


async def test_a_failed_message_does_not_begin_its_immediate_retry_after_a_stop(world: ConsumerFixture) -> None:
    stop, calls = asyncio.Event(), []

    async def fail(number: int) -> None:
        calls.append(number)
        stop.set()
        await asyncio.sleep(0.02)
        raise KeyError

    world.send(order(1))
    running, ran = start(world, billing_of(world, fail, retry=impatient(immediate=5)), stop)
    await running

    assert calls == [1]
    assert len(ran.released) == 1


async def test_who_runs_is_recorded_and_who_has_stopped(world: ConsumerFixture) -> None:
    begun, stop = asyncio.Event(), asyncio.Event()

    async def hang(number: int) -> None:
        begun.set()
        await asyncio.Event().wait()

    world.send(order(1))
    running, _ = start(world, billing_of(world, hang, drain="10ms"), stop)
    await begun.wait()
    (row,) = world.rows(tables.inbox_consumers)
    assert (row.consumer, row.stopped_at) == ("billing", None)
    assert row.expires_at > row.started_at
    stop.set()
    await running

    (row,) = world.rows(tables.inbox_consumers)
    assert row.stopped_at is not None
    assert abs(row.expires_at - row.stopped_at) < timedelta(seconds=1)  # two readings of one clock: no lease is left
