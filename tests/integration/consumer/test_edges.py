"""Edges of the consumer that need a real database: what others are told, what retention forgets, how processes die."""

from __future__ import annotations

import signal
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import publish, tables
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.policy import Failure
from outboxkit_relay.settings import Retention
from outboxkit_relay.store.retention import prune
from tests.consumer_child import COUNT, run_child
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, consumer, handles, impatient, letters, order

FORGETFUL = Retention(inbox=timedelta(microseconds=1))


def purge(world: ConsumerFixture) -> int:
    """Deletes every inbox row that is committed, as if its retention were over; returns how many."""
    with world.engine.begin() as connection:
        return prune(connection, FORGETFUL)["inbox_messages"]


async def test_e111_other_systems_get_the_same_key_at_every_try_and_none_from_a_copy(world: ConsumerFixture) -> None:
    """A mail cannot be rolled back: its receiver knows it by the key."""
    mailed: Counter[str] = Counter()
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(immediate=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))
        mailed[ctx.id] += 1
        if ctx.attempt < 4:
            raise ConnectionResetError

    world.send(order(1, message_id="m"))
    await world.run(billing)
    world.send(order(1, message_id="m"))
    await world.run(billing)

    assert mailed == {"m": 4}
    assert world.effects() == [1]


async def test_e115_a_purge_does_not_touch_what_is_being_handled(world: ConsumerFixture) -> None:
    purged: list[int] = []
    billing = consumer(world)
    handles(billing, lambda _number, _ctx: purged.append(purge(world)))

    world.send(order(1, message_id="m"), order(1, message_id="m"))
    await world.run(billing)

    assert purged == [0]
    assert world.effects() == [1]


async def test_c7_what_the_inbox_has_forgotten_takes_effect_again(world: ConsumerFixture) -> None:
    """So retention is longer than the broker keeps messages, and the start refuses another one."""
    billing = consumer(world)
    handles(billing)
    world.send(order(1, message_id="m"))
    await world.run(billing)

    assert purge(world) == 1
    world.send(order(1, message_id="m"))
    await world.run(billing)

    assert world.effects() == [1, 1]


async def test_c10_when_what_a_handler_publishes_fails_its_effect_is_gone_too(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))
        publish(session, OrderPlaced(9), topic="audit", key="k")
        if placed.number == 1:
            publish(session, OrderPlaced(9), topic="audit", key=lambda: 1 // 0)  # type: ignore[arg-type]

    world.send(order(1), order(2, key="other"))
    await world.run(billing)

    assert world.effects() == [2]
    assert world.count(tables.outbox_messages) == 1
    assert len(letters(world)) == 1


@pytest.mark.parametrize(
    ("by", "status"),
    [
        ("out of memory", -signal.SIGKILL),
        pytest.param("segmentation fault", -signal.SIGSEGV, marks=pytest.mark.full),
        pytest.param("endless loop", -signal.SIGKILL, marks=pytest.mark.full),
    ],
)
def test_c5_however_a_message_kills_its_process_it_is_a_letter_after_three_deaths_and_no_other_is(
    world: ConsumerFixture, by: str, status: int
) -> None:
    deaths = 0
    while (found := run_child(world.url, killer=3, by=by)) != 0:
        assert found == status
        deaths += 1

    assert deaths == 3
    assert [(letter.message_id, letter.failure) for letter in letters(world)] == [("m3", Failure.CRASH)]
    assert sorted(world.effects()) == [number for number in range(COUNT) if number != 3]
