"""What is not handled is one of three: not for this consumer, not to be told, or expired. Never acknowledged unseen."""

from __future__ import annotations

import base64
import json
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit.consumer import Consumer
from outboxkit.dead_letters import Stage
from outboxkit.events import EventType
from outboxkit.headers import pack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from outboxkit.rows import Row
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, consumer, handles, letters, order, row_of

PLAIN = b'{"number": 1}'
STRUCTURED = ("content-type", b"application/cloudevents+json; charset=UTF-8")


def foreign(*headers: tuple[str, bytes], payload: bytes = PLAIN) -> Row:
    """A message of somebody else's making."""
    return row_of(order(1))._replace(headers=pack_headers(headers), payload=payload)


def envelope(**attributes: Any) -> bytes:
    told = {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": "order.placed"} | attributes
    return json.dumps({name: value for name, value in told.items() if value is not None}).encode()


TYPELESS = {
    "plain JSON": (("ce_id", b"1"),),
    "an outbox event router's": (("id", b"1"), ("eventType", b"OrderPlaced")),
    "Spring's": (("__TypeId__", b"shop.OrderPlaced"),),
    "an empty type": (("ce_id", b"1"), ("ce_type", b"")),
}


@pytest.mark.parametrize("headers", list(TYPELESS.values()), ids=list(TYPELESS))
async def test_what_has_no_type_goes_to_the_only_contract_of_its_topic(
    world: ConsumerFixture, headers: tuple[tuple[str, bytes], ...]
) -> None:
    billing = consumer(world, message_id="place")
    handles(billing)

    world.exchange.append("orders", foreign(*headers))
    await world.run(billing)

    assert world.effects() == [1]
    assert billing.counts["ignored"] == 0


@pytest.mark.parametrize("headers", list(TYPELESS.values()), ids=list(TYPELESS))
async def test_what_has_no_type_is_a_letter_where_several_contracts_could_take_it(
    world: ConsumerFixture, headers: tuple[tuple[str, bytes], ...]
) -> None:
    billing = consumer(world, message_id="place")
    handles(billing)
    billing.on("order.cancelled", topic="orders")(_raw)

    world.exchange.append("orders", foreign(*headers))
    await world.run(billing)

    (letter,) = letters(world)
    assert (letter.failure, letter.stage, letter.payload) == (Failure.POISON, Stage.READ, PLAIN)
    assert all(words in letter.error for words in ("no type", "type_of=", "ce_type", "order.placed"))


async def test_the_consumer_may_be_told_the_type(world: ConsumerFixture) -> None:
    billing = consumer(world, message_id="place", type_of=lambda message: message.header("eventType"))
    handles(billing)
    billing.on("order.cancelled", topic="orders")(_raw)

    world.exchange.append("orders", foreign(("eventType", b"order.placed")))
    world.exchange.append("orders", foreign(("eventType", b"order.shipped")))
    await world.run(billing)

    assert world.effects() == [1]
    assert billing.counts["ignored"] == 1, "a type that is told and is another one"
    assert letters(world) == []


async def test_a_raw_handler_of_everything_gets_what_has_no_type(world: ConsumerFixture) -> None:
    audit = consumer(world, "audit", message_id="place")
    seen: list[Message] = []

    @audit.on("*", topic="orders")
    async def keep(message: Message, session: AsyncSession) -> None:
        seen.append(message)

    world.exchange.append("orders", foreign())
    await world.run(audit)

    assert [message.payload for message in seen] == [PLAIN]


async def test_another_type_is_said_once_for_each_topic_and_type(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    billing = consumer(world)
    handles(billing)

    world.send(*(order(n, type=f"order.{'cancelled' if n % 2 else 'shipped'}") for n in range(6)))
    ran = await world.run(billing)

    said = [record for record in caplog.records if record.msg == "consumer.type_ignored"]
    assert sorted((vars(one)["topic"], vars(one)["type"]) for one in said) == [
        ("orders", "order.cancelled"),
        ("orders", "order.shipped"),
    ]
    assert billing.counts["ignored"] == len(ran.acknowledged) == 6


async def test_a_structured_cloud_event_is_read(world: ConsumerFixture) -> None:
    billing = consumer(world)
    seen: list[Message] = []

    @billing.on("order.*", topic="orders")
    async def keep(message: Message, session: AsyncSession) -> None:
        seen.append(message)

    amount = b'{"amount": 19.990, "big": 12345678901234567890.10}'
    text = envelope(time="2026-11-30T10:00:00Z", tenant="a", number=7, data="@").replace(b'"@"', amount)
    world.exchange.append("orders", foreign(STRUCTURED, ("x", b"1"), payload=text))
    await world.run(billing)

    (message,) = seen
    assert (message.id, message.source, message.type) == ("e-1", "/shop", "order.placed")
    assert message.payload == amount, "numbers as they stood"
    assert message.occurred_at == datetime(2026, 11, 30, 10, tzinfo=UTC)
    assert (message.content_type, message.header("x"), message.header("ce_tenant")) == ("application/json", "1", "a")


@pytest.mark.parametrize(
    ("attributes", "payload"),
    [
        ({"data": {"number": 1}}, PLAIN),
        ({"data_base64": base64.b64encode(PLAIN).decode()}, PLAIN),
        ({"data": PLAIN.decode(), "datacontenttype": "text/plain"}, PLAIN),
        ({"datacontenttype": "application/json", "data": [1, {"a": None}]}, b'[1, {"a": null}]'),
        ({}, b""),
    ],
)
async def test_the_data_of_a_structured_event_is_what_binary_mode_would_carry(
    world: ConsumerFixture, attributes: dict[str, Any], payload: bytes
) -> None:
    billing = consumer(world)
    seen: list[bytes] = []

    @billing.on("order.*", topic="orders")
    async def keep(message: Message, session: AsyncSession) -> None:
        seen.append(message.payload)

    world.exchange.append("orders", foreign(STRUCTURED, payload=envelope(**attributes)))
    await world.run(billing)

    assert seen == [payload]


async def test_a_structured_event_reaches_a_typed_handler_and_its_copy_is_a_duplicate(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    for _ in range(2):
        world.exchange.append("orders", foreign(STRUCTURED, payload=envelope(data={"number": 1})))
    await world.run(billing)

    assert world.effects() == [1]
    assert billing.counts["duplicate"] == 1


@pytest.mark.parametrize(("expired", "effects", "dead"), [("skip", [2], 0), ("dead", [2], 1), ("handle", [1, 2], 0)])
async def test_an_expired_message_goes_by_the_policy(
    world: ConsumerFixture, expired: Any, effects: list[int], dead: int
) -> None:
    billing = consumer(world, expired=expired)
    handles(billing)

    world.send(order(1, expires_at=datetime.now(UTC) - timedelta(seconds=1)))
    world.send(order(2, expires_at=datetime.now(UTC) + timedelta(hours=1)))
    ran = await world.run(billing)

    assert world.effects() == effects
    assert len(letters(world)) == dead
    assert billing.counts["expired"] == (expired == "skip")
    assert len(ran.acknowledged) == 2


async def _raw(message: Message, session: AsyncSession) -> None:
    session.add(Effect(message_id=message.id, number=-1))


def test_a_consumer_says_what_it_is() -> None:
    world_of_nobody: Any = type("Sessions", (), {"kw": {}, "__call__": lambda _self: None})()
    billing = Consumer("billing", sessions=world_of_nobody)
    billing.on(OrderPlaced, topic="orders")(lambda placed: placed and None)

    assert repr(billing) == "<Consumer 'billing': 1 handlers of orders>"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))


SHIPPED = {"type": "record", "name": "Shipped", "namespace": "shop", "fields": [{"name": "number", "type": "int"}]}
PAID = {"type": "record", "name": "Paid", "namespace": "shop", "fields": [{"name": "number", "type": "int"}]}
REGISTRY = {
    "7": json.dumps(SHIPPED),
    "8": json.dumps(PAID),
    "9": json.dumps(PAID | {"name": "Refunded"}),
    "10": '"string"',
}


def framed(schema_id: int, number: int = 5) -> bytes:
    """Confluent's frame of five bytes, and an int."""
    return b"\0" + schema_id.to_bytes(4, "big") + bytes([number * 2])


@pytest.mark.parametrize(
    ("schema_id", "handled", "ignored_and_dead"),
    [(7, ["shipped"], (0, 0)), (8, ["paid"], (0, 0)), (9, [], (1, 0)), (10, [], (0, 1))],
)
async def test_a_confluent_frame_names_the_record_and_the_record_names_the_contract(
    world: ConsumerFixture, schema_id: int, handled: list[str], ignored_and_dead: tuple[int, int]
) -> None:
    billing = consumer(world, message_id="place", resolve=lambda name: REGISTRY[name])
    calls: list[str] = []

    @billing.on(EventType(name="order.shipped", schema=SHIPPED, codec="avro"), topic="orders")
    async def shipped(event: dict[str, Any]) -> None:
        calls.append("shipped")

    @billing.on(EventType(name="order.paid", schema=PAID, codec="avro"), topic="orders")
    async def paid(event: dict[str, Any]) -> None:
        calls.append("paid")

    world.exchange.append("orders", foreign(payload=framed(schema_id)))
    ran = await world.run(billing)

    assert calls == handled
    assert (billing.counts["ignored"], len(letters(world))) == ignored_and_dead
    assert len(ran.acknowledged) == 1
