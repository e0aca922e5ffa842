"""A process may die anywhere: one effect per message, and a message that kills is found and buried."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from outboxkit import tables
from outboxkit.dead_letters import Filter, find
from outboxkit.policy import Failure
from tests.consumer_child import COUNT, KILLED, run_child
from tests.consumer_fixture import ConsumerFixture, create_tables
from tests.sqlite_template import copied

POINTS = [
    "recv",
    "attempt.recorded",
    "inbox.inserted",
    "handler.before",
    "handler.after",
    "commit.before",
    "commit.after",
    "ack.before",
    "ack.after",
]
EXITED = 137


@pytest.fixture(params=["sqlite", "postgresql"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ConsumerFixture]:
    on_sqlite = request.param == "sqlite"
    url = copied(tmp_path / "test.db", create_tables) if on_sqlite else request.getfixturevalue("database_url")
    found = ConsumerFixture(url, has_tables=True)
    yield found
    await found.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_death_at_any_point_leaves_one_effect_per_message(world: ConsumerFixture, point: str) -> None:
    assert run_child(world.url, armed=f"{point}=exit") == EXITED

    assert run_child(world.url) == 0

    assert sorted(world.effects()) == list(range(COUNT))
    assert world.count(tables.dead_letters) == 0
    assert world.count(tables.inbox_batches) == 0, "nobody is suspect any more"


def test_a_message_that_kills_the_process_is_buried_after_three_deaths_and_no_other(world: ConsumerFixture) -> None:
    deaths = 0
    while (status := run_child(world.url, killer=3)) != 0:
        assert status == KILLED
        deaths += 1

    assert deaths == 3
    with world.engine.connect() as connection:
        (letter,) = find(connection, Filter())
    assert (letter.message_id, letter.failure, letter.attempts) == ("m3", Failure.CRASH, 3)
    assert sorted(world.effects()) == [0, 1, 2, 4, 5]
    assert world.count(tables.inbox_batches) == 0


def test_a_death_between_waiting_and_acknowledging_keeps_the_order(world: ConsumerFixture) -> None:
    assert run_child(world.url, armed="handler.before=raise,retry.scheduled=exit") == EXITED

    assert run_child(world.url) == 0

    effects = world.effects()
    assert sorted(effects) == list(range(COUNT))
    assert all([n for n in effects if n % 3 == key] == [key, key + 3] for key in range(3))


@pytest.mark.parametrize("point", ["dlq.before", "dlq.after", "ack.before"])
def test_a_death_while_burying_leaves_one_letter(world: ConsumerFixture, point: str) -> None:
    assert run_child(world.url, poison=2, armed=f"{point}=exit") == EXITED

    assert run_child(world.url, poison=2) == 0

    with world.engine.connect() as connection:
        assert [letter.message_id for letter in find(connection, Filter())] == ["m2"]
    assert sorted(world.effects()) == [0, 1, 3, 4, 5]
