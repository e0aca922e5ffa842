"""What becomes of a message that cannot be handled, and of those behind it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import publish, tables
from outboxkit.consumer.handlers import MessageContext
from outboxkit.dead_letters import DeadLetter, Stage, replay
from outboxkit.headers import REPLAY_FOR, pack_headers, unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.consumer_fixture import (
    ConsumerFixture,
    Effect,
    OrderPlaced,
    consumer,
    handles,
    impatient,
    letters,
    order,
    raises_at,
    row_of,
)


async def test_a_failed_try_is_rolled_back_and_tried_again_at_once(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(immediate=1))
    calls = handles(billing, raises_at((1, 1)))

    world.send(order(1))
    await world.run(billing)

    assert calls == [(1, 1), (1, 2)]
    assert world.effects() == [1]
    assert billing.counts["retried"] == 0


async def test_a_key_keeps_its_order_while_its_head_waits_and_other_keys_go_on(world: ConsumerFixture) -> None:
    billing = consumer(world, concurrency=1)
    handles(billing, raises_at((1, 1), (1, 2)))

    world.send(order(1), order(2), order(7, key="other"), order(3))
    await world.run(billing)

    assert world.effects() == [7, 1, 2, 3]
    assert world.count(tables.dead_letters) == 0


async def test_a_fresh_delivery_waits_behind_a_key_that_waits(world: ConsumerFixture) -> None:
    billing = consumer(world)

    def fail(number: int, ctx: MessageContext) -> None:
        if (number, ctx.attempt) == (1, 1):
            world.send(order(2))
            ctx.retry_after("300ms")

    handles(billing, fail)
    world.send(order(1))
    await world.run(billing, until=lambda: world.effects() == [1, 2])

    assert billing.counts["followed"] == 1


async def test_followers_go_on_after_a_dead_head(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))
    handles(billing, raises_at((1, 1), (1, 2)))

    world.send(order(1), order(2))
    await world.run(billing)

    (letter,) = letters(world)
    assert world.effects() == [2]
    assert (letter.failure, letter.stage, letter.attempts) == (Failure.HANDLER, Stage.HANDLER, 2)


async def test_a_letter_tells_class_and_place_but_no_data(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))
    handles(billing, raises_at((1, 1), (1, 2)))

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert letter.error_class == "KeyError"
    assert letter.error.startswith("KeyError at consumer_fixture.py:")
    assert "secret-4711" not in repr(letter)


@pytest.mark.parametrize("also", [(), KeyError, (KeyError,)], ids=["by default", "one class more", "several"])
async def test_poison_dies_at_once_and_is_kept_byte_for_byte(world: ConsumerFixture, also: Any) -> None:
    billing = consumer(world, retry=impatient(immediate=3, poison=also))
    calls = handles(billing)
    broken = order(1, payload=b'{"number": \xff\x00', headers=(("x", b"1"), ("x", b"\x00\xfe")))

    world.send(broken, order(2))
    await world.run(billing)

    (letter,) = letters(world)
    (delivered, _) = world.exchange.messages("orders")
    assert letter.payload == broken.payload
    assert tuple(unpack_headers(letter.headers)) == delivered.headers
    assert (letter.key, letter.message_id, letter.origin) == (b"k", broken.id, "orders[0]@0")
    assert (letter.failure, letter.stage, letter.attempts, letter.error_class) == (
        Failure.POISON,
        Stage.DECODE,
        1,
        "DecodeError",
    )
    assert calls == [(2, 1)]


async def test_the_same_id_with_other_content_is_a_conflict(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1, message_id="a"), order(2, message_id="a"))
    await world.run(billing)

    (letter,) = letters(world)
    assert world.effects() == [1]
    assert (letter.failure, letter.payload) == (Failure.CONFLICT, b'{"number": 2}')


async def test_a_dead_message_that_comes_again_has_no_effect_and_no_second_letter(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))
    calls = handles(billing, raises_at((1, 1), (1, 2)))
    message = order(1)

    world.send(message)
    await world.run(billing)
    world.send(message)
    await world.run(billing)

    assert calls == [(1, 1), (1, 2)]
    assert len(letters(world)) == 1
    assert world.effects() == []


async def test_a_handler_that_rolls_back_has_failed(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        await session.rollback()

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert (letter.failure, letter.stage) == (Failure.HANDLER, Stage.COMMIT)


async def test_a_handler_that_commits_is_refused_before_it_does(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id="x", number=placed.number))
        await session.commit()

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert "must not commit" in letter.error
    assert world.effects() == []


async def test_a_savepoint_inside_a_handler_is_fine(world: ConsumerFixture) -> None:
    billing = consumer(world)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        async with session.begin_nested():
            session.add(Effect(message_id="x", number=placed.number))

    world.send(order(1))
    await world.run(billing)

    assert world.effects() == [1]


async def test_a_handler_that_hangs_runs_out_of_time(world: ConsumerFixture) -> None:
    billing = consumer(world, timeout="20ms", retry=impatient(delayed=1))
    handles(billing, lambda number, _ctx: asyncio.Event().wait() if number == 1 else None)

    world.send(order(1), order(2, key="other"))
    await world.run(billing)

    (letter,) = letters(world)
    assert letter.failure is Failure.TIMEOUT
    assert world.effects() == [2]


async def test_a_handler_may_give_a_message_up(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing, lambda _number, ctx: ctx.dead_letter("no such customer"))

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert (letter.failure, letter.error, letter.attempts) == (Failure.POISON, "no such customer", 1)


async def test_exceptions_that_the_policy_calls_poison_are_not_retried(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(poison=(KeyError,)))
    calls = handles(billing, raises_at((1, 1)))

    world.send(order(1))
    await world.run(billing)

    assert len(calls) == len(letters(world)) == 1


async def test_a_foreign_message_without_an_id_is_poison(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1, message_id="x", source=""))
    world.exchange.append("orders", _without_id(order(2)))
    await world.run(billing)

    (letter,) = letters(world)
    assert world.effects() == [1]
    assert (letter.type, letter.message_id, letter.stage) == ("order.placed", "", Stage.READ)
    assert "message_id=" in letter.error


async def test_a_foreign_message_may_have_its_id_elsewhere(world: ConsumerFixture) -> None:
    billing = consumer(world, message_id=lambda message: message.header("x-request") or "")
    handles(billing)
    foreign = _without_id(order(2, headers=(("x-request", b"r-1"),)))

    for _ in range(2):
        world.exchange.append("orders", foreign)
    await world.run(billing)

    assert world.effects() == [2]
    assert billing.counts["duplicate"] == 1


async def test_a_nul_in_an_id_does_not_stop_the_consumer(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1, message_id="a\0b"), order(2))
    await world.run(billing)

    assert world.effects() == [2]
    assert len(letters(world)) == 1


async def test_what_is_of_another_type_is_acknowledged_and_counted(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(2), order(3, type="order.cancelled"))
    ran = await world.run(billing)

    assert world.effects() == [2]
    assert billing.counts["ignored"] == 1
    assert len(ran.acknowledged) == 2


async def test_a_header_that_claims_a_replay_for_another_consumer_commands_nothing(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing)

    world.send(order(1, headers=((REPLAY_FOR, b"shipping"),)))
    await world.run(billing)

    assert world.effects() == [1]


async def test_the_replay_of_another_consumers_letter_is_not_for_us(world: ConsumerFixture) -> None:
    shipping, billing = consumer(world, "shipping"), consumer(world)
    handles(shipping, lambda _number, ctx: ctx.dead_letter("no such customer"))
    calls = handles(billing)

    world.send(order(1))
    await world.run(shipping)
    (letter,) = letters(world)
    with world.engine.begin() as connection:
        replay(connection, [letter.id], by="ana", why="the customer exists now")
    assert world.relay() == 1
    await world.run(billing)

    assert calls == [(1, 1)], "the original, and not the replay"
    assert (billing.counts["handled"], billing.counts["ignored"]) == (1, 1)


async def test_a_hook_learns_of_a_dead_message_after_it_is_stored(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))
    handles(billing, raises_at((1, 1), (1, 2)))
    heard: list[tuple[str, int]] = []

    @billing.on_dead_letter(OrderPlaced)
    async def failed(letter: DeadLetter) -> None:
        heard.append((letter.message_id, world.count(tables.dead_letters)))
        raise RuntimeError

    message = order(1)
    world.send(message)
    await world.run(billing)

    assert heard == [(message.id, 1)]


async def test_what_a_handler_publishes_commits_with_its_inbox_row(world: ConsumerFixture) -> None:
    billing = consumer(world)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        publish(session, OrderPlaced(placed.number * 10), topic="invoices", key="k")
        if ctx.attempt == 1:
            await session.flush()
            raise KeyError

    message = order(1)
    world.send(message)
    await world.run(billing)

    (row,) = world.rows(tables.outbox_messages)
    headers = dict(unpack_headers(row.headers))
    assert row.payload == b'{"number":10}'
    assert (headers["ce_causationid"], headers["ce_correlationid"]) == (message.id.encode(),) * 2
    assert world.count(tables.inbox_messages) == 1


async def test_a_raw_handler_gets_the_message(world: ConsumerFixture) -> None:
    audit = consumer(world, "audit")
    seen: list[Message] = []

    @audit.on("order.*", topic="orders")
    async def keep(message: Message, session: AsyncSession) -> None:
        seen.append(message)

    sent = order(1, headers=(("tenant", b"a"),))
    world.send(sent)
    await world.run(audit)

    assert [replace(message, sequence=None, recorded_at=None) for message in seen] == [sent]


def _without_id(message: Message) -> Any:
    row = row_of(message)
    return row._replace(headers=pack_headers(tuple(h for h in unpack_headers(row.headers) if h[0] != "ce_id")))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
