"""What the later messages of a key do while one waits, and when one dies; and how patient a consumer is."""

from __future__ import annotations

from datetime import timedelta
from random import Random
from typing import Any

import pytest
from sqlalchemy import update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.consumer import Consumer, quarantine
from outboxkit.dead_letters import discard, replay
from outboxkit.errors import ConfigurationError
from outboxkit.inbox import held
from outboxkit.policy import Failure, Followers, RetryPolicy
from outboxkit.rows import WaitReason
from tests.consumer_fixture import ConsumerFixture, consumer, handles, impatient, letters, order, raises_at


def dies(number: int) -> Any:
    def fail(found: int, ctx: Any) -> None:
        if found == number:
            ctx.dead_letter("no such customer")

    return fail


async def run_once(world: ConsumerFixture, billing: Consumer) -> Any:
    """Runs until nothing is in hand; what is parked may wait."""
    return await world.run(billing, rests=True)


def reasons(world: ConsumerFixture) -> list[str]:
    return [row.reason for row in sorted(world.rows(tables.inbox_waiting), key=lambda row: row.id)]


async def test_by_default_the_key_goes_on_behind_a_dead_message(world: ConsumerFixture) -> None:
    billing = consumer(world)
    handles(billing, dies(1))

    world.send(order(1), order(2), order(3))
    await world.run(billing)

    assert world.effects() == [2, 3]


