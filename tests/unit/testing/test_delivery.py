"""`harness`: the real inbox and handler, in the test's database, without waiting."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from outboxkit import Consumer, event
from outboxkit.errors import ConfigurationError
from outboxkit.message import Message
from outboxkit.testing.delivery import ConsumerHarness
from outboxkit.testing.emitted import EmittedMessages
from tests.unit.testing import shop
from tests.unit.testing.shop import Invoice, InvoiceCreated, Order, OrderPlaced, Paid, billing, books


def _invoices(session: Session) -> list[tuple[int, int]]:
    rows = session.execute(select(Invoice.order_id, Invoice.attempt).order_by(Invoice.id)).all()
    return [(order_id, attempt) for order_id, attempt in rows]


@pytest.mark.parametrize("consumer", [billing, books], ids=lambda consumer: consumer.name)
@pytest.mark.parametrize("key", [None, "7"])
async def test_a_message_delivered_three_times_has_one_effect(
    harness: ConsumerHarness, outbox_session: Session, consumer: Consumer, key: str | None
) -> None:
    await harness.deliver(OrderPlaced(1, 5), times=3, consumer=consumer, key=key)

    assert (harness.handled, harness.duplicates, harness.dead) == (1, 2, [])
    assert _invoices(outbox_session) == [(1, 1)]


async def test_equal_events_of_two_deliveries_are_two_messages(
    harness: ConsumerHarness, outbox_session: Session
) -> None:
    await harness.deliver(OrderPlaced(1, 5), consumer=books)
    await harness.deliver(OrderPlaced(1, 5), consumer=books)

    assert (harness.handled, harness.duplicates) == (2, 0)
    assert len(_invoices(outbox_session)) == 2


async def test_a_consumer_gets_what_is_delivered_to_it_only(harness: ConsumerHarness, outbox_session: Session) -> None:
    await harness.deliver(OrderPlaced(1, 5), consumer=billing)
    await harness.deliver(OrderPlaced(2, 5), consumer=books)

    assert _invoices(outbox_session) == [(1, 1), (2, 1)]


async def test_what_a_handler_publishes_is_in_the_outbox(harness: ConsumerHarness, outbox: EmittedMessages) -> None:
    await harness.deliver(OrderPlaced(4, 5), consumer=billing, key="4", times=2)

    outbox.assert_emitted(InvoiceCreated, order_id=4, key="4", topic="invoices")
    assert len(outbox.messages) == 1


async def test_delayed_retries_are_not_waited_for(harness: ConsumerHarness, outbox_session: Session) -> None:
    began = time.monotonic()

    await harness.deliver(OrderPlaced(1, -2), consumer=books, key="1")

    assert (harness.handled, harness.retried, harness.dead) == (1, 2, [])
    assert _invoices(outbox_session) == [(1, 3)]
    assert time.monotonic() - began < 60  # the policy's delays are hours


async def test_a_message_that_exhausts_its_retries_is_dead(harness: ConsumerHarness, outbox_session: Session) -> None:
    await harness.deliver(OrderPlaced(1, -99), consumer=books, key="1")

    (letter,) = harness.dead
    assert (harness.handled, letter.attempts, letter.consumer, letter.type) == (0, 4, "books", "order.placed")
    assert letter.error.startswith("RuntimeError at shop.py:")
    assert _invoices(outbox_session) == []


async def test_poison_is_dead_at_once(harness: ConsumerHarness) -> None:
    await harness.deliver(OrderPlaced(1, 13), consumer=books)

    assert (harness.retried, len(harness.dead)) == (0, 1)


async def test_a_message_of_the_outbox_goes_on_to_a_consumer(
    harness: ConsumerHarness, outbox: EmittedMessages, outbox_session: Session
) -> None:
    outbox_session.add(Order(total=5).place())
    outbox_session.commit()
    (message,) = outbox.messages

    await harness.deliver(message, consumer=billing)
    await harness.deliver(message, consumer=billing)

    assert (harness.handled, harness.duplicates) == (1, 1)
    outbox.assert_emitted(InvoiceCreated, key="1")


async def test_a_broken_message_is_dead_and_says_why(harness: ConsumerHarness) -> None:
    broken = Message(
        id="1", type="order.placed", topic="orders", payload=b'{"order_id": "x"}', content_type="application/json"
    )

    await harness.deliver(broken, consumer=billing)

    (letter,) = harness.dead
    assert "order_id" in letter.error


async def test_avro_events_are_delivered_without_a_registry(harness: ConsumerHarness, outbox_session: Session) -> None:
    await harness.deliver(Paid(3, "card"), consumer=books)

    assert harness.dead == []
    assert _invoices(outbox_session) == [(3, 4)]


async def test_avro_events_of_a_later_version_are_delivered_with_their_own_schema(
    harness: ConsumerHarness, outbox_session: Session
) -> None:
    later = {**shop.PAID, "fields": [*shop.PAID["fields"], {"name": "by", "type": "string"}]}

    @event("order.paid", version=2, schema=later)
    @dataclass(frozen=True)
    class PaidBySomebody:
        order_id: int
        how: str
        by: str

    await harness.deliver(PaidBySomebody(3, "cash!", "ana"), consumer=books)

    assert harness.dead == []
    assert _invoices(outbox_session) == [(3, 5)]


async def test_the_consumer_itself_is_not_changed(harness: ConsumerHarness) -> None:
    before = dict(vars(books)), dict(books.counts)

    await harness.deliver(OrderPlaced(1, 5), consumer=books)

    assert (dict(vars(books)), dict(books.counts)) == before
    assert books.config.sessions is shop.nowhere


async def test_an_open_change_of_the_test_is_refused_before_it_blocks(
    harness: ConsumerHarness, outbox_session: Session
) -> None:
    outbox_session.add(Order(total=5))
    with pytest.raises(ConfigurationError, match="commit"):
        await harness.deliver(OrderPlaced(1, 5), consumer=books)

    outbox_session.flush()
    with pytest.raises(ConfigurationError, match="commit"):
        await harness.deliver(OrderPlaced(1, 5), consumer=books)

    outbox_session.commit()
    outbox_session.scalars(select(Order)).all()
    await harness.deliver(OrderPlaced(1, 5), consumer=books)
    assert harness.handled == 1


@pytest.mark.parametrize(
    ("unknown", "topic", "told"),
    [
        (InvoiceCreated(1), "", r"books does not handle invoice\.created; it handles order\.placed from orders, "),
        (OrderPlaced(1, 5), "elsewhere", r"books does not handle order\.placed from elsewhere"),
    ],
)
async def test_what_nobody_handles_is_refused(harness: ConsumerHarness, unknown: object, topic: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        await harness.deliver(unknown, consumer=books, topic=topic)


async def test_of_two_topics_one_must_be_named(harness: ConsumerHarness) -> None:
    seen: list[str] = []
    both = Consumer("both", sessions=shop.nowhere)

    @both.on(OrderPlaced, topic="orders")
    def from_orders(placed: OrderPlaced) -> None:
        seen.append("orders")

    @both.on(OrderPlaced, queue="work")
    def from_work(placed: OrderPlaced) -> None:
        seen.append("work")

    with pytest.raises(ConfigurationError, match="from orders, work: give topic="):
        await harness.deliver(OrderPlaced(1, 5), consumer=both)
    await harness.deliver(OrderPlaced(1, 5), consumer=both, topic="work")

    assert seen == ["work"]


async def test_headers_and_patterns_reach_the_handler(harness: ConsumerHarness) -> None:
    seen: list[str | None] = []
    reports = Consumer("reports", sessions=shop.nowhere)

    @reports.on("invoice.*", topic="reports")
    def read(message: Message) -> None:
        seen.append(message.header("tenant"))

    await harness.deliver(InvoiceCreated(1), consumer=reports, headers={"tenant": "a"})

    assert seen == ["a"]


async def test_retries_without_an_end_do_not_hang_the_test(
    harness: ConsumerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outboxkit.testing.delivery._MAX_ROUNDS", 2)

    with pytest.raises(AssertionError, match="books: 1 deliveries still wait after 2 retries"):
        await harness.deliver(OrderPlaced(1, -99), consumer=books)
