"""The order of each key, watched by the consumer when it is asked to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit.consumer import Consumer
from outboxkit.consumer.observe.order_check import OrderCheck
from outboxkit.headers import REPLAY_FOR
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order, row_of


def at(sequence: int | None, **changes: Any) -> Message:
    return replace(order(1), sequence=sequence, **changes)


def test_a_message_after_a_later_one_of_its_key_is_told() -> None:
    check = OrderCheck()

    assert [check.handled(at(number)) for number in (1, 2, 5, 3, 4, 6)] == [None, None, None, 5, 5, None]


@pytest.mark.parametrize("other", [{"key": b"other"}, {"topic": "bills"}, {"source": "/else"}, {"key": None}])
def test_other_keys_have_an_order_of_their_own(other: dict[str, Any]) -> None:
    check = OrderCheck()
    check.handled(at(5))

    assert check.handled(at(3, **other)) is None


def test_nothing_is_said_of_replays_and_of_foreign_messages() -> None:
    check = OrderCheck()
    check.handled(at(5))

    assert check.handled(at(3, headers=((REPLAY_FOR, b"billing"),))) is None
    assert check.handled(at(None)) is None
    assert check.handled(at(3)) == 5


@given(st.lists(st.integers(0, 30), max_size=60))
def test_it_tells_exactly_what_comes_after_a_higher_one(numbers: list[int]) -> None:
    check = OrderCheck()
    told = [check.handled(at(number)) is not None for number in numbers]

    assert told == [any(before > number for before in numbers[:index]) for index, number in enumerate(numbers)]


def test_it_remembers_the_keys_that_were_handled_last() -> None:
    check = OrderCheck(max_keys=2)
    for key in (b"a", b"b", b"a", b"c"):
        check.handled(at(5, key=key))

    assert check.handled(at(3, key=b"a")) == 5
    assert check.handled(at(3, key=b"b")) is None, "forgotten"


@pytest.mark.parametrize("check_order", [True, False])
async def test_a_consumer_tells_when_it_is_asked_to(
    world: ConsumerFixture, caplog: pytest.LogCaptureFixture, *, check_order: bool
) -> None:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(), check_order=check_order)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id=str(placed.number), number=placed.number))

    first, late = order(2), order(1)
    for message, position in ((first, 7), (late, 6), (first, 7)):
        world.exchange.append("orders", row_of(message, position))
    await world.run(billing)

    assert world.effects() == [2, 1], "it is watched, not changed"
    assert billing.counts["duplicate"] == 1
    assert billing.counts["out of order"] == (1 if check_order else 0)
    assert ("message.out_of_order" in caplog.text) is check_order
