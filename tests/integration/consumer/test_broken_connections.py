"""A connection that breaks: an outage spends nothing, a message that breaks its own connection is found. PostgreSQL."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from outboxkit import tables
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, impatient, order

Handle = Callable[[OrderPlaced, AsyncSession, MessageContext], Any]


def consumer(world: ConsumerFixture, handle: Handle, **options: Any) -> Consumer:
    sessions = options.pop("sessions", None) or world.asynchronous
    billing = Consumer("billing", sessions=sessions, **{"retry": impatient(delayed=1)} | options)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))
        await session.flush()
        await handle(placed, session, ctx)

    return billing


async def end_own_backend(session: AsyncSession) -> None:
    await session.execute(select(func.pg_terminate_backend(func.pg_backend_pid())))


async def test_a_message_that_always_breaks_its_connection_is_a_letter_and_the_next_one_is_handled(
    world: ConsumerFixture,
) -> None:
    attempts: list[int] = []

    async def handle(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == 1:
            attempts.append(ctx.attempt)
            await end_own_backend(session)

    world.send(order(1), order(2))
    await world.run(consumer(world, handle))

    (letter,) = world.rows(tables.dead_letters)
    assert attempts == [1, 1, 1, 2], "twice it may have been an outage"
    assert (letter.failure, letter.stage) == ("handler", "handler")
    assert "broke" in letter.error
    assert world.effects() == [2]


async def test_a_session_that_the_server_ends_for_idling_is_named(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_async_engine(
        world.asynchronous.kw["bind"].url,
        connect_args={"options": "-c idle_in_transaction_session_timeout=50ms"},
    )

    async def wait_for_http(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == 1:
            pid = await session.scalar(select(func.pg_backend_pid()))
            async with world.asynchronous() as other:
                while await other.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}):
                    await other.rollback()  # the view is of the transaction's beginning
                    await asyncio.sleep(0.01)
            await session.execute(select(1))

    world.send(order(1), order(2))
    await world.run(consumer(world, wait_for_http, sessions=async_sessionmaker(engine)))
    await engine.dispose()

    (letter,) = world.rows(tables.dead_letters)
    assert "idle_in_transaction_session_timeout" in letter.error
    assert "25P03" in letter.error
    assert world.effects() == [2]
    assert any(getattr(record, "sqlstate", "") == "25P03" for record in caplog.records)


async def test_a_handler_that_swallows_an_outage_has_spent_nothing(world: ConsumerFixture) -> None:
    attempts: list[int] = []

    async def swallow(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) < 3:
            try:
                await end_own_backend(session)
            except DBAPIError:
                return

    world.send(order(1))
    await world.run(consumer(world, swallow))

    assert attempts == [1, 1, 1]
    assert world.effects() == [1]
    assert world.count(tables.dead_letters) == 0


class _Wrapped(Exception):
    """An application's own error around the database's."""


async def test_a_serialization_failure_in_another_error_spends_nothing(world: ConsumerFixture) -> None:
    attempts: list[int] = []

    async def wrap(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            try:
                await session.execute(text("DO $$ BEGIN RAISE serialization_failure; END $$"))
            except DBAPIError as error:
                raise _Wrapped from error
        if len(attempts) == 2:
            async with asyncio.TaskGroup() as group:
                group.create_task(_deadlock(session))

    world.send(order(1))
    await world.run(consumer(world, wrap))

    assert attempts == [1, 1, 1]
    assert world.effects() == [1]


async def _deadlock(session: AsyncSession) -> None:
    await session.execute(text("DO $$ BEGIN RAISE deadlock_detected; END $$"))


async def test_a_key_that_no_index_takes_is_a_letter_when_it_must_wait(world: ConsumerFixture) -> None:
    async def fail(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == 1:
            raise KeyError

    long = replace(order(1), key=os.urandom(20_000))
    world.send(long, order(2, key="other"))
    ran = await world.run(consumer(world, fail))

    (letter,) = world.rows(tables.dead_letters)
    assert bytes(letter.payload) == long.payload
    assert world.effects() == [2]
    assert len(ran.acknowledged) == 2


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
async def test_data_that_the_driver_cannot_send_is_the_messages_fault(world: ConsumerFixture, driver: str) -> None:
    """Never an outage: an outage has no end while the message is there."""
    url = world.asynchronous.kw["bind"].url.set(drivername=f"postgresql+{driver}")
    engine = create_async_engine(url)

    async def store(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == 1:
            await session.execute(text("SELECT CAST(:number AS integer)"), {"number": 10**30})
        if placed.number == 2:
            await session.execute(text("SELECT CAST(:words AS text)"), {"words": "a\0b"})

    world.send(order(1, key="1"), order(2, key="2"), order(3, key="3"))
    await world.run(consumer(world, store, sessions=async_sessionmaker(engine)))
    await engine.dispose()

    assert world.effects() == [3]
    assert world.count(tables.dead_letters) == 2


@pytest.mark.parametrize("named", [False, True], ids=["redelivered", "suspect"])
async def test_what_comes_again_is_handled_side_by_side(world: ConsumerFixture, *, named: bool) -> None:
    """Suspects run under markers of their own, but those of different keys run at once."""
    inside, most, gate = 0, 0, asyncio.Event()

    async def meet(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        if inside == 4:
            gate.set()
        await gate.wait()
        inside -= 1

    world.send(*(order(n, key=f"k{n}") for n in range(8)))
    if named:
        names = [{"consumer": "billing", "identity": f"orders/0/{n}", "deaths": 1} for n in range(8)]
        with world.engine.begin() as connection:
            connection.execute(tables.inbox_suspects.insert(), names)
    billing = consumer(world, meet, concurrency=4)
    stop = asyncio.Event()
    inner = _Again(world.exchange, billing.subscription)
    await asyncio.wait_for(billing.run(Until(inner, stop, lambda: len(world.effects()) == 8), stop), 20)

    assert most == 4
    assert world.count(tables.inbox_suspects) == world.count(tables.inbox_batches) == 0


class _Again(MemorySubscriber):
    """Says of everything that it was handed out before."""

    async def receive(self, limit: int, timeout: timedelta) -> Any:
        return [replace(one, redelivered=True) for one in await super().receive(limit, timeout)]


async def test_two_deaths_make_a_suspect_run_alone_so_that_no_other_is_blamed(world: ConsumerFixture) -> None:
    inside, together = 0, []

    async def look(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        nonlocal inside
        inside += 1
        await asyncio.sleep(0.01)
        together.append((placed.number, inside))
        inside -= 1

    world.send(*(order(n, key=f"k{n}") for n in range(6)))
    with world.engine.begin() as connection:
        deaths = {0: 1, 3: 2}
        names = [{"consumer": "billing", "identity": f"orders/0/{n}", "deaths": d} for n, d in deaths.items()]
        connection.execute(tables.inbox_suspects.insert(), names)
    await world.run(consumer(world, look, concurrency=4))

    assert sorted(world.effects()) == list(range(6))
    assert dict(together)[3] == 1


async def test_the_consumer_comes_back_soon_after_an_outage_however_long_it_was(world: ConsumerFixture) -> None:
    """The waits grow to a cap and are drawn anew each time; here: many refused connections, then one that works."""
    refused: list[int] = []
    engine = world.asynchronous.kw["bind"].sync_engine

    def refuse(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
        if len(refused) < 6:
            refused.append(1)
            parameters["port"] = 1

    event.listen(engine, "do_connect", refuse)

    async def nothing(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        return None

    world.send(order(1))
    await asyncio.wait_for(world.run(consumer(world, nothing)), 30)
    event.remove(engine, "do_connect", refuse)

    assert len(refused) == 6
    assert world.effects() == [1]
