"""Random deliveries among good ones: every good one is handled once, every bad one is a letter, on every broker."""

from __future__ import annotations

import asyncio
import os
import random
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from uuid import uuid4

import pytest
from confluent_kafka import Producer
from sqlalchemy import select
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit.brokers import Subscriber, open_subscriber
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.headers import unpack_headers
from outboxkit.message import Message
from tests.bad_inputs import Handed, delivery
from tests.conftest import PROFILE
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, Until, impatient
from tests.integration.brokers.raw_client import RawClient, sized
from tests.property.consumer.random_deliveries import TAG, RandomDelivery, random_delivery

COUNTS = {"memory": 50_000, "kafka": 100_000, "rabbitmq": 100_000} if PROFILE == "full" else {}
SEED = int(os.environ.get("OUTBOXKIT_TEST_SEED", "4711"))

Send = Callable[[str, str, Sequence[RandomDelivery]], None]


def to_kafka(url: str, topic: str, sent: Sequence[RandomDelivery]) -> None:
    producer = Producer({"bootstrap.servers": url.removeprefix("kafka://"), "queue.buffering.max.messages": 1_000_000})
    for one in sent:
        producer.produce(topic, one.payload, one.key, headers=list(one.headers))
        producer.poll(0)
    assert producer.flush(120) == 0


def to_rabbitmq(url: str, topic: str, sent: Sequence[RandomDelivery]) -> None:
    """With every header in the table, as bytes, and no property at all."""
    with closing(RawClient(url)) as client:
        for one in sent:
            named = ((name.replace("ce_", "cloudEvents:", 1).encode(), value) for name, value in one.headers)
            table = b"".join(bytes((len(name),)) + name + sized(b"x", value) for name, value in named)
            client.publish(topic, one.payload or b"", struct.pack(">H", 1 << 13) + sized(b"", table), topic)


SENDERS: dict[str, Send] = {"kafka": to_kafka, "amqp": to_rabbitmq}


def billing_of(world: ConsumerFixture, topic: str) -> Consumer:
    billing = Consumer("billing", sessions=world.plain, retry=impatient(), batch=20)

    @billing.on(OrderPlaced, topic=topic)
    def bill(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    return billing


async def subscriber_of(url: str, billing: Consumer, sent: Sequence[RandomDelivery]) -> Subscriber:
    """The subscriber of that broker, which has got them all."""
    (topic,) = billing.subscription.topics
    kind = url.partition("://")[0]
    if kind == "memory":
        as_sent = (Message(id="", type="", topic=topic, payload=b"") for _ in sent)
        given = [
            delivery(message, key=one.key, headers=one.headers, payload=one.payload)
            for message, one in zip(as_sent, sent, strict=True)
        ]
        return Handed(given)
    subscriber = open_subscriber(url, billing.subscription, {})
    await subscriber.declare(billing.subscription)
    await asyncio.to_thread(SENDERS[kind], url, topic, sent)
    return subscriber


@pytest.mark.timeout(2_400)  # the large counts take minutes
@pytest.mark.parametrize("kind", ["memory", "kafka", "rabbitmq"])
async def test_every_good_one_is_handled_once_and_every_bad_one_is_a_letter(
    world: ConsumerFixture, request: pytest.FixtureRequest, kind: str
) -> None:
    count, topic = COUNTS.get(kind, 300 if kind == "memory" else 100), f"random-{uuid4().hex[:8]}"
    rng = random.Random(SEED)
    sent = [random_delivery(rng, number, topic) for number in range(count)]
    good = {one.number for one in sent if one.is_good}
    billing = billing_of(world, topic)
    url = "memory://" if kind == "memory" else request.getfixturevalue(kind).url
    subscriber = await subscriber_of(url, billing, sent)
    stop = asyncio.Event()
    ran = Until(subscriber, stop, lambda: settled(world) >= count, idle=timedelta(milliseconds=100))

    await billing.run(ran, stop)

    handled, buried = Counter(world.effects()), Counter(tags(world))
    assert handled.keys() ^ good == set(), "a bad one was handled, or a good one was not"
    assert set(buried) ^ ({one.number for one in sent} - good) == set(), "a bad one left no trace, or a good one died"
    assert set(handled.values()) == set(buried.values()) == {1}
    assert world.count(tables.inbox_waiting) == 0
    assert billing.counts["ignored"] == billing.counts["stuck"] == 0


def settled(world: ConsumerFixture) -> int:
    return world.count(Effect) + world.count(tables.dead_letters)


def tags(world: ConsumerFixture) -> list[int]:
    with world.engine.connect() as connection:
        packed = connection.scalars(select(tables.dead_letters.c.headers))
        return [int(dict(unpack_headers(one))[TAG]) for one in packed]
