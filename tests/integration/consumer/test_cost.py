"""What holds on SQLite, on PostgreSQL; and what only a database with arrays can do."""

from sqlalchemy import event

from outboxkit import inbox
from tests.consumer_fixture import ConsumerFixture, order
from tests.unit.consumer.test_cost import *  # noqa: F403


def test_statements_of_a_batch_have_one_text_whatever_its_size(world: ConsumerFixture) -> None:
    texts: list[str] = []
    event.listen(world.engine, "before_cursor_execute", lambda *given: texts.append(given[2]))

    for size in (2, 70):
        messages = [order(n) for n in range(size)]
        with world.plain.begin() as session:
            assert inbox.admit_batch(session, "billing", messages) == [True] * size
            inbox.finish_batch(session, "billing", [(message, None) for message in messages])

    assert texts[:2] == texts[2:]
