"""What a handler is given, and which handler a message goes to."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit.brokers import Delivery
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import Consumer, MessageContext
from outboxkit.consumer.envelopes import MAX_UNPACKED
from outboxkit.dead_letters import Stage
from outboxkit.errors import ConfigurationError
from outboxkit.events import event
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, consumer, handles, letters, order

PLACED = datetime(2026, 11, 30, 12, tzinfo=UTC)


class Facts(MemorySubscriber):
    """Hands deliveries out with other facts."""

    facts: ClassVar[dict[str, Any]] = {}

    async def receive(self, limit: int, timeout: timedelta) -> list[Delivery]:
        return [replace(one, **self.facts) for one in await super().receive(limit, timeout)]


async def run(world: ConsumerFixture, billing: Consumer, monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    monkeypatch.setattr(Facts, "facts", facts)
    monkeypatch.setattr("tests.consumer_fixture.MemorySubscriber", Facts)
    await world.run(billing)


async def test_the_facts_of_the_record_are_in_the_context(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit = consumer(world, "audit")
    seen: list[MessageContext] = []

    @audit.on("order.*", topic="orders")
    async def keep(message: Message, ctx: MessageContext) -> None:
        seen.append(ctx)

    world.send(order(1))
    facts = {"timestamp": PLACED, "routing_key": "order.placed", "reply_to": "answers", "redelivered": True}
    await run(world, audit, monkeypatch, **facts)

    (ctx,) = seen
    assert (ctx.partition, ctx.offset, ctx.timestamp, ctx.routing_key) == (0, 0, PLACED, "order.placed")
    assert (ctx.reply_to, ctx.redelivered, ctx.is_tombstone) == ("answers", True, False)


async def test_no_payload_is_not_an_empty_one(world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = consumer(world, "audit", message_id="place")
    seen: list[bool] = []

    @audit.on("order.*", topic="orders")
    async def keep(message: Message, ctx: MessageContext) -> None:
        seen.append(ctx.is_tombstone)

    world.send(order(1, payload=b""))
    await run(world, audit, monkeypatch)
    world.send(order(2))
    await run(world, audit, monkeypatch, payload=None)

    assert seen == [False, True]


async def test_the_routing_key_is_the_type_of_what_has_none(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    billing = consumer(world, message_id="place")
    handles(billing)
    billing.on("order.cancelled", topic="orders")(_raw)

    world.send(order(1))
    await run(world, billing, monkeypatch, headers=(), routing_key="order.placed")
    world.send(order(2))
    await run(world, billing, monkeypatch, headers=(), routing_key="order.shipped")

    assert world.effects() == [1]
    assert billing.counts["ignored"] == 1
    assert letters(world) == []


async def test_what_the_client_could_not_read_is_a_letter(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1))
    await run(world, billing, monkeypatch, fault="the timestamp is no time")

    (letter,) = letters(world)
    assert (letter.stage, letter.error) == (Stage.READ, "the timestamp is no time")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "identity", ""])
async def test_a_packed_payload_is_unpacked(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    billing = consumer(world)
    handles(billing)
    packers: dict[str, Any] = {"gzip": gzip.compress, "deflate": zlib.compress}
    pack = packers.get(encoding.lower(), bytes)

    world.send(order(1))
    payload = pack(b'{"number": 1}')
    await run(world, billing, monkeypatch, payload=payload, content_encoding=encoding or None)

    assert world.effects() == [1]


BROKEN = {
    "an unknown one": ("zstd", b"x"),
    "not what it says": ("gzip", b"{}"),
    "cut short": ("gzip", gzip.compress(b"x" * 5_000)[:-10]),
    "a bomb": ("gzip", gzip.compress(bytes(MAX_UNPACKED + 1))),
}


@pytest.mark.parametrize(("encoding", "payload"), list(BROKEN.values()), ids=list(BROKEN))
async def test_an_encoding_that_cannot_be_read_is_a_letter_with_the_bytes(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch, encoding: str, payload: bytes
) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1))
    await run(world, billing, monkeypatch, payload=payload, content_encoding=encoding)

    (letter,) = letters(world)
    assert (letter.stage, letter.payload) == (Stage.READ, payload)


async def test_the_deadline_is_that_of_the_message_when_it_is_earlier(world: ConsumerFixture) -> None:
    billing = consumer(world, timeout="1h")
    left: list[timedelta] = []

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, ctx: MessageContext) -> None:
        left.append(ctx.remaining())

    world.send(order(1), order(2, expires_at=datetime.now(UTC) + timedelta(minutes=1)))
    await world.run(billing)

    assert timedelta(minutes=59) < left[0] <= timedelta(hours=1)
    assert timedelta(0) < left[1] <= timedelta(minutes=1)


@event("order.shipped", version=1)
@dataclass(frozen=True)
class ShippedV1:
    carrier: str


@event("order.shipped", version=2)
@dataclass(frozen=True)
class ShippedV2:
    carrier_id: int


@pytest.mark.parametrize(
    ("dataschema", "payload", "handler"),
    [
        ("urn:outboxkit:order.shipped:1", b'{"carrier": "post"}', "v1"),
        ("urn:outboxkit:order.shipped:2", b'{"carrier_id": 7}', "v2"),
        ("urn:outboxkit:order.shipped:3", b'{"carrier_id": 7}', "v2"),
        ("", b'{"carrier_id": 7}', "v2"),
        ("urn:outboxkit:order.shipped:\xb2", b'{"carrier_id": 7}', "v2"),
    ],
)
async def test_versions_of_an_event_have_their_handlers_side_by_side(
    world: ConsumerFixture, dataschema: str, payload: bytes, handler: str
) -> None:
    billing = consumer(world)
    calls: list[tuple[str, object]] = []

    @billing.on(ShippedV1, topic="orders")
    async def old(shipped: ShippedV1) -> None:
        calls.append(("v1", shipped))

    @billing.on(ShippedV2, topic="orders")
    async def new(shipped: ShippedV2) -> None:
        calls.append(("v2", shipped))

    world.send(order(1, type="order.shipped", dataschema=dataschema, payload=payload))
    await world.run(billing)

    assert [name for name, _ in calls] == [handler]


def test_a_second_handler_of_one_version_is_refused(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    with pytest.raises(ConfigurationError, match="has a handler already"):
        handles(billing)


async def test_a_star_takes_what_nobody_else_does(world: ConsumerFixture) -> None:
    billing = consumer(world)
    others: list[str] = []

    @billing.on("*", topic="orders")
    async def keep(message: Message) -> None:
        others.append(message.type)

    handles(billing)
    billing.on("bill.*", topic="orders")(_raw)
    world.send(order(1), order(2, type="order.cancelled"), order(3, type="bill.paid"))
    await world.run(billing)

    assert world.effects() == [1]
    assert others == ["order.cancelled"]


async def _raw(message: Message, session: AsyncSession) -> None:
    return None


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
