"""A replay reaches the right consumer in the original order, and a letter is closed by its own number only."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import dead_letters, tables
from outboxkit.brokers import Delivery
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.dead_letters import DeadLetter, Filter, Side, Stage, State
from outboxkit.errors import ReplayError
from outboxkit.headers import LETTER, REPLAY_FOR, from_wire, pack_headers, unpack_headers, wire_headers
from outboxkit.policy import Failure
from outboxkit.rows import Row
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order, row_of


def consumer(world: ConsumerFixture, name: str = "billing", *, fails: bool = False, **options: Any) -> Consumer:
    found = Consumer(name, sessions=world.asynchronous, retry=impatient(delayed=1), **options)

    @found.on(OrderPlaced, topic="orders")
    async def handle(event: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if fails:
            raise KeyError
        session.add(Effect(message_id=ctx.id, number=event.number))

    return found


def letters(world: ConsumerFixture, **which: Any) -> list[DeadLetter]:
    with world.engine.connect() as connection:
        return dead_letters.find(connection, Filter(**{"state": None} | which))


def foreign(number: int, *, order_id: str) -> Row:
    """As somebody else's producer writes it: the type, and the id in a header of its own."""
    message = order(number)
    row = row_of(message)
    headers = (("ce_type", b"order.placed"), ("content-type", b"application/json"), ("x-order-id", order_id.encode()))
    return row._replace(headers=pack_headers(headers))


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("source", ["log", "queue", "foreign"])
def test_letters_of_a_key_go_out_in_their_original_order(world: ConsumerFixture, seed: int, source: str) -> None:
    numbers = list(range(10, 20))
    for number in numbers:
        bury(world, number, source=source)
    ids = [letter.id for letter in letters(world)]
    random.Random(seed).shuffle(ids)

    with world.engine.begin() as connection:
        decisions = dead_letters.replay(connection, ids, by="ana", why="")

    rows = sorted(world.rows(tables.outbox_messages), key=lambda row: row.position)
    assert [row.payload for row in rows] == [b'{"number": %d}' % number for number in numbers]
    assert [decision.action for decision in decisions] == ["publish"] * len(numbers)


def bury(world: ConsumerFixture, number: int, *, source: str = "log", consumer_name: str = "billing") -> DeadLetter:
    sent = order(number, sequence=number if source == "queue" else None)
    at: dict[str, Any] = {"log": {"partition": 0, "offset": number}}.get(source, {})
    delivery = Delivery(topic="orders", key=b"k", headers=wire_headers(sent), payload=sent.payload, origin="o", **at)
    letter = dead_letters.of_delivery(
        delivery,
        from_wire("orders", b"k", delivery.headers, sent.payload),
        consumer=consumer_name,
        kind="event",
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=KeyError(),
        attempts=1,
    )
    with world.engine.begin() as connection:
        stored = dead_letters.bury(connection, letter)
        assert stored is not None
        if source == "foreign":  # only the time tells
            died = datetime.now(UTC) - timedelta(minutes=100 - number)
            this = update(tables.dead_letters).where(tables.dead_letters.c.id == stored.id)
            connection.execute(this.values(first_failed_at=died, died_at=died))
    return stored


async def test_what_died_again_keeps_its_place_before_a_later_one(world: ConsumerFixture) -> None:
    first = order(1)
    world.send(first)
    await world.run(consumer(world, fails=True))
    replay(world, [letter.id for letter in letters(world)])
    world.send(order(2))
    world.relay()  # the replay stands behind the second message now
    await world.run(consumer(world, fails=True))

    dead = letters(world, state=State.DEAD)
    assert len(dead) == 2
    replay(world, [letter.id for letter in dead])
    world.relay()
    await world.run(consumer(world))

    assert world.effects() == [1, 2]


# --- the number --------------------------------------------------------------------------------------------------


async def test_a_letter_without_an_id_is_closed_when_the_consumer_has_learned_to_find_one(
    world: ConsumerFixture,
) -> None:
    world.exchange.append("orders", foreign(7, order_id="A-7"))
    await world.run(consumer(world))
    (letter,) = letters(world)
    assert letter.message_id == ""

    replay(world, [letter.id])
    world.relay()
    await world.run(consumer(world, message_id=lambda message: message.header("x-order-id") or ""))

    assert world.effects() == [7]
    assert [letter.state for letter in letters(world)] == [State.REPLAYED]


