"""The thin line: what commits is stored, what rolls back is not; with a session as applications use it."""

from __future__ import annotations

import json

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import publish
from tests.integration.capture.model import Noted, Order, OrderPlaced
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


def test_a_new_order_and_its_event_commit_together(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=5).place())
        session.commit()

    world.run(scenario)

    (row,) = world.rows()
    order_id = world.scalar("SELECT id FROM orders")
    assert json.loads(row.payload) == {"order_id": order_id, "total": 5}
    assert (row.topic, row.key, row.type, row.kind) == ("orders", str(order_id).encode(), "order.placed", "event")
    assert row.recorded_at >= row.occurred_at.replace(microsecond=0)


def test_a_rolled_back_transaction_stores_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=5).place())
        publish(session, Noted("before the flush"), topic="notes")
        session.flush()
        publish(session, Noted("after the flush"), topic="notes")
        session.rollback()
        session.commit()

    world.run(scenario)

    assert world.events() == []
    assert world.scalar("SELECT count(*) FROM orders") == 0


@pytest.mark.parametrize("flushed", [True, False])
def test_a_rolled_back_savepoint_takes_its_events_along_and_leaves_the_others(
    world: CaptureDatabase, *, flushed: bool
) -> None:
    def scenario(session: Session) -> None:
        publish(session, Noted("kept"), topic="notes")
        savepoint = session.begin_nested()
        publish(session, Noted("undone"), topic="notes")
        if flushed:
            session.flush()
        savepoint.rollback()
        publish(session, Noted("kept too"), topic="notes")
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "kept"}, {"text": "kept too"}]


async def test_an_async_session_needs_no_configuration(async_world: CaptureDatabase) -> None:
    async with AsyncSession(async_world.async_engine) as session, session.begin():
        order = Order(total=3).place()
        session.add(order)
        await session.flush()
        async with session.begin_nested() as savepoint:
            order.emit(OrderPlaced(order.id, 4))
            await savepoint.rollback()
        publish(session, Noted("async"), topic="notes")
    await async_world.async_engine.dispose()

    assert async_world.events() == [{"order_id": 1, "total": 3}, {"text": "async"}]
