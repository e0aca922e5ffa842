"""A schema registry that is away is an outage: messages wait for it, and none becomes a dead letter."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import avro, tables
from outboxkit.codecs.avro import encode
from outboxkit.consumer import Consumer
from outboxkit.errors import RegistryUnavailable, SchemaNotFound
from outboxkit.events import EventType
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order

ORDER = {"type": "record", "name": "Order", "fields": [{"name": "number", "type": "int"}]}
PLACED = EventType(name="order.placed", schema=ORDER, codec="avro")


class Registry:
    """Away for some questions; then it knows one schema."""

    def __init__(self, away: int) -> None:
        self.left, self.asked = away, 0

    def resolve(self, name: str) -> str:
        self.asked += 1
        if self.left:
            self.left -= 1
            raise RegistryUnavailable("the registry is away")
        if name != "41":
            raise SchemaNotFound(name)
        return json.dumps(ORDER)


def consumer(world: ConsumerFixture, registry: Registry) -> Consumer:
    found = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=1), resolve=registry.resolve)

    @found.on(PLACED, topic="orders")
    async def handle(event: dict[str, Any], session: AsyncSession) -> None:
        session.add(Effect(message_id="", number=event["number"]))

    return found


def avro_order(number: int, schema_id: int = 41) -> Message:
    body = schema_id.to_bytes(5, "big") + encode(avro.parse(ORDER), {"number": number})
    return order(number, payload=body, content_type="")


async def test_messages_wait_for_the_registry_and_spend_no_attempt(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(away=6)
    world.send(avro_order(1), avro_order(2))

    with caplog.at_level(logging.INFO, "outboxkit"):
        await world.run(consumer(world, registry))

    assert world.effects() == [1, 2]
    assert world.count(tables.dead_letters) == world.count(tables.inbox_waiting) == 0
    assert registry.asked == 7, "and what was found once is not asked for again"
    said = [record.message for record in caplog.records if "registry" in record.message]
    assert said == ["consumer.registry_away", "consumer.registry_back"]


async def test_a_schema_that_the_registry_does_not_know_is_a_dead_letter(world: ConsumerFixture) -> None:
    world.send(avro_order(1, schema_id=7), avro_order(2))

    await world.run(consumer(world, Registry(away=0)))

    (letter,) = world.rows(tables.dead_letters)
    assert (letter.error_class, letter.stage, letter.writer_schema) == ("SchemaNotFound", "decode", "7")
    assert world.effects() == [2]


async def test_a_schema_that_is_registered_late_is_waited_for(world: ConsumerFixture) -> None:
    registry = Registry(away=0)
    known = registry.resolve

    def late(name: str) -> str:
        if registry.asked < 3:
            registry.asked += 1
            raise SchemaNotFound(name)
        return known(name)

    found = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=5))
    found.resolve_with(late)
    found.resolve_with(lambda name: name)

    @found.on(PLACED, topic="orders")
    async def handle(event: dict[str, Any], session: AsyncSession) -> None:
        session.add(Effect(message_id="", number=event["number"]))

    world.send(avro_order(1))
    await world.run(found)

    assert world.effects() == [1]
    assert world.count(tables.dead_letters) == 0


async def test_an_outage_inside_a_handler_is_retried_as_its_policy_says(world: ConsumerFixture) -> None:
    calls: list[int] = []
    found = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=3))

    @found.on(OrderPlaced, topic="orders")
    async def handle(event: OrderPlaced, session: AsyncSession) -> None:
        calls.append(event.number)
        if len(calls) < 3:
            raise RegistryUnavailable("away")

    world.send(order(1))
    await world.run(found)

    assert calls == [1, 1, 1]
    assert world.count(tables.dead_letters) == 0
