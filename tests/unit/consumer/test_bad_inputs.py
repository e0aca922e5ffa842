"""Inputs that were made to hurt: each ends as handled, or as a dead letter that says why; the run goes on.

Every test puts its inputs between two good orders, of keys of their own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import tables
from outboxkit.avro.binary.json_values import write_long
from outboxkit.brokers import Delivery
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.dead_letters import DeadLetter, Filter, Stage, find
from outboxkit.errors import SchemaNotFound
from outboxkit.events import EventType, event
from outboxkit.headers import unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.bad_inputs import ORDER, SCHEMAS, Handed, avro_delivery, avro_order, changed, delivery, packed, with_headers
from tests.conftest import PROFILE
from tests.consumer_fixture import ConsumerFixture, Effect, Until, consumer, handles, impatient, order

GOOD = (1_000, 1_001)
PLACED = EventType(name="order.placed", schema=ORDER, codec="avro")
FULL = PROFILE == "full"
LARGE = 100_000_000 if FULL else 4_000_000
TEXT = 190 if FULL else 50


async def ends(world: ConsumerFixture, billing: Consumer, *bad: Delivery) -> list[DeadLetter]:
    """Runs until everything is settled; returns the letters, in the order of their inputs."""
    first, last = (_good(billing, number) for number in GOOD)
    stop, given = asyncio.Event(), [first, *bad, last]
    ran = Until(Handed(given), stop, lambda: world.count(tables.inbox_waiting) == 0)
    await billing.run(ran, stop)

    effects = world.effects()
    assert sorted(number for number in effects if number in GOOD) == list(GOOD)
    assert len(ran.acknowledged) == len(given), "every one is acknowledged"
    found = letters(world)
    assert len(effects) + len(found) == len(given), "each is handled or a letter, and that once"
    assert all(letter.error for letter in found)
    places = {one.origin: place for place, one in enumerate(bad)}
    return sorted(found, key=lambda letter: places[letter.origin])


def letters(world: ConsumerFixture) -> list[DeadLetter]:
    with world.engine.connect() as connection:
        return find(connection, Filter(), limit=None)


def _good(billing: Consumer, number: int) -> Delivery:
    if billing.name != "avro":
        return delivery(order(number, key=f"good {number}"))
    return avro_delivery(1, avro_order(number), key=f"good {number}".encode())


def of_json(world: ConsumerFixture, **options: Any) -> Consumer:
    billing = consumer(world, **options)
    handles(billing)
    return billing


def of_avro(world: ConsumerFixture) -> Consumer:
    """Reads orders that somebody else wrote, under any of the schemas of a registry."""

    def resolve(name: str) -> str:
        if name not in SCHEMAS:
            raise SchemaNotFound(name, final=True)
        return SCHEMAS[name]

    billing = Consumer("avro", sessions=world.asynchronous, retry=impatient(), resolve=resolve)

    @billing.on(PLACED, topic="orders")
    async def bill(placed: dict[str, Any], session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed["number"]))

    return billing


def numbered(*bad: Delivery) -> list[Delivery]:
    """The same, each with an origin of its own."""
    return [replace(one, origin=f"bad {number}") for number, one in enumerate(bad)]


def are_poison(found: Sequence[DeadLetter], bad: Sequence[Delivery], *words: str, stage: Stage = Stage.DECODE) -> None:
    """Each is a letter of that stage, with its bytes and with words that say why."""
    assert [(letter.failure, letter.stage) for letter in found] == [(Failure.POISON, stage)] * len(bad)
    assert [letter.payload for letter in found] == [one.payload for one in bad]
    for letter in found:
        assert any(word in letter.error for word in words), letter.error


@pytest.mark.parametrize("levels", [10_000, 100_000])
async def test_p1_a_recursion_bomb_is_a_letter(world: ConsumerFixture, levels: int) -> None:
    bad = avro_delivery(2, avro_order() + b"\x02" * levels + b"\0")

    are_poison(await ends(world, of_avro(world), bad), [bad], "nested deeper than 100 levels (at tail.next")


@pytest.mark.parametrize("count", [50_000_000, 2**60])
async def test_p2_a_bomb_of_values_without_width_is_a_letter(world: ConsumerFixture, count: int) -> None:
    bad = avro_delivery(3, avro_order() + _long(count) + b"\0")

    are_poison(await ends(world, of_avro(world), bad), [bad], "too many values that take no bytes")


async def test_p3_a_declared_length_that_does_not_follow_is_a_letter(world: ConsumerFixture) -> None:
    bad = numbered(*(avro_delivery(4, avro_order() + _long(size) + b"abc") for size in (4, 2**31, 2**40, 2**62, -1)))

    are_poison(
        await ends(world, of_avro(world), *bad),
        bad,
        "cut short inside a value of type string (at note, byte 1)",
        "a length of -1",
    )


async def test_p4_a_packed_bomb_is_a_letter(world: ConsumerFixture) -> None:
    zeros = bytes(50_000_000)
    bad = numbered(*(packed(name, zeros) for name in ("gzip", "deflate")))
    odd = [with_headers(("content-encoding", name), payload=b"\x28\xb5\x2f\xfd") for name in (b"zstd", b"snappy")]

    found = await ends(world, of_json(world), *(bad := numbered(*bad, *odd)))

    are_poison(found, bad, "unpacks to more than", "only gzip", stage=Stage.READ)


async def test_p5_deep_json_is_a_letter(world: ConsumerFixture) -> None:
    nested = b"[" * 100_000 + b"]" * 100_000
    texts = (
        nested,
        b'{"number": 1, "more": ' + nested + b"}",
        b'{"a":' * 100_000,
        b'{"number": ' + b"9" * 9_999 + b"}",
    )
    bad = numbered(*(changed(payload=text) for text in texts))

    are_poison(await ends(world, of_json(world), *bad), bad, "nested deeper than", "not JSON", "too many digits")


@pytest.mark.parametrize("schema", [9, 10, 11, 12])
async def test_p6_a_hostile_schema_of_the_writer_is_a_letter(world: ConsumerFixture, schema: int) -> None:
    bad = avro_delivery(schema, avro_order())

    found = await ends(world, of_avro(world), bad)

    assert [(letter.failure, letter.stage, letter.payload) for letter in found] == [("poison", "decode", bad.payload)]


async def test_p7_what_is_cut_short_anywhere_is_a_letter(world: ConsumerFixture) -> None:
    whole = avro_order(1) + _long(TEXT) + b"x" * TEXT
    bad = numbered(*(avro_delivery(4, whole[:end]) for end in range(len(whole))))

    are_poison(await ends(world, of_avro(world), *bad), bad, "cut short", "frame", "no bytes")


async def test_p8_a_flipped_bit_is_read_or_a_letter(world: ConsumerFixture) -> None:
    whole = bytes.fromhex("0000000004") + avro_order(70_000) + _long(TEXT) + b"x" * TEXT
    bits = range(len(whole) * 8) if FULL else range(0, len(whole) * 8, 8)
    bad = [_flipped(whole, bit) for bit in bits]

    found = await ends(world, of_avro(world), *bad)

    assert {(letter.failure, letter.stage) for letter in found} <= {("poison", "decode")}
    assert found


async def test_p9_garbage_behind_a_message_is_a_letter(world: ConsumerFixture) -> None:
    bad = numbered(changed(payload=b'{"number": 1} x'), changed(payload=b'{"number": 1}\0'))
    framed = avro_delivery(1, avro_order() + b"\0")

    are_poison(await ends(world, of_json(world), *bad), bad, "not JSON")
    assert [letter.error_class for letter in await ends_again(world, framed)] == ["DecodeError"]


async def ends_again(world: ConsumerFixture, *bad: Delivery) -> list[DeadLetter]:
    """A second run of another consumer over the same tables: its own letters."""
    with world.engine.begin() as connection:
        connection.execute(tables.dead_letters.delete())
        connection.execute(delete(Effect))
    return await ends(world, of_avro(world), *bad)


async def test_p10_a_frame_of_nobody_is_a_letter(world: ConsumerFixture) -> None:
    bodies = (b"\x07\0\0\0\1", b"\0\0", b"\1" + b"\0" * 15, b"\xc3\x01abc", b"\xc3\x01" + b"\0" * 8)
    bad = [avro_delivery(schema, avro_order()) for schema in (0, -1, 2**31, 8)]
    bad += [changed(payload=body, headers=_without_content_type()) for body in bodies]

    found = await ends(world, of_avro(world), *(bad := numbered(*bad)))

    assert {letter.stage for letter in found} == {Stage.DECODE}
    assert len(found) == len(bad)


@pytest.mark.parametrize("body", [b"\x01", b"\x04", b"\xff" * 5 + b"\x01"])
async def test_p11_an_index_out_of_range_is_a_letter(world: ConsumerFixture, body: bytes) -> None:
    bad = numbered(avro_delivery(5, avro_order() + body), avro_delivery(6, avro_order() + body))

    are_poison(await ends(world, of_avro(world), *bad), bad, "a union index of", "enum index out of range")


async def test_p12_a_number_that_does_not_end_is_a_letter(world: ConsumerFixture) -> None:
    bodies = (b"\xff" * 200, b"\xff" * 10 + b"\x01", b"\xff" * 9 + b"\x02", b"\xff" * (1 << 20) + b"\x01")
    bad = numbered(*(avro_delivery(7, avro_order() + body) for body in bodies))

    are_poison(await ends(world, of_avro(world), *bad), bad, "longer than 10 bytes", "more than 64 bits")


@event("order.priced", version=1)
@dataclass(frozen=True)
class OrderPriced:
    number: int
    on: date = date(2026, 1, 1)
    total: Decimal = Decimal(0)
    ratio: float = 0.0
    by: UUID | None = None


VALUES = (
    '"on": "2026-02-30"', '"on": "99999-01-01"', '"on": -1', '"total": "NaN"', '"total": "Infinity"',
    '"total": 1e400000', '"total": "1e99999999999"', '"total": "1_0"', '"ratio": NaN', '"ratio": 1e999',
    '"ratio": -Infinity', '"by": "zzz"', '"by": 5', '"number": 1.5', '"number": "1"', '"number": true',
)  # fmt: skip


async def test_p13_a_value_out_of_range_is_a_letter(world: ConsumerFixture) -> None:
    billing = of_json(world)

    @billing.on(OrderPriced, topic="orders")
    async def bill(priced: OrderPriced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=priced.number))

    priced = [f'{{"number": 1, {value}}}'.encode() for value in VALUES[:-3]]
    priced += [f"{{{value}}}".encode() for value in VALUES[-3:]]
    bad = numbered(*(delivery(order(1, key="bad", type="order.priced", payload=payload)) for payload in priced))

    are_poison(await ends(world, billing, *bad), bad, "on", "total", "ratio", "by", "number", "NaN", "Infinity")


ODD = (b"\xff\xfe", b"a\0b", b"\xed\xa0\x80", "\u202e".encode(), b"", b"\x1b]0;t\x07")


async def test_p14_bytes_that_are_no_text_are_a_letter_in_what_is_text_and_kept_elsewhere(
    world: ConsumerFixture,
) -> None:
    bodies = numbered(*(changed(payload=b'{"number": ' + odd) for odd in ODD))
    names = [with_headers((name, b"x")) for name in ("a\0b", "\ud800", "\u202e", "é", "x" * 5_000)]
    fine = [changed(key=odd) for odd in ODD] + [with_headers(("x", odd)) for odd in ODD] + names

    found = await ends(world, of_json(world), *bodies, *fine)

    are_poison(found, bodies, "not UTF-8", "not JSON")


@pytest.mark.parametrize("on_dead", ["skip", "park"])
async def test_p15_any_key_is_kept_also_where_its_message_fails(world: ConsumerFixture, on_dead: Any) -> None:
    billing = consumer(world, on_dead=on_dead, retry=impatient(delayed=1))
    handles(billing, lambda number, _ctx: 1 // 0 if number == 1 else None)
    keys = (None, b"", _noise(32_000), b"\xff\xfe", b"\0")
    fine = [changed(2, key=key) for key in keys]
    bad = numbered(*(changed(key=key) for key in keys))

    if on_dead == "skip":
        found = await ends(world, billing, *fine, *bad)
    else:
        found = await parked(world, billing, bad)

    assert [(letter.failure, letter.key) for letter in found] == [("handler", key) for key in keys]


async def parked(world: ConsumerFixture, billing: Consumer, bad: Sequence[Delivery]) -> list[DeadLetter]:
    """Runs where dead heads keep their places; returns the letters in order."""
    stop = asyncio.Event()
    ran = Until(Handed(bad), stop, lambda: len(letters(world)) == len(bad))
    await billing.run(ran, stop)
    assert len(ran.acknowledged) == len(bad)
    return sorted(letters(world), key=lambda letter: letter.origin)


async def test_p16_many_large_doubled_and_forged_headers_are_kept_and_command_nothing(world: ConsumerFixture) -> None:
    given: tuple[tuple[tuple[str, bytes], ...], ...] = (
        tuple((f"h{number}", b"x") for number in range(10_000)),
        (("h", b"x" * 1_000_000),),
        (("h", b"1"), ("h", b"2"), ("H", b"3")),
        (("outboxkit-replay-for", b"somebody"), ("outboxkit-letter", b"no number"), ("outboxkit-attempt", b"\xff")),
        (("traceparent", b"00-" + b"z" * 1_000), ("tracestate", b"\xff"), ("baggage", b"\0")),
        (("ce_sequence", b"9" * 5_000), ("ce_partitionkey", b"\xff")),
    )
    billing = consumer(world, retry=impatient(delayed=1))
    handles(billing, lambda number, _ctx: 1 // 0 if number == 1 else None)
    bad = numbered(*(with_headers(*headers) for headers in given))

    found = await ends(world, billing, *(with_headers(*headers, number=2) for headers in given), *bad)

    assert [letter.failure for letter in found] == ["handler"] * len(bad)
    assert [tuple(unpack_headers(letter.headers)) for letter in found] == [one.headers for one in bad]


async def test_p17_no_body_and_an_empty_one_are_letters_of_a_typed_handler_and_not_of_a_raw_one(
    world: ConsumerFixture,
) -> None:
    bad = numbered(changed(payload=None), changed(payload=b""))
    billing = of_json(world)

    @billing.on("raw.*", topic="orders")
    async def keep(message: Message, session: AsyncSession) -> None:
        session.add(Effect(message_id=message.id, number=2))

    raw = [with_headers(("ce_type", b"raw.x"), payload=b""), replace(with_headers(("ce_type", b"raw.x")), payload=None)]

    are_poison(await ends(world, billing, *raw, *bad), bad, "not JSON")


async def test_p18_a_very_large_body_is_handled_or_a_letter(world: ConsumerFixture) -> None:
    fine = changed(payload=b'{"number": 2}' + b" " * LARGE)
    bad = changed(payload=b'{"number": 1}' + b"x" * LARGE)

    are_poison(await ends(world, of_json(world), fine, bad), [bad], "not JSON")


async def test_p19_an_id_that_cannot_be_kept_is_a_letter(world: ConsumerFixture) -> None:
    fine = [with_headers(("ce_id", one), number=2) for one in (b"\x1b[2J", b"\r\nid", b" ", "\u202e".encode())]
    bad = numbered(*(with_headers(("ce_id", one)) for one in (b"", b"x" * 10_000, b"a\0b", b"\xff")))

    found = await ends(world, of_json(world), *fine, *bad)

    are_poison(found, bad, "no id", "at most 1,024", "NUL", "not UTF-8", stage=Stage.READ)


async def test_p20_a_content_type_that_lies_is_a_letter(world: ConsumerFixture) -> None:
    as_json = avro_delivery(1, avro_order(), headers=changed().headers)
    as_avro = with_headers(("content-type", b"avro/binary"))
    as_envelope = with_headers(("content-type", b"application/cloudevents+json"))

    found = await ends(world, of_avro(world), *(bad := numbered(as_json, as_avro, as_envelope)))

    assert [letter.stage for letter in found] == [Stage.DECODE] * 3
    assert [letter.payload for letter in found] == [one.payload for one in bad]


HOSTILE = (b"\x1b]0;title\x07\x1b[2J", b"<script>alert(1)</script>", b"=1+1\t@SUM", b'one\r\n{"level":"error"}')


async def test_p21_text_that_commands_a_terminal_a_page_or_a_log_is_kept_as_it_is(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("ce_source", "ce_correlationid", "ce_dataschema", "x")
    bad = numbered(*(with_headers((name, text), payload=text) for name in names for text in HOSTILE))

    found = await ends(world, of_json(world), *bad)

    are_poison(found, bad, "not JSON")
    assert [tuple(unpack_headers(letter.headers)) for letter in found] == [one.headers for one in bad]
    assert not [record for record in caplog.records if any(mark in record.getMessage() for mark in "\x1b<=\n")]


def _without_content_type() -> tuple[tuple[str, bytes], ...]:
    return tuple(header for header in changed().headers if header[0] != "content-type")


def _flipped(whole: bytes, bit: int) -> Delivery:
    payload = bytearray(whole)
    payload[bit // 8] ^= 1 << bit % 8
    return delivery(order(1, key="bad", payload=bytes(payload), content_type=""), origin=f"bad {bit}")


def _long(value: int) -> bytes:
    return write_long(value)


def _noise(size: int) -> bytes:
    return random.Random(4711).randbytes(size)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
