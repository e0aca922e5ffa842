"""A message takes effect once, on both kinds of session."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit.brokers import Delivery
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.errors import TransientBrokerError
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, order


async def test_a_duplicate_has_one_effect_with_async_sessions(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.asynchronous)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    world.send(order(1, message_id="a"), order(1, message_id="a"), order(2, message_id="b"))
    await world.run(billing)

    assert world.effects() == [1, 2]
    assert billing.counts["handled"] == 2
    assert billing.counts["duplicate"] == 1
    assert world.count(tables.inbox_batches) == 0


async def test_a_duplicate_has_one_effect_with_plain_sessions(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.plain, concurrency=1)

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    world.send(order(1, message_id="a"), order(1, message_id="a"), order(2, message_id="b"))
    await world.run(billing)

    assert world.effects() == [1, 2]
    assert billing.counts["duplicate"] == 1


async def test_a_broker_that_goes_away_before_the_acknowledgement_costs_nothing_but_a_second_delivery(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The effect is committed; the broker hands the message out again, and the inbox knows it."""
    billing = Consumer("billing", sessions=world.plain, concurrency=1)
    acknowledge = Until.acknowledge
    lost: list[Delivery] = []

    async def lose_the_first(self: Until, deliveries: Sequence[Delivery]) -> None:
        if not lost:
            lost.extend(deliveries)
            await self.release(deliveries)
            raise TransientBrokerError("the broker went away")
        await acknowledge(self, deliveries)

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    monkeypatch.setattr(Until, "acknowledge", lose_the_first)
    world.send(order(1, message_id="a"))
    await world.run(billing)

    assert len(lost) == 1
    assert world.effects() == [1]
    assert billing.counts["duplicate"] == 1
