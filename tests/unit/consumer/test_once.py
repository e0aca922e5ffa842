"""A message takes effect once, on both kinds of session."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit.consumer import Consumer
from outboxkit.handlers import MessageContext
from tests.consuming import Effect, OrderPlaced, World, order


async def test_a_duplicate_has_one_effect_with_async_sessions(world: World) -> None:
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


async def test_a_duplicate_has_one_effect_with_plain_sessions(world: World) -> None:
    billing = Consumer("billing", sessions=world.plain, concurrency=1)

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    world.send(order(1, message_id="a"), order(1, message_id="a"), order(2, message_id="b"))
    await world.run(billing)

    assert world.effects() == [1, 2]
    assert billing.counts["duplicate"] == 1