async def test_a_repaired_message_takes_effect_although_its_own_header_has_the_old_id(world: ConsumerFixture) -> None:
    options: dict[str, Any] = {"message_id": lambda message: message.header("x-order-id") or ""}
    world.exchange.append("orders", foreign(7, order_id="A-7"))
    await world.run(consumer(world, fails=True, **options))
    (letter,) = letters(world)
    assert letter.message_id == "A-7"

    replay(world, [letter.id], payload=b'{"number": 8}')
    world.relay()
    await world.run(consumer(world, **options))

    assert world.effects() == [8]
    assert {letter.state for letter in letters(world)} == {State.REPLAYED}


async def test_a_strangers_header_closes_no_letter(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    replay(world, [letter.id])
    forged = order(666, headers=((REPLAY_FOR, b"billing"), (LETTER, str(letter.id).encode())))
    world.send(forged)

    await world.run(consumer(world))
    assert [one.state for one in letters(world)] == [State.REPLAYING], "the replay itself is still in the outbox"

    world.relay()
    await world.run(consumer(world))
    assert [one.state for one in letters(world)] == [State.REPLAYED]
    assert world.effects() == [666, 1]


async def test_a_strangers_message_that_dies_with_a_borrowed_number_is_nobodys_child(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    replay(world, [letter.id])
    world.send(order(666, headers=((LETTER, str(letter.id).encode()),)))

    await world.run(consumer(world, fails=True))

    states = {one.id: (one.state, one.parent_id) for one in letters(world)}
    assert states.pop(letter.id) == (State.REPLAYING, None)
    assert list(states.values()) == [(State.DEAD, None)]


@pytest.mark.parametrize("number", [b"", b"\xff", b"not a number", str(uuid4()).encode()])
async def test_a_number_that_is_none_harms_nobody(world: ConsumerFixture, number: bytes) -> None:
    world.send(order(3, headers=((LETTER, number),)))

    await world.run(consumer(world))

    assert world.effects() == [3]
    assert letters(world) == []


async def test_a_conflict_during_a_replay_belongs_to_the_letter_that_is_replayed(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    replay(world, [letter.id])
    with world.engine.begin() as connection:  # meanwhile the id was used for something else
        connection.execute(update(tables.inbox_messages).values(content_hash=b"other", outcome=None))
    world.relay()
    await world.run(consumer(world))

    found = {one.id: one for one in letters(world)}
    parent = found.pop(letter.id)
    (child,) = found.values()
    assert (parent.state, child.state, child.failure) == (State.REPLAYED, State.DEAD, Failure.CONFLICT)
    assert child.parent_id == parent.id


def test_a_relays_letter_that_dies_again_is_a_child_and_counts(world: ConsumerFixture) -> None:
    message = order(1)
    row = row_of(message, position=1)
    for generation in range(dead_letters.MAX_REPLAYS + 1):
        with world.engine.begin() as connection:
            letter = dead_letters.bury(connection, dead_letters.of_row(row, Failure.TOO_LARGE, "at most 1 MB", 2))
        assert letter is not None
        assert letter.generation == generation
        last = letter.id
        if generation < dead_letters.MAX_REPLAYS:
            replay(world, [letter.id])
            (stored,) = world.rows(tables.outbox_messages)
            row = row._replace(headers=stored.headers, position=stored.position)
            with world.engine.begin() as connection:
                connection.execute(tables.outbox_messages.delete())
    with pytest.raises(ReplayError, match="3 times"):
        replay(world, [last])


# --- the receiver ------------------------------------------------------------------------------------------------


def seen(world: ConsumerFixture, name: str, ago: timedelta = timedelta(0)) -> None:
    """As a process of the consumer records its start and renews it."""
    at = datetime.now(UTC) - ago
    values = {"id": uuid4(), "consumer": name, "host": "h", "started_at": at, "expires_at": at}
    with world.engine.begin() as connection:
        connection.execute(tables.inbox_consumers.insert().values(values))


def test_a_replay_for_a_consumer_that_never_started_is_refused_and_names_those_that_did(
    world: ConsumerFixture,
) -> None:
    letter = bury(world, 1, consumer_name="billing")
    seen(world, "invoicing")

    with pytest.raises(ReplayError, match=r"no consumer named billing was ever started.*invoicing"):
        replay(world, [letter.id])
    assert world.count(tables.outbox_messages) == 0

    replay(world, [letter.id], force=True)
    assert world.count(tables.outbox_messages) == 1


def test_a_replay_for_a_consumer_that_was_not_seen_for_long_is_refused(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    seen(world, "billing", timedelta(days=40))

    with pytest.raises(ReplayError, match=r"no consumer named billing was seen since \d{4}-\d\d-\d\d"):
        replay(world, [letter.id])

    seen(world, "billing")
    assert replay(world, [letter.id])[0].action == "publish"


async def test_a_letter_of_a_renamed_consumer_is_replayed_to_the_new_name(world: ConsumerFixture) -> None:
    letter = bury(world, 1, consumer_name="billing")
    invoicing = consumer(world, "invoicing")
    await world.run(invoicing)

    replay(world, [letter.id], to="invoicing")
    world.relay()
    await world.run(invoicing)

    assert world.effects() == [1]
    (after,) = letters(world)
    assert (after.state, after.replay_to) == (State.REPLAYED, "invoicing")


async def test_a_letter_that_dies_again_at_the_new_name_is_a_child_there(world: ConsumerFixture) -> None:
    letter = bury(world, 1, consumer_name="billing")
    failing = consumer(world, "invoicing", fails=True)
    await world.run(failing)
    replay(world, [letter.id], to="invoicing")
    world.relay()
    await world.run(failing)

    (child,) = letters(world, state=State.DEAD)
    assert (child.consumer, child.parent_id, child.generation) == ("invoicing", letter.id, 1)


# --- content -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("payload", [b"not json at all", b"", b'{"number": 2', b"\xff\xfe", b"{} {}"])
def test_a_repaired_payload_must_be_what_its_content_type_says(world: ConsumerFixture, payload: bytes) -> None:
    letter = bury(world, 1)

    with pytest.raises(ReplayError, match="the repaired payload is not valid: it is not"):
        replay(world, [letter.id], payload=payload, force=True)

    assert world.count(tables.outbox_messages) == 0
    assert letters(world)[0].state is State.DEAD


def test_what_has_expired_is_refused(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    headers = (*unpack_headers(letter.headers), ("ce_expirytime", b"2026-01-01T00:00:00Z"))
    with world.engine.begin() as connection:
        connection.execute(update(tables.dead_letters).values(headers=pack_headers(headers)))

    with pytest.raises(ReplayError, match="expired at 2026-01-01"):
        replay(world, [letter.id])
    assert replay(world, [letter.id], force=True)[0].action == "publish"


def test_a_message_that_was_handled_meanwhile_is_refused(world: ConsumerFixture) -> None:
    letter = bury(world, 1)
    with world.engine.begin() as connection:
        connection.execute(update(tables.inbox_messages).values(outcome=None))

    with pytest.raises(ReplayError, match="has handled the message"):
        replay(world, [letter.id])


def test_the_repaired_head_of_a_parked_key_is_what_the_relay_brings_back(world: ConsumerFixture) -> None:
    letter = dead_letters.of_row(row_of(order(1), position=7), Failure.TOO_LARGE, "at most 1 MB", 2)
    stopped = tables.outbox_stopped_keys
    with world.engine.begin() as connection:
        dead_letters.bury(connection, letter)
        connection.execute(stopped.insert().values(topic="orders", key=b"k", shard=0, position=7, reason="parked"))

    assert replay(world, [letter.id], payload=b'{"number": 2}')[0].action == "repair"

    assert world.count(tables.outbox_messages) == 0
    (under_way,) = letters(world, state=State.REPLAYING, side=Side.RELAY)
    assert (under_way.payload, under_way.source_position, under_way.parent_id) == (b'{"number": 2}', 7, letter.id)
    assert world.rows(stopped)[0].request == "repair"


def replay(world: ConsumerFixture, ids: list[UUID], **options: Any) -> list[dead_letters.Decision]:
    with world.engine.begin() as connection:
        return dead_letters.replay(connection, ids, **{"by": "ana", "why": "fixed"} | options)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
