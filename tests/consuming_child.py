"""A consumer in a process of its own: it may die.

Usage: python -m tests.consuming_child DATABASE_URL BROKER_URL COUNT KILLER FAILPOINTS

Handles orders until COUNT messages are settled; the handler ends the process at order KILLER. With ``memory`` as the
broker it brings its own messages, always the same ones.
"""

from __future__ import annotations

import asyncio
import os
import sys

from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import failpoints
from outboxkit.consumer import Consumer
from outboxkit.handlers import MessageContext
from tests.consuming import Effect, OrderPlaced, World, impatient, order

_KILLED = 139


def messages(count: int) -> list:  # type: ignore[type-arg]
    return [order(number, key=f"k{number % 3}", message_id=f"m{number}") for number in range(count)]


def make_consumer(world: World, killer: int) -> Consumer:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient())

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == killer:
            os._exit(_KILLED)
        session.add(Effect(message_id=ctx.id, number=placed.number))

    return billing


async def main(url: str, count: int, killer: int, armed: str) -> None:
    failpoints.enable(armed)
    world = World(url)
    world.send(*messages(count))
    await world.run(make_consumer(world, killer))
    await world.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
