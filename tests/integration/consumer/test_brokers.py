"""The whole way in, on the real brokers and PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import tables
from outboxkit.brokers import Batch, Login, Subscription, open_publisher, open_subscriber
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, impatient, order, row_of
from tests.deadlines import DEADLINE
from tests.servers import Server


@pytest.fixture(params=["kafka", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(request.param)
    return server


def billing_of(world: ConsumerFixture, topic: str) -> Consumer:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient())

    @billing.on(OrderPlaced, topic=topic)
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == 3 and ctx.attempt == 1:
            raise KeyError
        session.add(Effect(message_id=ctx.id, number=placed.number))

    return billing


def publish(url: str, topic: str, messages: list[Message]) -> None:
    publisher = open_publisher(url)
    rows = [row_of(message, position) for position, message in enumerate(messages, 1)]
    receipts = publisher.publish(Batch(topic, rows)).result(timeout=DEADLINE)
    publisher.close()
    assert not receipts.refusals


async def declare(url: str, subscription: Subscription) -> None:
    subscriber = open_subscriber(url, subscription)
    await subscriber.declare(subscription)
    await subscriber.close()


async def run(world: ConsumerFixture, consumer: Consumer, url: str, fact: Callable[[], bool]) -> Until:
    stop = asyncio.Event()
    settled = lambda: world.count(tables.inbox_waiting) == 0 and fact()  # noqa: E731
    subscriber = Until(open_subscriber(url, consumer.subscription), stop, settled, idle=timedelta(milliseconds=100))
    await subscriber.declare(consumer.subscription)
    await consumer.run(subscriber, stop)
    return subscriber


async def test_each_message_takes_effect_once_and_in_order_of_its_key(world: ConsumerFixture, broker: Server) -> None:
    topic = f"orders-{uuid4().hex[:8]}"
    billing = billing_of(world, topic)
    await declare(broker.url, billing.subscription)
    messages = [order(n, key=f"k{n % 2}", topic=topic, message_id=f"m{n}") for n in range(10)]

    await asyncio.to_thread(publish, broker.url, topic, [*messages, *messages])
    await run(world, billing, broker.url, lambda: billing.counts["duplicate"] >= 10)

    effects = world.effects()
    assert sorted(effects) == list(range(10))
    assert [n for n in effects if n % 2] == [1, 3, 5, 7, 9]
    assert billing.counts["handled"] == 10


async def test_credentials_give_the_login_of_each_connection(world: ConsumerFixture, rabbitmq: Server) -> None:
    topic, asked = f"orders-{uuid4().hex[:8]}", []
    billing = billing_of(world, topic)
    await declare(rabbitmq.url, billing.subscription)
    address = make_url(rabbitmq.url)

    def login() -> Login:
        asked.append(1)
        return Login(str(address.username), str(address.password))

    trusted = Consumer("billing", sessions=world.asynchronous, credentials=login)
    stop = asyncio.Event()

    @trusted.on(OrderPlaced, topic=topic)
    async def bill(placed: OrderPlaced) -> None:
        stop.set()

    await asyncio.to_thread(publish, rabbitmq.url, topic, [order(1, topic=topic)])
    await trusted.run(f"amqp://{address.host}:{address.port}/", stop)

    assert asked
    assert trusted.counts["handled"] == 1


async def test_what_was_acknowledged_does_not_come_again_and_the_rest_does(
    world: ConsumerFixture, broker: Server
) -> None:
    topic = f"orders-{uuid4().hex[:8]}"
    billing = billing_of(world, topic)
    await declare(broker.url, billing.subscription)

    await asyncio.to_thread(publish, broker.url, topic, [order(1, topic=topic)])
    first = await run(world, billing, broker.url, lambda: bool(world.effects()))
    await asyncio.to_thread(publish, broker.url, topic, [order(2, topic=topic)])
    second = await run(world, billing_of(world, topic), broker.url, lambda: len(world.effects()) == 2)

    assert (len(first.received), len(second.received)) == (1, 1)


async def test_poison_becomes_a_letter_with_the_same_bytes(world: ConsumerFixture, broker: Server) -> None:
    topic = f"orders-{uuid4().hex[:8]}"
    billing = billing_of(world, topic)
    await declare(broker.url, billing.subscription)
    poison = order(1, topic=topic, payload=bytes(range(256)), headers=(("x", b"\x00\xff"),))

    await asyncio.to_thread(publish, broker.url, topic, [poison, order(2, topic=topic)])
    ran = await run(world, billing, broker.url, lambda: world.effects() == [2])

    (letter,) = world.rows(tables.dead_letters)
    assert letter.payload == poison.payload
    assert letter.key == b"k"
    assert letter.origin == ran.received[0].origin
    assert len(ran.acknowledged) == 2
