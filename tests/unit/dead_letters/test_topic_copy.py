"""A dead letter is copied to a topic, in the words that people's tools read; the letter itself is what counts."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import avro, dead_letters, tables
from outboxkit.brokers import Delivery
from outboxkit.codecs.avro import encode
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.dead_letters import Filter, Stage, State, of_delivery
from outboxkit.dead_letters.topic_copy import DeadLetterTopic, Style, headers_of
from outboxkit.errors import ConfigurationError, DecodeError
from outboxkit.events import EventType
from outboxkit.headers import pack_headers, unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, impatient, order, row_of

NUMBER = {"name": "number", "type": "int"}
WRITER = {"type": "record", "name": "shop.Order", "fields": [NUMBER]}
READER = WRITER | {"fields": [NUMBER, {"name": "vat", "type": "int"}]}
DIGESTS = [avro.fingerprint(avro.parse(schema)).hex() for schema in (WRITER, READER)]
OCCURRED = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)


def failing(world: ConsumerFixture, **options: Any) -> Consumer:
    found = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=1), **options)

    @found.on(OrderPlaced, topic="orders")
    async def handle(event: OrderPlaced, session: AsyncSession) -> None:
        raise KeyError(event.number)

    return found


def reading(world: ConsumerFixture, **options: Any) -> Consumer:
    found = Consumer("billing", sessions=world.asynchronous, retry=impatient(), **options)

    @found.on(EventType(name="order.placed", schema=READER, codec="avro"), topic="orders")
    async def handle(event: dict[str, Any], session: AsyncSession) -> None:
        pass

    return found


async def copied(world: ConsumerFixture, consumer: Consumer, message: Message) -> tuple[Any, dict[str, bytes]]:
    world.send(message)
    await world.run(consumer)
    (row,) = world.rows(tables.outbox_messages)
    return row, dict(unpack_headers(row.headers))


def letter(world: ConsumerFixture) -> dead_letters.DeadLetter:
    with world.engine.connect() as connection:
        (found,) = dead_letters.find(connection, Filter())
    return found


async def test_without_being_asked_nothing_is_copied(world: ConsumerFixture) -> None:
    world.send(order(1))
    await world.run(failing(world))

    assert letter(world).state is State.DEAD
    assert world.count(tables.outbox_messages) == 0


async def test_a_copy_has_the_messages_bytes_and_id_and_says_what_happened(world: ConsumerFixture) -> None:
    sent = order(7, headers=(("tenant", b"\xff"),), occurred_at=OCCURRED)

    row, headers = await copied(world, failing(world, copy_to="{topic}.{consumer}.dlq"), sent)

    assert (row.topic, row.key, row.payload, row.type) == ("orders.billing.dlq", b"k", sent.payload, "order.placed")
    assert (str(row.message_id), headers["ce_id"].decode(), headers["tenant"]) == (sent.id, sent.id, b"\xff")
    assert "ce_sequence" not in headers, "the relay adds a new one"
    died = letter(world)
    said = {name.removeprefix("outboxkit-dlq-"): value.decode() for name, value in headers.items() if "dlq" in name}
    assert said.pop("error").startswith("KeyError at test_topic_copy.py:")
    assert said.pop("first-failed-at").endswith("Z")
    assert said == {
        "id": str(died.id),
        "consumer": "billing",
        "topic": "orders",
        "partition": "0",
        "offset": "0",
        "origin": died.origin,
        "failure": "handler",
        "stage": "handler",
        "error-class": "KeyError",
        "attempts": "2",
        "generation": "0",
        "cause": died.group,
    }
    assert not [name for name in headers if name.startswith("outboxkit-schema-")]


async def test_springs_names_have_springs_bytes(world: ConsumerFixture) -> None:
    sent = order(7, occurred_at=OCCURRED)
    row, headers = await copied(world, failing(world, copy_to=DeadLetterTopic("{topic}-dlt", style="spring")), sent)

    assert row.topic == "orders-dlt"
    assert headers["kafka_dlt-exception-message"].startswith(b"KeyError at test_topic_copy.py:")
    assert headers["outboxkit-dlq-id"].decode() == str(letter(world).id)
    assert {name: value for name, value in headers.items() if name.startswith("kafka_dlt-original")} == {
        "kafka_dlt-original-topic": b"orders",
        "kafka_dlt-original-partition": bytes(4),
        "kafka_dlt-original-offset": bytes(8),
        "kafka_dlt-original-timestamp": int(OCCURRED.timestamp() * 1000).to_bytes(8, "big"),
        "kafka_dlt-original-timestamp-type": b"CREATE_TIME",
        "kafka_dlt-original-consumer-group": b"billing",
    }


async def test_connects_names_have_text(world: ConsumerFixture) -> None:
    _, headers = await copied(world, failing(world, copy_to=DeadLetterTopic("dlq", style="connect")), order(7))

    said = {name: value for name, value in headers.items() if name.startswith("__connect.errors.")}
    assert said.pop("__connect.errors.exception.message").startswith(b"KeyError at")
    assert said == {
        "__connect.errors.topic": b"orders",
        "__connect.errors.partition": b"0",
        "__connect.errors.offset": b"0",
        "__connect.errors.connector.name": b"billing",
        "__connect.errors.task.id": b"0",
        "__connect.errors.stage": b"TASK_PUT",
        "__connect.errors.class.name": b"outboxkit.Consumer",
        "__connect.errors.exception.class.name": b"KeyError",
    }


@pytest.mark.parametrize("style", ["outboxkit", "spring", "connect"])
async def test_what_broke_in_the_schema_is_said_in_every_style(world: ConsumerFixture, style: str) -> None:
    """A message of Confluent's serializer: the schema has a number there, which means nothing elsewhere."""
    body = b"\x00\x00\x00\x00\x29" + encode(avro.parse(WRITER), {"number": 7})
    consumer = reading(world, copy_to=DeadLetterTopic("dlq", style=style), resolve=lambda _: json.dumps(WRITER))

    row, headers = await copied(world, consumer, order(7, payload=body, content_type=""))

    facts = {name: value.decode() for name, value in headers.items() if name.startswith("outboxkit-schema-")}
    problems = json.loads(facts.pop("outboxkit-schema-problems"))
    assert [problem["field"] for problem in problems] == ["Order.vat"]
    assert facts == {
        "outboxkit-schema-frame": "confluent-id",
        "outboxkit-schema-writer-id": "41",
        "outboxkit-schema-writer-fingerprint": DIGESTS[0],
        "outboxkit-schema-reader-fingerprint": DIGESTS[1],
        "outboxkit-schema-subject": "shop.Order",
        "outboxkit-schema-stage": "decode",
        "outboxkit-schema-path": "vat",
        "outboxkit-schema-byte-offset": "5",
    }
    died = letter(world)
    assert (died.path, died.byte_offset, died.writer_schema) == ("vat", 5, DIGESTS[0])
    assert row.payload == body