async def test_a_parked_key_waits_for_an_operator_and_other_keys_do_not(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park")
    handles(billing, dies(1))

    world.send(order(1), order(2), order(7, key="other"), order(3))
    ran = await run_once(world, billing)
    world.send(order(4))
    await run_once(world, billing)

    assert world.effects() == [7]
    assert len(ran.acknowledged) == 4, "the database has them"
    assert reasons(world) == ["parked", "follower", "follower", "follower"]
    assert len(letters(world)) == 1


async def test_a_released_key_goes_on_in_order(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park")
    handles(billing, dies(1))
    world.send(order(1), order(2), order(3))
    await run_once(world, billing)

    with world.engine.begin() as connection:
        (head,) = held.held(connection, "billing")
        assert (head.topic, head.key, head.reason, head.followers) == ("orders", b"k", "parked", 2)
        assert quarantine.release(connection, head, by="ana")
        assert not quarantine.release(connection, head, by="ana")
    await world.run(billing)

    assert world.effects() == [2, 3]


async def test_the_replay_of_a_parked_head_takes_its_place(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park")
    fate: list[Any] = [dies(1)]
    handles(billing, lambda number, ctx: fate[0](number, ctx))  # noqa: PLW0108  looked up at each call
    world.send(order(1), order(2), order(3))
    await run_once(world, billing)
    (letter,) = letters(world)

    fate[0] = lambda _number, _ctx: None
    with world.engine.begin() as connection:
        replay(connection, [letter.id], by="ana", why="the customer exists now")
    assert world.relay() == 1
    await world.run(billing)

    assert world.effects() == [1, 2, 3]
    assert [one.state.value for one in letters(world, state=None)] == ["replayed"]


async def test_a_replay_that_dies_again_parks_the_key_again(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park")
    handles(billing, dies(1))
    world.send(order(1), order(2))
    await run_once(world, billing)
    (letter,) = letters(world)

    with world.engine.begin() as connection:
        replay(connection, [letter.id], by="ana", why="perhaps")
    world.relay()
    await run_once(world, billing)

    assert world.effects() == []
    assert reasons(world) == ["parked", "follower"]
    assert [one.generation for one in letters(world)] == [1]


async def test_a_repaired_head_takes_the_place_of_the_parked_one(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park")
    handles(billing)
    world.send(order(1, payload=b"{"), order(2))
    await run_once(world, billing)
    (letter,) = letters(world)

    with world.engine.begin() as connection:
        replay(connection, [letter.id], by="ana", why="repaired", payload=b'{"number": 1}')
    world.relay()
    await world.run(billing)

    assert world.effects() == [1, 2]


async def test_keys_of_any_length_wait_and_go_on_each_in_its_own_order(world: ConsumerFixture) -> None:
    """An index entry has a size, and two long keys may begin alike."""
    billing = consumer(world, on_dead="park")
    handles(billing, dies(1))
    beginning = Random(7).randbytes(8_000).hex()

    world.send(order(1, key=beginning + "a"), order(2, key=beginning + "a"), order(3, key=beginning + "b"))
    await run_once(world, billing)
    assert world.effects() == [3]
    assert reasons(world) == ["parked", "follower"]
    with world.engine.begin() as connection:
        (head,) = held.held(connection, "billing", key=(beginning + "a").encode())
        assert head.followers == 1
        assert held.held(connection, "billing", key=(beginning + "b").encode()) == []
        assert quarantine.release(connection, head, by="ana")
    await world.run(billing)

    assert world.effects() == [3, 2]


async def test_a_restart_does_not_release_a_parked_key(world: ConsumerFixture) -> None:
    first, second = consumer(world, on_dead="park"), consumer(world, on_dead="park")
    handles(first, dies(1))
    handles(second)
    world.send(order(1), order(2))
    await run_once(world, first)
    with world.engine.begin() as connection:
        discard(connection, [letters(world)[0].id], by="ana", why="never mind")

    await run_once(world, second)

    assert world.effects() == []
    assert reasons(world) == [WaitReason.PARKED, WaitReason.FOLLOWER]


async def test_a_head_that_waited_is_parked_where_it_stood(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="park", retry=impatient(delayed=1))
    handles(billing, raises_at((1, 1), (1, 2)))

    world.send(order(1), order(2))
    await run_once(world, billing)

    assert reasons(world) == ["parked", "follower"]
    assert world.effects() == []


async def test_a_blocking_head_is_tried_for_ever(world: ConsumerFixture) -> None:
    billing = consumer(world, on_dead="block", retry=impatient(delayed=1))
    calls = handles(billing, raises_at(*((1, attempt) for attempt in range(1, 9))))

    world.send(order(1), order(2))
    await world.run(billing)

    assert [attempt for number, attempt in calls if number == 1] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert world.effects() == [1, 2]
    assert letters(world) == []


async def test_later_messages_may_go_on_while_one_waits(world: ConsumerFixture) -> None:
    billing = consumer(world, while_waiting="skip", concurrency=1)
    handles(billing, lambda number, ctx: ctx.retry_after("1h") if (number, ctx.attempt) == (1, 1) else None)

    world.send(order(1), order(2), order(3))
    world.between = [update(tables.inbox_waiting).values(due_at=database_now())]  # when the others are done
    await world.run(billing)

    assert world.effects() == [2, 3, 1]


async def test_later_spends_no_try_and_a_real_error_has_its_full_tries_afterwards(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=2))
    asked = {1: 0, 2: 0}

    def refuse(number: int, ctx: Any) -> None:
        asked[number] += 1
        if asked[number] <= 12:
            ctx.later("1ms")
        if number == 2:
            raise KeyError

    calls = handles(billing, refuse)
    world.send(order(1, key="1"), order(2, key="2"))
    await world.run(billing)

    assert world.effects() == [1]
    assert {attempt for number, attempt in calls if number == 1} == {1}
    (letter,) = letters(world)
    assert (letter.failure, letter.attempts, asked[2]) == (Failure.HANDLER, 3, 12 + 3)


async def test_later_is_bounded_by_age(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1), patience="1h")
    asked: list[int] = []

    def refuse(number: int, ctx: Any) -> None:
        asked.append(number)
        if len(asked) == 3:
            _make_older(world)
        ctx.later("1ms")

    handles(billing, refuse)
    world.send(order(1))
    await world.run(billing)

    assert len(letters(world)) == 1
    assert len(asked) > 3


def _make_older(world: ConsumerFixture) -> None:
    room = tables.inbox_waiting
    world.between.append(update(room).values(first_failed_at=database_now(timedelta(hours=-2))))


def test_the_default_patience_outlives_a_short_outage_of_another_service() -> None:
    policy = RetryPolicy()
    ceilings = [min(policy.delayed.cap, policy.delayed.base * 2**n) for n in range(policy.delayed.attempts)]

    assert policy.delayed.base == timedelta(milliseconds=100)
    assert policy.delayed.cap == timedelta(minutes=5)
    assert timedelta(minutes=25) < sum(ceilings, timedelta(0)) / 2 < timedelta(minutes=40), "on average half of each"


def test_a_setting_of_the_relay_is_refused_by_a_consumer(world: ConsumerFixture) -> None:
    with pytest.raises(ConfigurationError, match="on_dead"):
        Consumer("billing", sessions=world.plain, retry=RetryPolicy(followers=Followers.PARK))


MISUSE: list[tuple[str, object]] = [
    ("ordering", "keys"),
    ("ordering", None),
    ("while_waiting", "wait"),
    ("on_dead", "bury"),
    ("expired", True),
    ("concurrency", 0),
    ("concurrency", "16"),
    ("concurrency", True),
    ("batch", 0),
    ("batch", 1.5),
    ("prefetch", 0),
    ("prefetch_bytes", -1),
    ("timeout", 30),
    ("timeout", "-1s"),
    ("timeout", "soon"),
    ("drain", timedelta(0)),
    ("patience", None),
    ("retry", "often"),
    ("retry", 3),
    ("resolve", "http://registry"),
    ("message_id", "offset"),
    ("message_id", 7),
    ("type_of", "place"),
    ("copy_to", 7),
    ("check_order", "yes"),
]


@pytest.mark.parametrize(("argument", "value"), MISUSE, ids=[f"{name}={value!r}" for name, value in MISUSE])
def test_misuse_is_refused_by_name_where_it_is_given(world: ConsumerFixture, argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=argument):
        Consumer("billing", sessions=world.plain, **{argument: value})


@pytest.mark.parametrize("name", ["", " ", "a\0b", None, 7])
def test_a_name_that_is_none_is_refused(world: ConsumerFixture, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="name"):
        Consumer(name, sessions=world.plain)


@pytest.mark.parametrize("sessions", [None, "postgresql://", lambda: None], ids=["nothing", "a URL", "a function"])
def test_sessions_that_are_none_are_refused(sessions: Any) -> None:
    with pytest.raises(ConfigurationError, match="sessionmaker"):
        Consumer("billing", sessions=sessions)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
