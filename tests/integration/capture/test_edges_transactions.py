"""Edges E1-E6, E13-E16 and E23-E28: what a transaction, a savepoint and a flush do to the events in them."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from outboxkit import publish, tables
from outboxkit.capture import session_hooks
from tests.integration.capture.model import Line, Noted, Order, OrderPlaced, Plain
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


def note(session: Session, text: str) -> None:
    publish(session, Noted(text), topic="notes")


def notes(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


@pytest.mark.parametrize("flush", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_e1_a_rolled_back_savepoint_takes_its_own_events_at_every_depth(
    world: CaptureDatabase, depth: int, *, flush: bool
) -> None:
    def scenario(session: Session) -> None:
        note(session, "root")
        savepoints = []
        for level in range(depth):
            savepoints.append(session.begin_nested())
            note(session, f"level {level}")
        if flush:
            session.flush()
        savepoints.pop().rollback()
        note(session, "after")
        session.commit()

    world.run(scenario)

    assert world.events() == notes("root", *(f"level {level}" for level in range(depth - 1)), "after")


def test_e1_work_and_event_of_a_savepoint_vanish_together(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1).place())
        savepoint = session.begin_nested()
        session.add(Order(total=2).place())
        savepoint.rollback()
        session.add(Order(total=3).place())
        session.commit()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == [1, 3]
    assert world.scalar("SELECT sum(total) FROM orders") == 4


def test_e2_a_released_savepoint_in_a_rolled_back_transaction_publishes_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        with session.begin_nested():
            note(session, "released")
        with session.begin_nested(), session.begin_nested():
            note(session, "released twice")
        session.rollback()
        session.commit()

    world.run(scenario)

    assert world.events() == []


def test_e2_a_released_savepoint_inside_a_rolled_back_one_publishes_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        outer = session.begin_nested()
        with session.begin_nested():
            note(session, "inner")
        outer.rollback()
        note(session, "root")
        session.commit()

    world.run(scenario)

    assert world.events() == notes("root")


def test_e3_the_end_of_a_savepoint_is_not_taken_for_the_end_of_the_transaction(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        with session.begin_nested():
            note(session, "first")
        note(session, "second")
        assert world.events() == []
        session.commit()

    world.run(scenario)

    assert world.events() == notes("first", "second")


def test_e3_a_commit_of_the_root_closes_open_savepoints_and_keeps_their_events(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        root = session.begin()
        note(session, "root")
        session.begin_nested()
        note(session, "nested")
        root.commit()

    world.run(scenario)

    assert world.events() == notes("root", "nested")


@pytest.mark.parametrize("commit", [True, False])
def test_e4_the_inner_transaction_of_a_flush_is_not_the_end(world: CaptureDatabase, *, commit: bool) -> None:
    def scenario(session: Session) -> None:
        for at in range(3):
            session.add(Order(total=at).place())
            session.flush()
        session.commit() if commit else session.rollback()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == ([0, 1, 2] if commit else [])


def test_e5_keys_that_the_database_makes_are_known_to_the_event_and_to_its_ordering_key(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        order = Order(lines=[Line(sku="a"), Line(sku="b")])
        for line in order.lines:
            line.emit(lambda line=line: OrderPlaced(line.order_id, line.id))
        session.add(order)
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 1}, {"order_id": 1, "total": 2}]
    assert [row.key for row in world.rows()] == [b"1/1", b"1/2"]


@pytest.mark.parametrize("dirty", [True, False])
def test_e6_the_rows_are_in_the_database_when_flush_returns(world: CaptureDatabase, *, dirty: bool) -> None:
    def scenario(session: Session) -> int:
        if dirty:
            session.add(Plain(text="dirty"))
        note(session, "flushed")
        session.flush()
        with session.no_autoflush:
            return session.scalar(select(func.count()).select_from(tables.outbox_messages)) or 0

    with pytest.warns(ResourceWarning, match="without commit"):
        assert world.run(scenario) == 1


def test_e6_a_query_flushes_events_like_any_other_change(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> int:
        note(session, "seen by the query")
        session.scalars(select(Order)).all()
        found = session.connection().scalar(select(func.count()).select_from(tables.outbox_messages)) or 0
        session.rollback()
        return found

    assert world.run(scenario) == 1


def test_e13_an_event_outlives_the_unmodified_object_that_emitted_it(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order())
        session.commit()
        order = session.scalars(select(Order)).one()
        order.emit(OrderPlaced(order.id))
        del order
        gc.collect()
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 0}]


def test_e14_events_of_a_rolled_back_transaction_do_not_come_back_with_a_later_commit(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order())
        session.commit()
        order = session.scalars(select(Order)).one()
        order.emit(OrderPlaced(order.id, 1))
        session.rollback()
        order.emit(OrderPlaced(order.id, 2))
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 2}]


def test_e14_a_new_object_that_is_added_again_after_a_rollback_does_not_repeat_its_events(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        order = Order(total=1).place()
        session.add(order)
        session.rollback()
        session.add(order)
        order.emit(Noted("again"))
        session.commit()

    world.run(scenario)

    assert world.events() == notes("again")


def test_e15_the_events_of_a_failed_flush_are_gone_and_stay_gone(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Plain(text="taken"))
        session.commit()
        session.add(Plain(text="taken"))
        session.add(Order(total=1).place())
        note(session, "lost with its transaction")
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        note(session, "second try")
        session.commit()

    world.run(scenario)

    assert world.events() == notes("second try")


def test_e15_a_flush_that_fails_in_a_savepoint_takes_only_the_savepoints_events(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Plain(text="taken"))
        note(session, "root")
        savepoint = session.begin_nested()
        session.add(Plain(text="taken"))
        note(session, "undone")
        with pytest.raises(IntegrityError):
            session.flush()
        savepoint.rollback()
        note(session, "went on")
        session.commit()

    world.run(scenario)

    assert world.events() == notes("root", "went on")


def test_e15_a_listener_that_makes_the_flush_fail_early_loses_no_event_of_those_who_go_on(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        calls: list[int] = []

        @event.listens_for(session, "before_flush")
        def refuse(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError

        session.add(Order(total=1))
        note(session, "kept")
        with pytest.raises(RuntimeError):
            session.flush()
        session.commit()

    world.run(scenario)

    assert world.events() == notes("kept")
    assert world.scalar("SELECT count(*) FROM orders") == 1


def test_e15_expunge_all_drops_objects_but_no_event(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        note(session, "kept")
        session.expunge_all()
        session.commit()
        note(session, "flushed")
        session.expunge_all()
        note(session, "and again")
        session.flush()
        session.commit()

    world.run(scenario)

    assert world.events() == notes("kept", "flushed", "and again")


def test_e15_a_partial_flush_leaves_the_events_for_the_next_one(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        first, second = Order(total=1), Order(total=2).place()
        session.add_all([first, second])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in SQLAlchemy 2.1
            session.flush([first])
        session.commit()

    world.run(scenario)

    (found,) = world.events()
    assert found["order_id"] is not None
    assert found["total"] == 2


@pytest.mark.parametrize("how", ["expunge", "expunge_all", "flush"])
def test_e15_an_event_is_flushed_by_a_query_though_the_new_object_beside_it_is_gone(
    world: CaptureDatabase, how: str
) -> None:
    def scenario(session: Session) -> None:
        session.add(order := Order(total=1))
        publish(session, Noted("stays"), topic="notes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # partial flushes are deprecated in SQLAlchemy 2.1
            session.flush([order]) if how == "flush" else getattr(session, how)(*([order] if how == "expunge" else []))
        session.scalars(select(Order)).all()  # of an entity: before a query of a table SQLAlchemy 2.0 does not flush
        assert session.scalar(select(func.count()).select_from(tables.outbox_messages)) == 1
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "stays"}]


def test_e16_a_block_that_is_run_again_after_a_failure_stores_one_set_of_events(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        for attempt in range(3):
            try:
                session.add(Order(total=attempt).place())
                session.flush()
                if attempt < 2:
                    session.add(Plain(text="twice"))
                    session.add(Plain(text="twice"))
                session.commit()
            except IntegrityError:
                session.rollback()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == [2]


def test_e16_a_serialization_failure_leaves_only_the_winning_attempts_events(postgres_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=0))
        session.commit()
        for attempt in range(2):
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            order = session.scalars(select(Order)).one()
            if attempt == 0:
                with postgres_world.observer.begin() as other:
                    other.execute(text("UPDATE orders SET total = 10"))
            order.total += 1
            order.emit(OrderPlaced(order.id, attempt))
            if attempt == 0:
                with pytest.raises(DBAPIError, match="could not serialize"):
                    session.commit()
                session.rollback()
        session.commit()

    postgres_world.run(scenario)

    assert postgres_world.events() == [{"order_id": 1, "total": 1}]
    assert postgres_world.scalar("SELECT total FROM orders") == 11


@pytest.mark.parametrize("commit", [True, False])
@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only"])
def test_e23_a_session_inside_an_outer_transaction_publishes_only_if_that_commits(
    world: CaptureDatabase, mode: Any, *, commit: bool
) -> None:
    def scenario(outer: Session) -> None:
        with Session(outer.connection(), join_transaction_mode=mode) as session:
            session.add(Order(total=1).place())
            note(session, "joined")
            session.commit()
        outer.commit() if commit else outer.rollback()

    world.run(scenario)

    assert len(world.events()) == (2 if commit else 0)


def test_e24_a_session_that_is_closed_without_commit_publishes_nothing_and_warns(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        note(session, "forgotten")
        session.close()
        session.commit()

    with pytest.warns(ResourceWarning, match="closed without commit"):
        world.run(scenario)

    assert world.events() == []


async def test_e25_hooks_of_an_async_session_may_read_attributes_that_need_the_database(
    async_world: CaptureDatabase,
) -> None:
    async with AsyncSession(async_world.async_engine, expire_on_commit=True) as session:
        order = Order(total=1)
        session.add(order)
        await session.commit()

        order.emit(lambda: OrderPlaced(order.id, order.total))
        await session.commit()
    await async_world.async_engine.dispose()

    assert async_world.events() == [{"order_id": 1, "total": 1}]


async def test_e26_async_scoped_sessions_and_factories_work(async_world: CaptureDatabase) -> None:
    factory = async_sessionmaker(async_world.async_engine)
    async with factory.begin() as session:
        publish(session, Noted("factory"), topic="notes")
    scoped = async_scoped_session(factory, scopefunc=lambda: 1)
    publish(scoped, Noted("scoped"), topic="notes")
    await scoped.commit()
    await scoped.remove()
    await async_world.async_engine.dispose()

    assert async_world.events() == notes("factory", "scoped")


def test_e26_scoped_sessions_factories_and_subclasses_work(sync_world: CaptureDatabase) -> None:
    class Special(Session):
        pass

    scoped = scoped_session(sessionmaker(sync_world.sync_engine, class_=Special))
    publish(scoped, Noted("scoped"), topic="notes")
    scoped.commit()
    scoped.remove()
    with Special(sync_world.sync_engine) as session, session.begin():
        session.add(Order(total=1).place())

    assert sync_world.events() == [{"text": "scoped"}, {"order_id": 1, "total": 1}]


def test_e26_installing_again_changes_nothing_and_removing_is_possible(sync_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        note(session, "once")
        session.commit()

    session_hooks.install()
    sync_world.run(scenario)
    assert sync_world.events() == notes("once")

    session_hooks.remove()
    try:
        with Session(sync_world.sync_engine) as session:
            session.add(Order())
            session.commit()
    finally:
        session_hooks.install()
    sync_world.run(scenario)
    assert sync_world.events() == notes("once", "once")


def statements(world: CaptureDatabase, scenario: Callable[[Session], None]) -> list[str]:
    """Runs the scenario; the statements that reached the driver, and how many rows each had."""
    seen: list[str] = []

    def listen(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(world.sync_engine, "before_cursor_execute", listen)
    try:
        world.run(scenario)
    finally:
        event.remove(world.sync_engine, "before_cursor_execute", listen)
    return seen


def test_e27_messages_keep_the_order_of_their_emission(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        orders = [Order(total=at) for at in range(20)]
        session.add_all(reversed(orders))
        for at, order in enumerate(orders):
            order.emit(OrderPlaced(None, 2 * at))
            publish(session, OrderPlaced(None, 2 * at + 1), topic="orders")
        session.commit()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == list(range(40))


def test_e28_the_outbox_is_written_after_the_domain_by_one_statement(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        for at in range(10):
            session.add(Order(total=at).place())
            note(session, str(at))
        session.commit()

    world.run(scenario)  # the number of shards is read once per engine
    seen = [statement for statement in statements(world, scenario) if statement.startswith("INSERT")]

    assert ["outbox_messages" in statement for statement in seen].index(True) == len(seen) - 1
    assert len(world.events()) == 40
