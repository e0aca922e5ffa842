"""`outbox`: what was committed is found, what was not is told apart, and a failure shows what was there."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from outboxkit import publish, send
from outboxkit.message import Kind
from outboxkit.testing.emitted import EmittedMessages
from tests.unit.testing.shop import InvoiceCreated, Order, OrderPlaced, Paid


def _failure(outbox: EmittedMessages, *what: object, **how: object) -> str:
    with pytest.raises(AssertionError) as caught:
        outbox.assert_emitted(*what, **how)  # type: ignore[call-overload]
    return str(caught.value)


def test_an_emitted_event_is_found_by_class_key_topic_and_fields(
    outbox_session: Session, outbox: EmittedMessages
) -> None:
    outbox_session.add_all([Order(total=5).place(), Order(total=7).place()])
    outbox_session.commit()

    assert outbox.assert_emitted(OrderPlaced) == OrderPlaced(1, 5)
    assert outbox.assert_emitted(OrderPlaced, total=7, key="2", topic="orders") == OrderPlaced(2, 7)
    assert outbox.assert_emitted(OrderPlaced, key=2) == OrderPlaced(2, 7)
    assert outbox.assert_emitted("order.placed", key=b"2") == {"order_id": 2, "total": 7}
    assert outbox.events(OrderPlaced) == [OrderPlaced(1, 5), OrderPlaced(2, 7)]
    assert outbox.events(InvoiceCreated) == []


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"total": 6}, "total is 5, expected 6"),
        ({"key": "2"}, "key is '1', expected '2'"),
        ({"key": None}, "key is '1', expected None"),
        ({"topic": "elsewhere"}, "topic is 'orders', expected 'elsewhere'"),
        ({"totl": 5}, "there is no field 'totl'"),
        ({"order_id": 2, "total": 6}, "order_id is 1, expected 2; total is 5, expected 6"),
    ],
)
def test_a_failure_says_what_is_different(
    outbox_session: Session, outbox: EmittedMessages, wanted: dict[str, object], told: str
) -> None:
    outbox_session.add(Order(total=5).place())
    outbox_session.commit()

    for what in (OrderPlaced, "order.placed"):
        text = _failure(outbox, what, **wanted)
        assert text.endswith(f"← {told}")
        assert all(f"{name}={value!r}" in text.splitlines()[0] for name, value in wanted.items())


def test_a_failure_shows_other_messages_too(outbox_session: Session, outbox: EmittedMessages) -> None:
    outbox_session.add(Order(total=5).place())
    outbox_session.commit()

    assert _failure(outbox, InvoiceCreated).splitlines() == [
        "no invoice.created was emitted; the outbox holds 1:",
        "  order.placed  topic='orders'  key='1'  " + '{"order_id":1,"total":5}',
    ]


def test_an_empty_outbox_is_told(outbox: EmittedMessages) -> None:
    assert _failure(outbox, OrderPlaced) == "no order.placed was emitted; the outbox is empty"


def test_before_the_commit_no_question_is_answered(outbox_session: Session, outbox: EmittedMessages) -> None:
    """Neither "nothing was emitted" nor "it was" would be true of what happens next."""
    outbox_session.add(Order(total=5).place())
    assert "commit() or rollback() first" in _failure(outbox, OrderPlaced)

    outbox_session.flush()
    assert "commit() or rollback() first" in _failure(outbox, OrderPlaced)
    with pytest.raises(AssertionError, match="commit"):
        outbox.assert_nothing_emitted()

    outbox_session.rollback()
    outbox.assert_nothing_emitted()


def test_nothing_emitted_is_true_of_a_rollback_and_false_of_a_commit(
    outbox_session: Session, outbox: EmittedMessages
) -> None:
    outbox_session.add(Order(total=5).place())
    outbox_session.flush()
    outbox_session.rollback()

    outbox.assert_nothing_emitted()

    outbox_session.add(Order(total=5).place())
    outbox_session.commit()
    with pytest.raises(AssertionError, match=r"expected no message; the outbox holds 1:\n  order\.placed"):
        outbox.assert_nothing_emitted()


async def test_a_coroutine_writes_into_the_same_database(
    outbox_async_sessions: async_sessionmaker[AsyncSession], outbox: EmittedMessages
) -> None:
    async with outbox_async_sessions.begin() as session:
        session.add(Order(total=5).place())

    outbox.assert_emitted(OrderPlaced, total=5, key="1")


def test_commands_and_delayed_messages_are_there_with_their_kind(
    outbox_session: Session, outbox: EmittedMessages
) -> None:
    publish(outbox_session, OrderPlaced(1, 5), topic="orders", delay=timedelta(minutes=5), headers={"tenant": "a"})
    send(outbox_session, InvoiceCreated(1), to="payments")
    outbox_session.commit()

    command, event = outbox.messages
    assert (command.kind, command.topic) == (Kind.COMMAND, "payments")
    assert (event.kind, event.header("tenant")) == (Kind.EVENT, "a")
    outbox.assert_emitted(OrderPlaced, key=None)


def test_avro_is_read_by_its_class_and_a_name_alone_is_told_to_be_too_little(
    outbox_session: Session, outbox: EmittedMessages
) -> None:
    publish(outbox_session, Paid(1, "card"), topic="payments")
    outbox_session.commit()

    assert outbox.assert_emitted(Paid, how="card") == Paid(1, "card")
    assert "give the event class instead of its name" in _failure(outbox, "order.paid")
    assert "how is 'card', expected 'cash'" in _failure(outbox, Paid, how="cash")


def test_a_failure_is_short_enough_to_read(outbox_session: Session, outbox: EmittedMessages) -> None:
    for number in range(50):
        publish(outbox_session, {"text": "x" * 1000}, topic="t", type="noise", key=str(number))
    outbox_session.commit()

    text = _failure(outbox, OrderPlaced)
    assert "… and 30 more" in text
    assert len(text) < 10_000


def test_every_test_has_a_database_of_its_own(outbox: EmittedMessages) -> None:
    assert outbox.messages == []
