"""Races and a database that goes away: PostgreSQL only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from outboxkit import tables
from outboxkit.brokers.memory import MemorySubscriber, exchange
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.policy import RetryPolicy
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, impatient, order, row_of
from tests.servers import Server


def consumer(
    world: ConsumerFixture, handle: Callable[[OrderPlaced, AsyncSession, MessageContext], Any], **options: Any
) -> Consumer:
    billing = Consumer("billing", sessions=world.asynchronous, **{"retry": impatient()} | options)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))
        await session.flush()
        await handle(placed, session, ctx)

    return billing


async def start(world: ConsumerFixture, billing: Consumer, name: str, *, until: Callable[[], bool]) -> None:
    """Runs a consumer on an exchange of its own, so that several get the same message, as after a rebalance."""
    exchange(f"{world.exchange_name}-{name}").append("orders", row_of(order(1, message_id="m")))
    stop = asyncio.Event()
    inner = MemorySubscriber(exchange(f"{world.exchange_name}-{name}"), billing.subscription)
    await billing.run(Until(inner, stop, until), stop)


async def blocked(world: ConsumerFixture) -> None:
    """Returns when some statement waits for another transaction's lock."""
    async with world.asynchronous() as session:
        waiting = select(func.count()).select_from(text("pg_stat_activity")).where(text("wait_event_type = 'Lock'"))
        while not await session.scalar(waiting):
            await session.rollback()
            await asyncio.sleep(0)


@pytest.mark.parametrize("first_fails", [False, True])
async def test_of_two_consumers_with_the_same_message_one_makes_the_effect(
    world: ConsumerFixture, *, first_fails: bool
) -> None:
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def slow(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        inside.set()
        await go_on.wait()
        if first_fails and ctx.attempt == 1:
            ctx.retry_after("1ms")

    async def quick(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        return None

    one, two = consumer(world, slow), consumer(world, quick)
    settled = lambda: one.counts.total() + two.counts.total() >= 2 and not world.count(tables.inbox_waiting)  # noqa: E731
    async with asyncio.TaskGroup() as group:
        group.create_task(start(world, one, "one", until=settled))
        await inside.wait()
        group.create_task(start(world, two, "two", until=settled))
        await blocked(world)
        go_on.set()

    assert world.effects() == [1]
    assert two.counts["handled"] == (1 if first_fails else 0)
    assert (one.counts + two.counts)["duplicate"] == 1, "the other consumer, or the retry that came too late"


async def test_a_restart_of_the_database_spends_no_attempt_and_acknowledges_nothing(
    world: ConsumerFixture, postgres: Server
) -> None:
    attempts: list[int] = []

    async def crash_once(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            await asyncio.to_thread(postgres.kill)
            asyncio.get_running_loop().run_in_executor(None, postgres.start)
            await session.execute(select(1))

    billing = consumer(world, crash_once, retry=RetryPolicy(immediate=0))
    world.send(order(1), order(2))
    await world.run(billing)

    assert attempts == [1, 1, 1], "the first message twice, both times as the first attempt"
    assert world.effects() == [1, 2]
    assert billing.counts["handled"] == 2
    assert world.count(tables.dead_letters) == 0


async def test_a_lost_connection_spends_no_attempt(world: ConsumerFixture) -> None:
    attempts: list[int] = []

    async def terminate_once(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            mine = await session.scalar(select(func.pg_backend_pid()))
            with world.engine.begin() as other:
                other.execute(select(func.pg_terminate_backend(mine)))

    world.send(order(1))
    await world.run(consumer(world, terminate_once))

    assert attempts == [1, 1]
    assert world.effects() == [1]


async def test_a_serialization_failure_spends_no_attempt(world: ConsumerFixture) -> None:
    attempts: list[int] = []

    async def fail_once(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            await session.execute(text("DO $$ BEGIN RAISE serialization_failure; END $$"))

    world.send(order(1))
    await world.run(consumer(world, fail_once))

    assert attempts == [1, 1]
    assert world.effects() == [1]


async def test_a_handler_that_is_always_in_the_way_fails_in_the_end(world: ConsumerFixture) -> None:
    async def fail(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        await session.execute(text("DO $$ BEGIN RAISE lock_not_available; END $$"))

    billing = consumer(world, fail, retry=impatient(delayed=1))
    world.send(order(1))
    await world.run(billing)

    assert billing.counts["buried"] == 1


async def test_trouble_with_another_database_is_the_handlers_own(world: ConsumerFixture) -> None:
    other = create_async_engine("postgresql+psycopg://nobody@127.0.0.1:1/none")

    async def elsewhere(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        async with other.connect():
            pass

    billing = consumer(world, elsewhere, retry=impatient(delayed=1))
    world.send(order(1))
    await world.run(billing)
    await other.dispose()

    (letter,) = world.rows(tables.dead_letters)
    assert (letter.failure, letter.error_class) == ("handler", "OperationalError")


async def test_a_swallowed_database_error_fails_instead_of_committing_half(world: ConsumerFixture) -> None:
    async def swallow(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        try:
            await session.execute(text("INSERT INTO effects (id, message_id, number) SELECT id, 'x', 0 FROM effects"))
        except IntegrityError:
            return

    billing = consumer(world, swallow, retry=impatient(delayed=1))
    world.send(order(1))
    await world.run(billing)

    assert billing.counts == {"retried": 1, "buried": 1}
    assert world.effects() == []


async def test_a_lost_answer_to_the_commit_is_decided_by_the_inbox(world: ConsumerFixture) -> None:
    billing = consumer(world, _nothing)
    commits: list[Any] = []

    def lose_the_answer(connection: Any) -> None:
        found = connection.connection.dbapi_connection
        if not commits and connection.execute(select(func.count()).select_from(tables.inbox_messages)).scalar():
            commits.append(found)
            connection.exec_driver_sql("COMMIT")
            connection.execute(select(func.pg_terminate_backend(func.pg_backend_pid())))

    engine = world.asynchronous.kw["bind"].sync_engine
    event.listen(engine, "commit", lose_the_answer)
    world.send(order(1))
    await world.run(billing)
    event.remove(engine, "commit", lose_the_answer)

    assert world.effects() == [1]
    assert billing.counts == {"duplicate": 1}


async def _nothing(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
    return None
