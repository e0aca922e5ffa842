"""A run that begins while its consumer is renamed: it is in the way, or it waits and learns what holds now."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from outboxkit.consumer import Consumer, crash_marker
from outboxkit.consumer.crash_marker import Owner
from outboxkit.errors import ConfigurationError
from outboxkit.inbox.rename import Renaming, rename
from tests.consumer_fixture import ConsumerFixture, consumer, handles, order

_WAITING = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")


def runs(world: ConsumerFixture, name: str) -> Consumer:
    found = consumer(world, name)
    handles(found)
    return found


async def waits(world: ConsumerFixture, task: asyncio.Task[Any]) -> bool:
    """Whether the task came to wait for a lock before it ended."""

    def is_waiting() -> bool:
        with world.engine.connect() as connection:
            return bool(connection.scalar(_WAITING))

    while not task.done():
        if await asyncio.to_thread(is_waiting):
            return True
    return False


@pytest.fixture
async def renaming(world: ConsumerFixture) -> AsyncIterator[Connection]:
    """A transaction in which billing is invoicing now; order 1 was handled before, and comes again."""
    for number in (1, 1):
        world.send(order(number, message_id="m-1"))
    await world.run(runs(world, "billing"))
    world.send(order(1, message_id="m-1"))
    with world.engine.connect() as connection:
        assert not rename(connection, "billing", "invoicing", by="ana").refusal
        yield connection


async def test_a_run_of_the_old_name_that_waits_learns_the_new_one(
    world: ConsumerFixture, renaming: Connection
) -> None:
    run = asyncio.create_task(world.run(runs(world, "billing")))
    assert await waits(world, run)

    renaming.commit()

    with pytest.raises(ConfigurationError, match="billing was renamed to invoicing"):
        await run
    assert world.effects() == [1]


async def test_a_run_of_the_new_name_that_waits_knows_what_the_old_one_has_handled(
    world: ConsumerFixture, renaming: Connection
) -> None:
    invoicing = runs(world, "invoicing")
    run = asyncio.create_task(world.run(invoicing))
    assert await waits(world, run)

    renaming.commit()
    await run

    assert (invoicing.counts["duplicate"], world.effects()) == (3, [1])


async def test_a_renaming_that_is_given_up_leaves_the_run_that_waits_alone(
    world: ConsumerFixture, renaming: Connection
) -> None:
    billing = runs(world, "billing")
    run = asyncio.create_task(world.run(billing))
    assert await waits(world, run)

    renaming.rollback()
    await run

    assert (billing.counts["duplicate"], world.effects()) == (1, [1])


async def test_runs_of_others_do_not_wait(world: ConsumerFixture, renaming: Connection) -> None:
    shipping = runs(world, "shipping")

    await world.run(shipping)

    assert world.effects() == [1, 1], "one of each consumer"
    assert renaming.in_transaction()


@pytest.mark.parametrize("beginning", ["billing", "invoicing"])
async def test_a_run_that_is_just_beginning_is_in_the_way(world: ConsumerFixture, beginning: str) -> None:
    await world.run(runs(world, "billing"))

    def renamed() -> Renaming:
        with world.engine.begin() as connection:
            return rename(connection, "billing", "invoicing", by="ana")

    with Session(world.engine) as session:
        crash_marker.began(session, Owner(beginning, timedelta(seconds=5), [uuid4()]), None)
        answer = asyncio.create_task(asyncio.to_thread(renamed))
        assert await waits(world, answer)
        session.commit()

    with pytest.raises(ConfigurationError, match=f"{beginning} runs on .*; nothing was renamed"):
        await answer


async def test_a_run_that_was_frozen_while_its_consumer_was_renamed_ends_when_it_goes_on(
    world: ConsumerFixture,
) -> None:
    run = asyncio.create_task(world.run(runs(world, "billing"), until=lambda: False))
    expired = text("UPDATE inbox_consumers SET expires_at = now()")
    while True:  # until it has begun
        with world.engine.begin() as connection:
            if connection.execute(expired).rowcount and not rename(connection, "billing", "new", by="ana").refusal:
                break
        await asyncio.sleep(0)

    with pytest.raises(ConfigurationError, match="billing was renamed to new"):
        await run
