"""`harness.assert_one_effect`: what holds after a crash anywhere, and what is found in handlers that break it."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from outboxkit import Consumer, RetryPolicy, _failpoints, full_jitter
from outboxkit.testing.crashes import CRASH_POINTS
from outboxkit.testing.delivery import ConsumerHarness
from tests.unit.testing.shop import Invoice, OrderPlaced, billing, books, nowhere


@pytest.mark.parametrize("consumer", [billing, books], ids=lambda consumer: consumer.name)
async def test_a_handler_in_its_transaction_has_one_effect(
    harness: ConsumerHarness, outbox_session: Session, consumer: Consumer
) -> None:
    def invoices() -> int:
        with Session(outbox_session.get_bind()) as session:
            return session.scalar(select(func.count()).select_from(Invoice)) or 0

    await harness.assert_one_effect(OrderPlaced(1, 5), consumer=consumer, effects=invoices)

    assert invoices() == 2 + len(CRASH_POINTS)
    assert not _failpoints._armed


async def test_a_call_outside_the_transaction_is_found_with_its_places(harness: ConsumerHarness) -> None:
    calls: list[int] = []
    careless = Consumer("careless", sessions=nowhere)

    @careless.on(OrderPlaced, topic="orders")
    def pay(placed: OrderPlaced) -> None:
        calls.append(placed.order_id)

    with pytest.raises(AssertionError) as caught:
        await harness.assert_one_effect(OrderPlaced(1, 5), consumer=careless, effects=lambda: len(calls))

    assert str(caught.value).splitlines() == [
        "careless: one delivery makes 1 effect(s) and 0 message(s)",
        "  after a crash at handler.after 2 effect(s) and 0 message(s)",
        "  after a crash at commit.before 2 effect(s) and 0 message(s)",
    ]


async def test_a_message_that_never_reaches_the_handler_proves_nothing(harness: ConsumerHarness) -> None:
    once = RetryPolicy(delayed=full_jitter("1ms", cap="1ms", attempts=1))
    broken = Consumer("broken", sessions=nowhere, retry=once)

    @broken.on(OrderPlaced, topic="orders")
    def fail(_placed: OrderPlaced) -> None:
        raise ValueError("always")

    with pytest.raises(AssertionError, match=r"never came to handler\.after"):
        await harness.assert_one_effect(OrderPlaced(1, 5), consumer=broken, effects=lambda: 0)
