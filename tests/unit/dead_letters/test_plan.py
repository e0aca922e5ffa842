"""A replay of many letters is frozen first: cut off anywhere it goes on, two may share it, and its sums add up."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete, update

from outboxkit import _failpoints, dead_letters, tables
from outboxkit._failpoints import FailpointHit
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, Filter, Stage, State, Terms, plan
from outboxkit.dead_letters.plan import Outcome
from outboxkit.errors import ReplayError
from outboxkit.headers import from_wire, wire_headers
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, order

TERMS = Terms()


def bury(world: ConsumerFixture, number: int, key: str = "k") -> UUID:
    sent = order(number, key=key)
    delivery = Delivery(
        topic="orders", key=sent.key, headers=wire_headers(sent), payload=sent.payload, origin="o", offset=number,
        partition=0,
    )  # fmt: skip
    letter = dead_letters.of_delivery(
        delivery,
        from_wire("orders", sent.key, delivery.headers, sent.payload),
        consumer="billing",
        kind="event",
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=KeyError(),
        attempts=1,
    )
    with world.engine.begin() as connection:
        dead_letters.bury(connection, letter)
    return letter.id


def planned(world: ConsumerFixture, which: Filter | list[UUID] | None = None, limit: int | None = None) -> UUID:
    with world.engine.begin() as connection:
        drafted = plan.draft(connection, Filter() if which is None else which, TERMS, limit=limit)
        return plan.freeze(connection, drafted, TERMS, by="ana", why="fixed")


def advance(world: ConsumerFixture, replay_id: UUID, limit: int = 500) -> list[plan.Item]:
    with world.engine.begin() as connection:
        return plan.advance(connection, replay_id, limit=limit)


def told(world: ConsumerFixture, replay_id: UUID) -> plan.Replay:
    with world.engine.connect() as connection:
        (found,) = plan.replays(connection, replay_id)
    assert found.chosen == found.waiting + found.queued + found.refused + found.gone
    return found


def published(world: ConsumerFixture) -> list[tuple[str, int]]:
    rows = sorted(world.rows(tables.outbox_messages), key=lambda row: row.position)
    return [(row.key.decode(), json.loads(row.payload)["number"]) for row in rows]


def test_a_replay_goes_portion_by_portion_in_the_order_of_each_key(world: ConsumerFixture) -> None:
    numbers = list(range(30))
    random.Random(7).shuffle(numbers)
    for number in numbers:
        bury(world, number, key=str(number % 3))
    replay_id = planned(world)

    portions = [len(advance(world, replay_id, 8)) for _ in range(5)]

    assert portions == [8, 8, 8, 6, 0]
    for key in "012":
        assert [number for name, number in published(world) if name == key] == list(range(int(key), 30, 3))
    found = told(world, replay_id)
    assert (found.state, found.queued, found.waiting) == ("done", 30, 0)
    assert found.finished_at is not None


def test_what_dies_after_the_draft_is_not_part_of_it(world: ConsumerFixture) -> None:
    bury(world, 1)
    replay_id = planned(world)
    bury(world, 2)

    advance(world, replay_id)

    assert published(world) == [("k", 1)]


def test_the_sums_add_up_whatever_happened_meanwhile(world: ConsumerFixture) -> None:
    going, discarded, deleted, replayed, worn_out = (bury(world, number) for number in range(5))
    letters = tables.dead_letters
    with world.engine.begin() as connection:
        connection.execute(update(letters).where(letters.c.id == worn_out).values(generation=9))
    replay_id = planned(world)
    with world.engine.begin() as connection:
        dead_letters.discard(connection, [discarded], by="ben", why="")
        dead_letters.replay(connection, [replayed], by="ben", why="")
        connection.execute(delete(letters).where(letters.c.id == deleted))

    advance(world, replay_id)

    with world.engine.connect() as connection:
        found = {item.letter_id: (item.outcome, item.reason) for item in plan.items(connection, replay_id)}
    assert found[going] == (Outcome.QUEUED, "")
    assert found[discarded] == (Outcome.GONE, "it is discarded by now")
    assert found[deleted] == (Outcome.GONE, "it is not there any more")
    assert found[replayed] == (Outcome.GONE, "it is replaying by now")
    assert found[worn_out][0] is Outcome.REFUSED
    assert told(world, replay_id).chosen == 5
    assert len(published(world)) == 2, "one by each of them"


def test_the_limit_is_not_filled_by_what_is_refused(world: ConsumerFixture) -> None:
    ids = [bury(world, number) for number in range(6)]
    letters = tables.dead_letters
    with world.engine.begin() as connection:
        connection.execute(update(letters).where(letters.c.id.in_(ids[:3])).values(generation=9))

    replay_id = planned(world, limit=2)
    advance(world, replay_id)

    assert published(world) == [("k", 3), ("k", 4)]
    found = told(world, replay_id)
    assert (found.chosen, found.queued, found.refused) == (5, 2, 3)


def test_an_unknown_letter_is_refused_and_counted(world: ConsumerFixture) -> None:
    replay_id = planned(world, [bury(world, 1), uuid4()])

    advance(world, replay_id)

    found = told(world, replay_id)
    assert (found.queued, found.refused) == (1, 1)


@pytest.mark.parametrize("point", ["replay.written", "replay.claimed", "replay.decided"])
@pytest.mark.parametrize("hit", [1, 2, 4])
def test_a_replay_that_is_cut_off_anywhere_goes_on_with_what_is_left(
    world: ConsumerFixture, point: str, hit: int
) -> None:
    for number in range(20):
        bury(world, number, key=str(number % 4))
    replay_id = planned(world)
    _failpoints.enable(f"{point}=raise:{hit}")

    with pytest.raises(FailpointHit):
        _to_the_end(world, replay_id)
    assert told(world, replay_id).queued == len(published(world)) == 5 * (hit - 1)
    _to_the_end(world, replay_id)

    assert sorted(published(world), key=lambda row: row[1]) == [(str(number % 4), number) for number in range(20)]
    for key in "0123":
        assert [number for name, number in published(world) if name == key] == list(range(int(key), 20, 4))


def _to_the_end(world: ConsumerFixture, replay_id: UUID) -> None:
    while advance(world, replay_id, 5):
        pass


def test_two_plans_over_the_same_letters_queue_each_once(world: ConsumerFixture) -> None:
    for number in range(20):
        bury(world, number)
    first, second = planned(world), planned(world)

    while sum(len(advance(world, replay_id, 3)) for replay_id in (first, second)):
        pass

    assert published(world) == [("k", number) for number in range(20)]
    one, other = told(world, first), told(world, second)
    assert (one.queued + other.queued, one.gone + other.gone) == (20, 20)
    assert {one.state, other.state} == {"done"}


def test_a_stopped_replay_stands_until_it_is_resumed(world: ConsumerFixture) -> None:
    for number in range(4):
        bury(world, number)
    replay_id = planned(world)
    advance(world, replay_id, 1)

    with world.engine.begin() as connection:
        assert plan.stop(connection, replay_id, by="ben", why="it hurts")
    assert advance(world, replay_id) == []
    assert told(world, replay_id).waiting == 3

    with world.engine.begin() as connection:
        plan.resume(connection, replay_id, by="ana", why="it does not")
    advance(world, replay_id)
    assert published(world) == [("k", number) for number in range(4)]
    assert [(row.who, row.action) for row in world.rows(tables.outbox_audit)] == [
        ("ana", "dlq.replay"),
        ("ben", "dlq.replay.stop"),
        ("ana", "dlq.replay.resume"),
    ]
    with world.engine.begin() as connection:
        assert not plan.stop(connection, replay_id, by="ben", why="too late")
        with pytest.raises(ReplayError, match="is over: 4 of 4 were queued"):
            plan.resume(connection, replay_id, by="ben", why="")


def test_a_replay_that_nobody_has_planned_is_refused(world: ConsumerFixture) -> None:
    with pytest.raises(ReplayError, match="there is no replay"):
        advance(world, uuid4())


def test_health_tells_what_became_of_the_letters(world: ConsumerFixture) -> None:
    good, bad, open_one = (bury(world, number) for number in range(3))
    replay_id = planned(world)
    advance(world, replay_id)
    letters = tables.dead_letters
    with world.engine.begin() as connection:
        for letter_id in (good, bad):
            connection.execute(update(letters).where(letters.c.id == letter_id).values(state=State.REPLAYED))
    child = bury(world, 9)
    with world.engine.begin() as connection:
        connection.execute(update(letters).where(letters.c.id == child).values(parent_id=bad))
        found = plan.health(connection, replay_id)

    assert (found.under_way, found.replayed, found.died_again) == (1, 1, 1)
    assert open_one in {letter.id for letter in _letters(world, State.REPLAYING)}


def _letters(world: ConsumerFixture, state: State) -> list[DeadLetter]:
    with world.engine.connect() as connection:
        return dead_letters.find(connection, Filter(state=state))


def test_a_plan_keeps_its_terms(world: ConsumerFixture) -> None:
    bury(world, 1)
    terms = Terms(force=True, to="invoicing", inbox_retention=timedelta(hours=5))
    with world.engine.begin() as connection:
        replay_id = plan.freeze(connection, plan.draft(connection, Filter(), terms), terms, by="ana", why="renamed")

    advance(world, replay_id)

    (row,) = world.rows(tables.outbox_messages)
    assert b"invoicing" in row.headers
    assert told(world, replay_id).options == {"force": True, "to": "invoicing", "inbox_retention": 18000.0}


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    _failpoints.disable()
