"""The cost of a message, told in facts and not in seconds: statements, what Core compiles, calls to threads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit.consumer import Consumer
from outboxkit.consumer.transactions import Threads
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, consumer, order

MESSAGES = 60
ABOUT_THE_RUN = 30  #: calls of a run that has no message at all: start, markers, waiting room, end


@pytest.fixture
def statements() -> Iterator[Counter[tuple[str, bool]]]:
    """Statements about a message: the table's name, and whether Core made it for this call."""
    found: Counter[tuple[str, bool]] = Counter()

    def note(_connection: Any, _cursor: Any, text: str, _values: Any, context: Any, _many: bool) -> None:  # noqa: FBT001
        for table in (tables.inbox_messages.name, Effect.__tablename__):
            if table in text and not text.startswith("SELECT"):
                found[table, context.compiled is not None] += 1

    event.listen(Engine, "before_cursor_execute", note)
    yield found
    event.remove(Engine, "before_cursor_execute", note)


async def test_a_message_costs_two_statements_of_the_inbox_that_core_does_not_make_anew(
    world: ConsumerFixture, statements: Counter[tuple[str, bool]]
) -> None:
    billing = consumer(world)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id="m", number=placed.number))

    world.send(*(order(n) for n in range(MESSAGES)))
    await world.run(billing)

    assert len(world.effects()) == MESSAGES
    assert statements == {("inbox_messages", False): 2 * MESSAGES, ("effects", True): MESSAGES}


async def test_a_message_of_a_plain_handler_costs_one_call_to_a_thread(
    world: ConsumerFixture, statements: Counter[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    billing, calls, run = Consumer("billing", sessions=world.plain, concurrency=1), [0], Threads.run

    def counted(threads: Threads, function: Any) -> Any:
        calls[0] += 1
        return run(threads, function)

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, session: Session) -> None:
        session.add(Effect(message_id="m", number=placed.number))

    monkeypatch.setattr(Threads, "run", counted)
    world.send(*(order(n) for n in range(MESSAGES)))
    await world.run(billing)

    assert statements == {("inbox_messages", False): 2 * MESSAGES, ("effects", True): MESSAGES}
    assert MESSAGES <= calls[0] < MESSAGES + ABOUT_THE_RUN


async def test_a_batch_costs_a_few_statements_of_the_inbox(
    world: ConsumerFixture, statements: Counter[tuple[str, bool]]
) -> None:
    billing = consumer(world, batch=MESSAGES)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: list[OrderPlaced], session: AsyncSession) -> None:
        session.add_all(Effect(message_id="m", number=one.number) for one in placed)

    world.send(*(order(n) for n in range(MESSAGES)))
    await world.run(billing)

    assert len(world.effects()) == MESSAGES
    assert sum(number for (table, _), number in statements.items() if table == "inbox_messages") == 2
