"""Whatever one delivery does to us, the run goes on: it is handled, waits, or is a dead letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from outboxkit import tables
from outboxkit.brokers import Delivery
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import crash_marker
from outboxkit.dead_letters import Stage
from outboxkit.headers import pack_headers, unpack_headers
from outboxkit.message import Message
from outboxkit.rows import Row
from tests.consumer_fixture import ConsumerFixture, Until, consumer, handles, impatient, letters, order, row_of


def with_header(name: str, value: bytes, **others: Any) -> Row:
    """A row on whose header this value stands, whatever it is."""
    row = row_of(order(1, **others))
    kept = [header for header in unpack_headers(row.headers) if header[0] != name]
    return row._replace(headers=pack_headers((*kept, (name, value))))


def test_a_delivery_has_a_name_that_fits_into_an_index_whatever_its_topic() -> None:
    topic = "t" * 8_000
    placed = [Delivery(topic=topic, key=None, headers=(), payload=b"", origin="", offset=at) for at in (1, 2)]
    names = [crash_marker.identity(delivery) for delivery in placed]

    assert max(map(len, names)) <= 1_024, "the bound of inbox_suspects"
    assert len(set(names)) == 2


def without_id() -> Row:
    row = row_of(order(1))
    return row._replace(headers=pack_headers(tuple(h for h in unpack_headers(row.headers) if h[0] != "ce_id")))


POISON: dict[str, Callable[[], Row]] = {
    "an id of 8 kB": lambda: with_header("ce_id", b"x" * 8_000),
    "a source of 8 kB": lambda: with_header("ce_source", b"x" * 8_000),
    "an id with a NUL": lambda: with_header("ce_id", b"a\0b"),
    "a source with a NUL": lambda: with_header("ce_source", b"a\0b"),
    "an id that is not UTF-8": lambda: with_header("ce_id", b"\xff\xfe"),
    "a type that is not UTF-8": lambda: with_header("ce_type", b"\xff"),
    "a source that is not UTF-8": lambda: with_header("ce_source", b"\xff"),
    "a content type that is not UTF-8": lambda: with_header("content-type", b"\xff"),
    "a time that is none": lambda: with_header("ce_time", b"yesterday"),
    "a time in the year 0": lambda: with_header("ce_time", b"0000-01-01T00:00:00Z"),
    "an expiry that is not UTF-8": lambda: with_header("ce_expirytime", b"\xff"),
    "a schema that is not UTF-8": lambda: with_header("outboxkit-schema", b"\xff"),
    "no id": without_id,
    "an empty payload": lambda: row_of(order(1, payload=b"")),
    "a bomb of brackets": lambda: row_of(order(1, payload=b"[" * 200_000)),
    "a structured envelope that is none": lambda: with_header("content-type", b"application/cloudevents+json"),
    "a structured batch": lambda: with_header("content-type", b"application/cloudevents-batch+json"),
    "a structured event in Avro": lambda: with_header("content-type", b"application/cloudevents+avro"),
    "an envelope of brackets": lambda: with_header(
        "content-type", b"application/cloudevents+json", payload=b'{"data":' + b"[" * 200_000
    ),
}


@pytest.mark.parametrize("poison", list(POISON.values()), ids=list(POISON))
async def test_what_cannot_be_read_is_a_letter_and_the_next_one_is_handled(
    world: ConsumerFixture, poison: Callable[[], Row]
) -> None:
    billing = consumer(world)
    handles(billing)

    row = poison()
    world.exchange.append("orders", row)
    world.send(order(2))
    ran = await world.run(billing)

    (letter,) = letters(world)
    assert world.effects() == [2]
    assert len(ran.acknowledged) == 2
    assert letter.payload == row.payload
    assert set(unpack_headers(row.headers)) <= set(unpack_headers(letter.headers)), "byte for byte"
    assert letter.error
    assert world.count(tables.inbox_waiting) == 0


EXTRACTORS: dict[str, Any] = {
    "raises": lambda message: json.loads(message.payload)["nothing"],
    "raises no Exception of ours": lambda _message: 1 // 0,
    "returns a number": lambda _message: 7,
    "returns bytes": lambda _message: b"7",
    "returns None": lambda _message: None,
    "returns nothing": lambda _message: "",
    "returns a NUL": lambda _message: "a\0b",
    "returns 2 kB": lambda _message: "x" * 2_048,
    "returns half a character": lambda _message: "\ud800",
    "recurses": lambda message: EXTRACTORS["recurses"](message),  # noqa: PLW0108  that is the point
}


@pytest.mark.parametrize("argument", ["message_id", "type_of"])
@pytest.mark.parametrize("extractor", list(EXTRACTORS.values()), ids=list(EXTRACTORS))
async def test_an_extractor_that_fails_is_a_fault_of_that_message(
    world: ConsumerFixture, extractor: Any, argument: str
) -> None:
    def only_for_foreign(message: Message) -> object:
        return message.id or extractor(message) if argument == "message_id" else message.type or extractor(message)

    options: dict[str, Any] = {argument: only_for_foreign}
    billing = consumer(world, **options)
    handles(billing)
    row = without_id() if argument == "message_id" else _without("ce_type")

    world.exchange.append("orders", row)
    world.send(order(2))
    ran = await world.run(billing)

    assert world.effects()[-1] == 2
    assert len(ran.acknowledged) == 2
    found = [(letter.stage, letter.payload) for letter in letters(world)]
    is_no_type = argument == "type_of" and extractor(order(1)) in (None, "") if _is_calm(extractor) else False
    if is_no_type:
        assert world.effects() == [1, 2], "the only contract of the topic"
    elif argument == "type_of" and _is_calm(extractor) and isinstance(extractor(order(1)), str):
        assert billing.counts["ignored"] == 1, "a type that nobody takes"
    else:
        assert found == [(Stage.READ, row.payload)]


async def test_an_extractor_may_ask_the_delivery_and_the_place_is_ready_made(world: ConsumerFixture) -> None:
    placed = consumer(world, "placed", message_id="place")
    own = consumer(world, "own", message_id=lambda _message, delivery: f"{delivery.partition}-{delivery.offset}")
    for billing in (placed, own):
        handles(billing)

    for _ in range(3):
        world.exchange.append("orders", without_id())
    await world.run(placed)
    await world.run(own)

    assert world.effects() == [1] * 6, "equal readings at three places are three messages"
    ids = sorted(row.message_id for row in world.rows(tables.inbox_messages))
    assert ids == ["0-0", "0-1", "0-2", "orders/0/0", "orders/0/1", "orders/0/2"]


REFUSALS = {
    "the waiting row": ["inbox_waiting"],
    "the letter": ["dead_letters"],
    "the inbox row": ["inbox_messages"],
    "the inbox row and the letter": ["inbox_messages", "dead_letters"],
    "everything": ["inbox_messages", "inbox_waiting", "dead_letters"],
}


@pytest.mark.parametrize("refusing", list(REFUSALS.values()), ids=list(REFUSALS))
async def test_a_database_that_refuses_one_messages_data_does_not_stop_the_others(
    world: ConsumerFixture, refusing: list[str]
) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    def fail(number: int, _ctx: Any) -> None:
        if number == 1:
            raise KeyError

    handles(billing, fail)
    for table in refusing:
        refuse(world, table)

    world.send(order(1, message_id="unloved"), order(2), order(3, key="other"))
    ran = await world.run(billing)

    assert sorted(world.effects()) == [2, 3]
    (letter,) = letters(world)
    assert letter.payload == b'{"number": 1}'
    kept = not {"dead_letters", "inbox_messages"} & set(refusing)
    assert letter.message_id == ("unloved" if kept else "")
    assert len(ran.acknowledged) == 3


async def test_a_letter_that_cannot_be_stored_at_all_leaves_its_message_with_the_broker(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    billing = consumer(world)
    handles(billing, lambda number, ctx: ctx.dead_letter("no") if number == 1 else None)
    refuse(world, "dead_letters", every=True)

    world.send(order(1), order(2), order(3, key="other"))
    stop = asyncio.Event()
    ran = Until(MemorySubscriber(world.exchange, billing.subscription), stop, lambda: False)
    running = asyncio.create_task(billing.run(ran, stop))
    while len(ran.acknowledged) < 2 or not billing.counts["stuck"]:  # noqa: ASYNC110  waits for facts
        await asyncio.sleep(0.01)
    stop.set()
    await running

    assert sorted(world.effects()) == [2, 3]
    assert {delivery.payload for delivery in ran.acknowledged} == {b'{"number": 2}', b'{"number": 3}'}
    assert billing.counts["stuck"] == 1
    assert "message.stuck" in caplog.text


def refuse(world: ConsumerFixture, table: str, *, every: bool = False) -> None:
    """Makes the database refuse what belongs to the message `unloved`, as it refuses data of any other reason."""
    told = {
        "inbox_waiting": "instr(CAST(NEW.headers AS TEXT), 'unloved') > 0",
        "dead_letters": "1" if every else "NEW.message_id = 'unloved'",
        "inbox_messages": "NEW.message_id = 'unloved'",
    }[table]
    postgres = {
        "inbox_waiting": "position('unloved'::bytea IN NEW.headers) > 0",
        "dead_letters": "true" if every else "NEW.message_id = 'unloved'",
        "inbox_messages": "NEW.message_id = 'unloved'",
    }[table]
    with world.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            body = "BEGIN SELECT RAISE(ABORT, 'refused'); END"
            connection.exec_driver_sql(f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} WHEN {told} {body}")
            return
        connection.execute(
            text(
                f"CREATE FUNCTION no_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF {postgres} THEN "
                "RAISE program_limit_exceeded; END IF; RETURN NEW; END $$"
            )
        )
        body = f"FOR EACH ROW EXECUTE FUNCTION no_{table}()"
        connection.exec_driver_sql(f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} {body}")


def _without(name: str) -> Row:
    row = row_of(order(1))
    return row._replace(headers=pack_headers(tuple(h for h in unpack_headers(row.headers) if h[0] != name)))


def _is_calm(extractor: Any) -> bool:
    try:
        extractor(order(1))
    except (ArithmeticError, LookupError, RecursionError):
        return False
    return True


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
