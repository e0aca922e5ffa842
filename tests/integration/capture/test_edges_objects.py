"""Edges E7, E12, E19, E30 and E31: objects that load, merge, are deleted, copied, or speak from inside hooks."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
from typing import Any

import pytest
from sqlalchemy import create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import CaptureError, publish
from tests.deadlines import DEADLINE
from tests.integration.capture.model import Noted, Order, OrderPlaced, Plain
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


def test_e7_an_event_may_read_what_the_server_filled_in(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        order = Order()
        session.add(order)
        order.emit(lambda: OrderPlaced(order.id, order.stamp))
        session.flush()
        order.status = "paid"
        order.emit(lambda: OrderPlaced(order.id, order.stamp))
        session.commit()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == [7, 4]


def test_e12_what_merge_returns_emits_and_a_detached_object_refuses(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1))
        session.commit()
        order = session.scalars(select(Order)).one()
        session.expunge(order)
        with pytest.raises(CaptureError, match="detached"):
            order.emit(OrderPlaced(1, 1))
        session.merge(order).emit(OrderPlaced(1, 2))
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 2}]


def test_e12_events_of_an_object_that_is_merged_again_stay_with_the_transaction(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        order = Order(id=5, total=1)
        session.add(order)
        order.emit(OrderPlaced(5, 1))
        session.flush()
        order.emit(OrderPlaced(5, 2))
        session.merge(Order(id=5, total=9))
        session.commit()

    world.run(scenario)

    assert [found["total"] for found in world.events()] == [1, 2]


def test_e12_a_new_object_that_is_merged_instead_of_added_warns_that_its_events_are_dropped(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        order = Order(total=1).place()
        session.merge(order)
        session.commit()
        del order
        gc.collect()

    with pytest.warns(ResourceWarning, match="never joined a session"):
        world.run(scenario)

    assert world.events() == []


def test_e18_an_object_that_is_inserted_and_deleted_keeps_both_explicit_events(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        order = Order(total=1).place()
        session.add(order)
        session.flush()
        order.emit(lambda: Noted(f"deleted {order.id}"))
        session.delete(order)
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 1}, {"text": "deleted 1"}]


def test_e18_a_deleted_object_that_was_expired_still_says_what_it_was(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=8))
        session.commit()
        order = session.scalars(select(Order)).one()
        order.emit(lambda: OrderPlaced(order.id, order.total))
        session.delete(order)
        session.expire(order)
        session.commit()

    world.run(scenario)

    assert world.events() == [{"order_id": 1, "total": 8}]
    assert world.rows()[0].key == b"1"


HOOKS = ("before_flush", "after_flush", "after_flush_postexec", "before_commit")


@pytest.mark.parametrize("first", [True, False], ids=["emitted before", "nothing emitted before"])
@pytest.mark.parametrize("dirty", [True, False], ids=["dirty", "clean"])
@pytest.mark.parametrize("hook", HOOKS)
def test_e19_an_event_from_another_listener_is_included_exactly_once(
    world: CaptureDatabase, hook: str, *, dirty: bool, first: bool
) -> None:
    def scenario(session: Session) -> None:
        spoken: list[str] = []

        def speak(session: Session, *_: Any) -> None:
            if not spoken:
                spoken.append(hook)
                publish(session, Noted(hook), topic="notes")

        event.listen(session, hook, speak)
        if dirty:
            session.add(Plain(text="dirty"))
        if first:
            publish(session, Noted("first"), topic="notes")
        session.commit()

    world.run(scenario)

    fires = dirty or hook == "before_commit" or (first and hook == "before_flush")  # else no flush has work to do
    assert sorted(found["text"] for found in world.events()) == sorted(
        (["first"] if first else []) + ([hook] if fires else [])
    )


@pytest.mark.parametrize("hook", ["before_insert", "after_insert"])
def test_e19_an_event_from_a_mappers_hook_is_included_exactly_once(world: CaptureDatabase, hook: str) -> None:
    def speak(_mapper: Any, _connection: Any, plain: Plain) -> None:
        publish(Session.object_session(plain) or pytest.fail("no session"), Noted(hook), topic="notes")

    def scenario(session: Session) -> None:
        session.add_all([Plain(text="one"), Plain(text="two")])
        session.commit()

    event.listen(Plain, hook, speak)
    try:
        world.run(scenario)
    finally:
        event.remove(Plain, hook, speak)

    assert world.events() == [{"text": hook}] * 2


def test_e19_an_event_that_emits_another_one_while_it_is_made_is_followed_by_it(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        def outer() -> Noted:
            publish(session, Noted("inner"), topic="notes")
            return Noted("outer")

        publish(session, outer, topic="notes")
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "outer"}, {"text": "inner"}]


def test_e19_an_event_whose_making_queries_the_database_is_stored_once(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=3))
        publish(session, lambda: Noted(str(session.scalars(select(Order.total)).one())), topic="notes")
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "3"}]


@pytest.mark.parametrize("expire", [True, False])
def test_e30_the_payload_is_frozen_and_expiry_makes_no_difference(world: CaptureDatabase, *, expire: bool) -> None:
    def scenario(session: Session) -> None:
        facts = {"total": 1}
        order = Order(total=1).place()
        session.add(order)
        publish(session, facts, type="facts", topic="notes")
        facts["total"] = 99
        session.flush()
        order.total = 99
        session.commit()
        order.total = 100
        session.commit()

    world.run(scenario, expire_on_commit=expire)

    assert world.events() == [{"order_id": 1, "total": 1}, {"total": 1}]


def test_e31_an_object_with_unsent_events_refuses_to_be_pickled() -> None:
    order = Order(total=1).place()

    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        pickle.dumps(order)

    with Session(create_engine("sqlite://")) as session:  # in a session the events are the session's
        session.add(order)
        pickle.dumps(order)
        session.rollback()


@pytest.mark.parametrize("sync_world", ["postgresql+psycopg"], indirect=True)  # SQLite has one writer
def test_e31_sessions_of_different_threads_do_not_mix_their_events(sync_world: CaptureDatabase) -> None:
    ready = threading.Barrier(4)

    def work(name: int) -> None:
        with Session(sync_world.sync_engine) as session:
            for at in range(20):
                publish(session, OrderPlaced(name, at), topic=f"thread-{name}")
            ready.wait(DEADLINE)
            session.commit()

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for name in range(4):
        mine = [found["total"] for found in sync_world.events() if found["order_id"] == name]
        assert mine == list(range(20))


async def test_e31_what_another_task_emits_into_a_busy_session_is_stored_or_refused_never_lost(
    async_world: CaptureDatabase,
) -> None:
    taken: list[str] = []
    refused = 0
    async with AsyncSession(async_world.async_engine) as session:
        session.add(Order(total=1))
        flush = asyncio.ensure_future(session.flush())
        while not flush.done() and len(taken) + refused < 500:  # bounded: each one is more for the flush to write
            try:
                taken.append(publish(session, Noted("meanwhile"), topic="notes"))
            except CaptureError:
                refused += 1
            await asyncio.sleep(0)
        await flush
        await session.commit()
    await async_world.async_engine.dispose()

    assert [str(row.message_id) for row in async_world.rows()] == taken
    assert refused > 0