async def test_a_message_whose_envelope_is_broken_is_copied_without_it(world: ConsumerFixture) -> None:
    envelope = (("ce_id", b"m-1"), ("ce_type", b"order.placed"), ("ce_time", b"yesterday"), ("tenant", b"a"))
    world.exchange.append("orders", row_of(order(1))._replace(headers=pack_headers(envelope)))

    await world.run(failing(world, copy_to="dlq"))

    (row,) = world.rows(tables.outbox_messages)
    headers = dict(unpack_headers(row.headers))
    assert (headers["tenant"], headers["outboxkit-dlq-stage"]) == (b"a", b"read")
    assert "ce_time" not in headers
    assert dict(unpack_headers(letter(world).headers))["ce_time"] == b"yesterday"


async def test_a_redelivery_of_a_dead_message_is_not_copied_again(world: ConsumerFixture) -> None:
    sent = order(1)
    world.send(sent, sent)

    await world.run(failing(world, copy_to="dlq"))
    world.send(sent)
    await world.run(failing(world, copy_to="dlq"))

    assert world.count(tables.outbox_messages) == 1


async def test_a_copy_that_dies_again_tells_of_its_last_death(world: ConsumerFixture) -> None:
    _, first = await copied(world, failing(world, copy_to="orders.dlq"), order(1))
    world.relay()
    watchers = Consumer("watchers", sessions=world.asynchronous, retry=impatient(), copy_to="watchers.dlq")

    @watchers.on(OrderPlaced, topic="orders.dlq")
    async def handle(event: OrderPlaced, ctx: MessageContext) -> None:
        ctx.dead_letter("nobody reads this")

    await world.run(watchers)

    (row,) = world.rows(tables.outbox_messages)
    headers = unpack_headers(row.headers)
    assert [value for name, value in headers if name == "outboxkit-dlq-error"] == [b"nobody reads this"]
    assert [value for name, value in headers if name == "outboxkit-dlq-topic"] == [b"orders.dlq"]
    assert first["outboxkit-dlq-topic"] == b"orders"
    assert [name for name, _ in headers].count("ce_id") == 1


def test_headers_stay_small_whatever_is_wrong_with_a_schema() -> None:
    found = of_delivery(
        Delivery(topic="t", key=None, headers=(), payload=b"", origin="t[0]@1"),
        None,
        consumer="c",
        kind="event",
        failure=Failure.POISON,
        stage=Stage.DECODE,
        error=DecodeError("x" * 10_000),
        attempts=1,
    )
    many = replace(found, problems=[{"kind": "TYPE_MISMATCH", "field": "f" * 90, "message": "m" * 400}] * 20)

    headers = headers_of(many, Delivery(topic="t", key=None, headers=(), payload=b"", origin=""), Style.OUTBOXKIT)

    assert sum(len(value) for _, value in headers) < 10_000
    assert 1 < len(json.loads(dict(headers)["outboxkit-schema-problems"])) < 10


@pytest.mark.parametrize(
    ("topic", "style", "why"),
    [
        ("{queue}", "outboxkit", "may hold {topic} and {consumer} only"),
        ("", "spring", "need a topic"),
        ("dlq", "kafka", "a style of outboxkit, spring, connect"),
    ],
)
def test_a_wrong_destination_is_refused_at_once(topic: str, style: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        DeadLetterTopic(topic, style=style)
