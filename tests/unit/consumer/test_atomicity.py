"""Atomicity is checked, not trusted: no door of the transaction makes a duplicate of a message that is not handled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import inbox, tables
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.inbox import Admitted
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, consumer, handles, impatient, letters, order


def _driver_commit(session: Session) -> None:
    driver: Any = session.connection().connection.dbapi_connection
    driver.commit()


DOORS: dict[str, Callable[[Session], object]] = {
    "the connection": lambda session: session.connection().commit(),
    "the connection's transaction": lambda session: session.connection().get_transaction().commit(),  # type: ignore[union-attr]
    "the driver": _driver_commit,
    "SQL": lambda session: session.execute(text("COMMIT")),
    "SQL on the driver": lambda session: session.connection().exec_driver_sql("COMMIT"),
    "the session's transaction": lambda session: session.get_transaction().commit(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("door", list(DOORS.values()), ids=list(DOORS))
async def test_a_commit_by_any_door_never_makes_a_duplicate_of_a_failed_message(
    world: ConsumerFixture, door: Callable[[Session], object]
) -> None:
    billing = consumer(world, retry=impatient(delayed=1))
    attempts: list[int] = []

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        attempts.append(ctx.attempt)
        session.add(Effect(message_id="half", number=0))
        await session.flush()
        if ctx.attempt == 1:
            await session.run_sync(door)
            raise KeyError
        session.add(Effect(message_id="whole", number=placed.number))

    world.send(order(1))
    await world.run(billing)

    assert billing.counts["duplicate"] == 0
    assert attempts == [1, 2]
    assert 1 in world.effects() or len(letters(world)) == 1


@pytest.mark.parametrize("door", list(DOORS.values()), ids=list(DOORS))
async def test_a_handler_that_always_commits_by_itself_and_fails_is_a_letter(
    world: ConsumerFixture, door: Callable[[Session], object]
) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        await session.run_sync(door)
        raise KeyError

    world.send(order(1))
    await world.run(billing)
    world.send(order(1))

    (letter,) = letters(world)
    assert letter.failure is Failure.HANDLER
    assert billing.counts["duplicate"] == 0


def test_a_claim_that_was_committed_unfinished_is_claimed_again(world: ConsumerFixture) -> None:
    message = order(1)
    with world.plain() as session:
        assert inbox.admit(session, "billing", message).kind is Admitted.FIRST
        session.connection().commit()

    with world.plain.begin() as session:
        assert inbox.admit(session, "billing", message).kind is Admitted.FIRST
        inbox.finish(session, "billing", message)
    with world.plain.begin() as session:
        assert inbox.admit(session, "billing", message).kind is Admitted.DUPLICATE


def test_a_claim_inside_a_savepoint_is_finished_inside_it(world: ConsumerFixture) -> None:
    with (
        world.plain.begin() as session,
        session.begin_nested(),
        inbox.claim(session, message_id="m", consumer="billing") as first,
    ):
        assert first
    with world.plain.begin() as session, inbox.claim(session, message_id="m", consumer="billing") as again:
        assert not again


def test_a_second_claim_in_the_same_transaction_is_a_duplicate(world: ConsumerFixture) -> None:
    with (
        world.plain.begin() as session,
        inbox.claim(session, message_id="m", consumer="billing") as first,
        inbox.claim(session, message_id="m", consumer="billing") as again,
    ):
        assert first
        assert not again
        assert again.outcome is None


def test_an_outcome_cannot_pretend_to_be_ours(world: ConsumerFixture) -> None:
    with (
        world.plain.begin() as session,
        inbox.claim(session, message_id="m", consumer="billing") as first,
        pytest.raises(OutboxKitError, match="such outcomes are ours"),
    ):
        first.set_outcome(b"\0outboxkit: dead")


MISUSE: dict[str, Callable[[AsyncSession], Any]] = {
    "begin()": lambda session: session.begin().start(),
    "commit()": lambda session: session.commit(),
    "close()": lambda session: session.close(),
    "reset()": lambda session: session.reset(),
}


@pytest.mark.parametrize("verb", list(MISUSE), ids=str)
async def test_who_begins_or_ends_the_transaction_is_told_so_with_the_line(world: ConsumerFixture, verb: str) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        session.add(Effect(message_id="x", number=placed.number))
        await MISUSE[verb](session)

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert letter.error.startswith(f"{verb} inside a handler")
    assert "begin_nested()" in letter.error
    assert "test_atomicity.py:" in letter.error
    assert world.effects() == []


async def test_with_session_as_in_tutorials_is_told_so(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        async with session, session.begin():
            session.add(Effect(message_id="x", number=placed.number))

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert "inside a handler" in letter.error
    assert "in bill" in letter.error
    assert world.effects() == []


async def test_a_plain_handler_is_guarded_too(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.plain, retry=impatient(delayed=1), concurrency=1)

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, session: Session) -> None:
        with session.begin():
            session.add(Effect(message_id="x", number=placed.number))

    world.send(order(1))
    await world.run(billing)

    (letter,) = letters(world)
    assert letter.error.startswith("begin() inside a handler")


def autocommitting(world: ConsumerFixture, how: str) -> Any:
    options = {"isolation_level": "AUTOCOMMIT"}
    if how == "engine":
        return create_engine(world.url, **options)
    if how == "execution options":
        return world.engine.execution_options(**options)
    url = world.asynchronous.kw["bind"].url
    return create_async_engine(url, **options)


@pytest.mark.parametrize("how", ["engine", "execution options", "asynchronous engine"])
async def test_an_engine_in_autocommit_is_refused_when_the_run_starts(world: ConsumerFixture, how: str) -> None:
    engine = autocommitting(world, how)
    sessions: Any = sessionmaker(engine) if "async" not in how else async_sessionmaker(engine)
    billing = Consumer("billing", sessions=sessions, concurrency=1)
    billing.on(OrderPlaced, topic="orders")(lambda placed: placed and None)

    with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        await world.run(billing)
    if "async" in how:
        await engine.dispose()
    elif how == "engine":
        engine.dispose()


@pytest.mark.parametrize("how", ["engine", "execution options"])
def test_a_claim_on_a_connection_in_autocommit_is_refused(world: ConsumerFixture, how: str) -> None:
    engine = autocommitting(world, how)
    with Session(engine) as session, pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
        inbox.claim(session, message_id="m", consumer="billing").__enter__()
    if how == "engine":
        engine.dispose()

    assert world.count(tables.inbox_messages) == 0


def _group(*errors: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("of tasks", list(errors))


async def test_groups_are_unpacked(world: ConsumerFixture) -> None:
    """A task group wraps what its tasks raise: the signal in it counts, and the letter names the first error."""
    billing = consumer(world, retry=impatient(delayed=1, poison=(LookupError,)))

    async def fail(number: int, ctx: MessageContext) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task({1: _lookup, 2: _give_up, 3: _type_error}[number](ctx))

    handles(billing, fail)
    world.send(*(order(n, key=str(n)) for n in (1, 2, 3)))
    await world.run(billing)

    found = {letter.payload: letter for letter in letters(world)}
    one, two, three = (found[b'{"number": %d}' % number] for number in (1, 2, 3))
    assert (one.failure, one.attempts, one.error_class) == (Failure.POISON, 1, "KeyError")
    assert (two.failure, two.attempts, two.error) == (Failure.POISON, 1, "no such customer")
    assert (three.failure, three.attempts, three.error_class) == (Failure.HANDLER, 2, "TypeError")


async def _lookup(ctx: MessageContext) -> None:
    raise KeyError


async def _give_up(ctx: MessageContext) -> None:
    ctx.dead_letter("no such customer")


async def _type_error(ctx: MessageContext) -> None:
    raise TypeError


async def test_a_handler_that_exits_has_failed(world: ConsumerFixture) -> None:
    billing = consumer(world, retry=impatient(delayed=1))

    def fail(number: int, ctx: MessageContext) -> None:
        if number == 1:
            raise SystemExit(3)

    handles(billing, fail)
    world.send(order(1), order(2))
    await world.run(billing)

    (letter,) = letters(world)
    assert "sys.exit()" in letter.error
    assert world.effects() == [2]


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("awaits", [False, True])
async def test_a_handler_that_raises_what_means_something_else_to_an_event_loop_has_failed(
    world: ConsumerFixture, *, error: type[BaseException], awaits: bool
) -> None:
    sessions = world.asynchronous if awaits else world.plain
    billing = Consumer("billing", sessions=sessions, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    def bill(placed: OrderPlaced, ctx: MessageContext, session: Session) -> None:
        if placed.number == 1:
            raise error
        session.add(Effect(message_id=ctx.id, number=placed.number))

    world.send(order(1), order(2))
    await world.run(billing)

    (letter,) = letters(world)
    assert (letter.failure, letter.attempts) == (Failure.HANDLER, 2)
    assert world.effects() == [2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
