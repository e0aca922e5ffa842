"""Several messages in one transaction as long as all goes well; singly when one fails."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import inbox, tables
from outboxkit.consumer import Consumer, MessageContext
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, consumer, handles, impatient, letters, order


async def commits(world: ConsumerFixture, billing: Consumer) -> int:
    """Runs a consumer; returns how many transactions wrote effects."""
    found: set[int] = set()

    def note(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO effects" in statement:
            found.add(id(connection.get_transaction()))

    engine = world.asynchronous.kw["bind"].sync_engine
    event.listen(engine, "before_cursor_execute", note)
    await world.run(billing)
    event.remove(engine, "before_cursor_execute", note)
    return len(found)


async def test_a_batch_is_one_transaction_and_one_effect_each(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)
    handles(billing)

    world.send(*(order(n, key=f"k{n % 3}") for n in range(30)))

    assert await commits(world, billing) <= 2
    assert sorted(world.effects()) == list(range(30))
    assert all([n for n in world.effects() if n % 3 == k] == list(range(k, 30, 3)) for k in range(3))
    assert billing.counts["handled"] == world.count(tables.inbox_messages) == 30


async def test_copies_in_one_batch_and_of_earlier_ones_have_one_effect(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)
    handles(billing)
    first = [order(n, message_id=f"m{n}") for n in range(5)]

    world.send(*first[:3])
    await world.run(billing)
    world.send(*first, *first)
    await world.run(billing)

    assert world.effects() == [0, 1, 2, 3, 4]
    assert (billing.counts["handled"], billing.counts["duplicate"]) == (5, 8)


@pytest.mark.parametrize("bad", [0, 4, 9])
async def test_one_that_fails_is_found_and_the_others_are_handled_once_in_order(
    world: ConsumerFixture, bad: int
) -> None:
    billing = consumer(world, batch=100, retry=impatient(delayed=1))

    def fail(number: int, _ctx: Any) -> None:
        if number == bad:
            raise KeyError

    handles(billing, fail)
    world.send(*(order(n) for n in range(10)))
    await world.run(billing)

    (letter,) = letters(world)
    assert (letter.failure, letter.attempts) == (Failure.HANDLER, 2)
    assert world.effects() == [n for n in range(10) if n != bad]


async def test_a_conflict_inside_a_batch_is_a_letter(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)
    handles(billing)

    world.send(order(1, message_id="a"), order(2, message_id="a"), order(3))
    await world.run(billing)

    (letter,) = letters(world)
    assert letter.failure is Failure.CONFLICT
    assert world.effects() == [1, 3]


async def test_poison_between_good_ones_is_a_letter(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)
    handles(billing)

    world.send(order(1), order(2, payload=b"{"), order(3))
    await world.run(billing)

    assert world.effects() == [1, 3]
    assert len(letters(world)) == 1


async def test_an_unfinished_claim_is_handled_again_from_a_batch(world: ConsumerFixture) -> None:
    message = order(1)
    with world.plain() as session:
        inbox.admit(session, "billing", message)
        session.connection().commit()
    billing = consumer(world, batch=100)
    handles(billing)

    world.send(message, order(2))
    await world.run(billing)

    assert world.effects() == [1, 2]
    assert billing.counts["duplicate"] == 0


async def test_a_handler_may_take_a_list(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)
    calls: list[list[int]] = []

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: list[OrderPlaced], session: AsyncSession) -> None:
        calls.append([one.number for one in placed])
        session.add_all(Effect(message_id=str(one.number), number=one.number) for one in placed)

    copies = [order(n, message_id=f"m{n}") for n in range(20)]
    world.send(*copies, *copies)
    await world.run(billing)

    assert calls == [list(range(20))], "first deliveries only, in order"
    assert world.effects() == list(range(20))
    assert billing.counts["duplicate"] == 20


async def test_a_list_that_fails_is_handled_one_by_one(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.plain, batch=100, retry=impatient(delayed=1), concurrency=1)
    calls: list[list[int]] = []

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: list[OrderPlaced], session: Session) -> None:
        calls.append([one.number for one in placed])
        session.add_all(Effect(message_id=str(one.number), number=one.number) for one in placed)
        session.flush()
        if 2 in calls[-1]:
            raise KeyError

    world.send(*(order(n) for n in range(4)))
    await world.run(billing)

    assert world.effects() == [0, 1, 3]
    assert calls == [[0, 1, 2, 3], [0], [1], [2], [2], [3]]


async def test_outcomes_of_a_batch_are_kept(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> bytes | None:
        return b"even" if placed.number % 2 == 0 else None

    world.send(*(order(n, message_id=f"m{n}") for n in range(4)))
    await world.run(billing)

    kept = {row.message_id: row.outcome for row in world.rows(tables.inbox_messages)}
    assert kept == {"m0": b"even", "m1": None, "m2": b"even", "m3": None}


async def test_a_handler_that_rolls_a_batch_back_does_not_lose_it(world: ConsumerFixture) -> None:
    billing = consumer(world, batch=100, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id="x", number=placed.number))
        await session.flush()
        if placed.number == 2:
            await session.rollback()

    world.send(*(order(n) for n in range(4)))
    await world.run(billing)

    assert world.effects() == [0, 1, 3]
    assert len(letters(world)) == 1


def test_a_context_beside_a_list_is_refused(world: ConsumerFixture) -> None:
    billing = consumer(world)

    with pytest.raises(ConfigurationError, match="list of messages"):

        @billing.on(OrderPlaced, topic="orders")
        async def bill(placed: list[OrderPlaced], ctx: MessageContext) -> None:
            return None


def test_a_raw_handler_may_take_a_list(world: ConsumerFixture) -> None:
    audit = consumer(world, "audit", batch=10)

    @audit.on("order.*", topic="orders")
    async def keep(messages: list[Message], session: AsyncSession) -> None:
        return None

    assert audit.config.handlers.find("orders", "order.placed").takes_list  # type: ignore[union-attr]


def test_batches_of_two_transactions_are_claimed_in_one_order(world: ConsumerFixture) -> None:
    """Else two of them could wait for each other (E106)."""
    statements: list[Any] = []
    event.listen(world.engine, "before_cursor_execute", lambda *given: statements.append(given[3]))

    with world.plain.begin() as session:
        messages = [order(n, message_id=f"m{n}") for n in (3, 1, 2)]
        assert inbox.admit_batch(session, "billing", messages) == [True, True, True]
        inbox.finish_batch(session, "billing", [(message, None) for message in messages])

    given = statements[0]
    values = given.values() if isinstance(given, dict) else given
    single = [
        one for value in values for one in (value if isinstance(value, list) else [value])
    ]  # arrays, where there are some
    assert [value for value in single if value in ("m1", "m2", "m3")] == ["m1", "m2", "m3"]


def test_finishing_a_batch_that_is_not_ours_is_an_error(world: ConsumerFixture) -> None:
    message = order(1)
    with world.plain.begin() as session, pytest.raises(OutboxKitError, match="gone before the commit"):
        inbox.finish_batch(session, "billing", [(message, None)])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
