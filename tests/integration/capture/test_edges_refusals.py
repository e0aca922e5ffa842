"""Edges E20-E22, E24 and E32: what would lose atomicity is refused, with the reason, and nothing is half done."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from outboxkit import CaptureError, EncodeError, publish, send
from outboxkit.message import MessageLimits
from tests.integration.capture.model import Noted, Order, OrderPlaced, Plain
from tests.integration.capture.world import CaptureDatabase, prepare
from tests.sqlite_template import copied

pytestmark = pytest.mark.sqlalchemy_lines


def autocommitting(world: CaptureDatabase, how: str) -> CaptureDatabase:
    """The world by an engine that commits each statement, told in one of the ways there are."""
    url = world.sync_engine.url
    options: dict[str, Any] = {"poolclass": NullPool}
    if how == "create_engine":
        options["isolation_level"] = "AUTOCOMMIT"
    engine: Any = (create_async_engine if world.is_async else create_engine)(url, **options)
    if how == "execution_options":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    return CaptureDatabase(engine, world.observer)


@pytest.mark.parametrize("how", ["create_engine", "execution_options"])
def test_e20_an_engine_that_commits_by_itself_is_refused_at_emit(world: CaptureDatabase, how: str) -> None:
    def scenario(session: Session) -> None:
        order = Order(total=1)
        session.add(order)
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            order.emit(OrderPlaced(1))
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            publish(session, Noted("x"), topic="notes")

    autocommitting(world, how).run(scenario)

    assert world.events() == []


def test_e20_a_connection_that_commits_by_itself_is_refused_before_the_domains_rows_are_written(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        session.add(Order(total=1).place())
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            session.flush()
        session.rollback()

    world.run(scenario)

    assert world.scalar("SELECT count(*) FROM orders") == 0


@pytest.mark.parametrize("sync_world", ["postgresql+psycopg"], indirect=True)
def test_e20_a_driver_that_was_told_to_commit_by_itself_is_refused_before_the_domains_rows(
    sync_world: CaptureDatabase,
) -> None:
    engine = create_engine(sync_world.sync_engine.url, connect_args={"autocommit": True})
    with Session(engine) as session:
        session.add(Order(total=1).place())
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            session.commit()
        session.rollback()
    engine.dispose()

    assert sync_world.scalar("SELECT count(*) FROM orders") == 0


def test_e20_without_a_transaction_the_event_is_refused(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        with pytest.raises(CaptureError, match=r"session\.begin"):
            publish(session, Noted("x"), topic="notes")
        with session.begin():
            publish(session, Noted("y"), topic="notes")

    world.run(scenario, autobegin=False)

    assert world.events() == [{"text": "y"}]


def test_e20_an_event_after_the_commit_of_its_transaction_is_refused(world: CaptureDatabase) -> None:
    refusals = []

    def scenario(session: Session) -> None:
        @event.listens_for(session, "after_commit")
        def late(session: Session) -> None:
            with pytest.raises(CaptureError, match="ended") as caught:
                publish(session, Noted("late"), topic="notes")
            refusals.append(caught.value)

        publish(session, Noted("in time"), topic="notes")
        session.commit()

    world.run(scenario)

    assert len(refusals) == 1
    assert world.events() == [{"text": "in time"}]


def test_e20_an_event_after_a_failed_flush_is_refused_until_the_rollback(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add_all([Plain(text="twice"), Plain(text="twice")])
        with pytest.raises(DBAPIError):
            session.flush()
        with pytest.raises(CaptureError, match="failed"):
            publish(session, Noted("x"), topic="notes")
        session.rollback()

    world.run(scenario)


def test_e20_a_swallowed_error_is_refused_at_commit_because_the_database_would_say_nothing(
    postgres_world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1).place())
        session.flush()
        with pytest.raises(DBAPIError):
            session.execute(text("SELECT 1 / 0"))
        with pytest.raises(CaptureError, match="swallowed"):
            session.commit()
        session.rollback()

    postgres_world.run(scenario)


def test_e20_an_error_that_a_savepoint_has_undone_is_none(postgres_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1).place())
        with pytest.raises(DBAPIError), session.begin_nested():
            session.execute(text("SELECT 1 / 0"))
        session.commit()

    postgres_world.run(scenario)

    assert len(postgres_world.events()) == 1


@pytest.mark.parametrize("sync_world", ["postgresql+psycopg"], indirect=True)
def test_e20_an_error_on_the_drivers_own_cursor_is_refused_at_commit_too(sync_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1).place())
        session.flush()
        driver: Any = session.connection().connection.driver_connection
        with pytest.raises(Exception, match="zero"):
            driver.execute("SELECT 1 / 0")
        with pytest.raises(CaptureError, match="swallowed"):
            session.commit()
        session.rollback()

    sync_world.run(scenario)


@pytest.fixture
def other_database(tmp_path: Path) -> Any:
    engine = create_engine(copied(tmp_path / "other.sqlite", prepare))
    yield engine
    engine.dispose()


def test_e21_an_objects_event_goes_to_the_objects_own_database(
    sync_world: CaptureDatabase, other_database: Any
) -> None:
    with Session(other_database, binds={Order: sync_world.sync_engine}) as session:
        session.add(Order(total=4).place())
        session.add(Plain(text="in the other one"))
        session.commit()

    assert [found["total"] for found in sync_world.events()] == [4]


def test_e21_an_event_that_would_go_to_another_database_than_the_changes_is_refused(
    sync_world: CaptureDatabase, other_database: Any
) -> None:
    with Session(other_database, binds={Order: sync_world.sync_engine}) as session:
        session.add(Order(total=4))
        publish(session, Noted("elsewhere"), topic="notes")
        with pytest.raises(CaptureError, match="another database"):
            session.commit()
        session.rollback()

    assert sync_world.scalar("SELECT count(*) FROM orders") == 0


def test_e21_an_event_without_an_object_and_without_a_database_is_refused_at_emit(sync_world: CaptureDatabase) -> None:
    with Session(binds={Order: sync_world.sync_engine}) as session:
        with pytest.raises(CaptureError, match="which database"):
            publish(session, Noted("whose"), topic="notes")
        session.add(Order(total=4).place())
        session.commit()

    assert [found["total"] for found in sync_world.events()] == [4]


@pytest.mark.parametrize("sync_world", ["postgresql+psycopg"], indirect=True)
def test_e22_two_phases_store_at_prepare_and_publish_at_commit(sync_world: CaptureDatabase) -> None:
    session = Session(sync_world.sync_engine, twophase=True)
    session.add(Order(total=1).place())

    session.prepare()
    assert sync_world.events() == []
    session.commit()
    session.close()

    assert len(sync_world.events()) == 1


def test_e24_taking_back_an_event_by_expunge_is_refused(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        publish(session, Noted("stays"), topic="notes")
        (marker,) = session.new
        with pytest.raises(CaptureError, match="savepoint"):
            session.expunge(marker)
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "stays"}]


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"lines": [{"sku": "a"}, {"sku": object()}]}, "lines[1].sku"),
        ({"total": math.nan}, "total"),
        ({"by": {1: "one"}}, "by"),
        ({"name": "\ud800"}, "name"),
    ],
)
def test_e32_a_payload_that_cannot_be_written_is_refused_at_emit_with_its_path(
    world: CaptureDatabase, payload: Any, path: str
) -> None:
    def scenario(session: Session) -> None:
        with pytest.raises(EncodeError) as caught:
            publish(session, payload, type="facts", topic="notes")
        assert caught.value.path == path
        assert path in str(caught.value)
        publish(session, Noted("good"), topic="notes")
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "good"}]


def test_e32_a_payload_that_only_the_flush_makes_fails_the_transaction_there(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1))
        publish(session, lambda: {"x": object()}, type="facts", topic="notes")
        with pytest.raises(EncodeError):
            session.commit()
        session.rollback()
        session.commit()

    world.run(scenario)

    assert world.scalar("SELECT count(*) FROM orders") == 0


OVERSIZE: list[tuple[str, Callable[[Session], object]]] = [
    ("payload", lambda session: publish(session, Noted("x" * 900_001), topic="notes")),
    ("50", lambda session: publish(session, Noted("x" * 100), topic="notes", limits=MessageLimits(payload=50))),
    ("key", lambda session: publish(session, Noted("x"), topic="notes", key="k" * 1025)),
    ("headers", lambda session: publish(session, Noted("x"), topic="notes", headers={"h": "v" * 20_000})),
    ("reserved", lambda session: send(session, Noted("x"), to="notes", headers={"ce_id": "forged"})),
]


@pytest.mark.parametrize(("what", "emit"), OVERSIZE, ids=[what for what, _ in OVERSIZE])
def test_e32_what_some_broker_would_refuse_later_is_refused_at_emit(
    world: CaptureDatabase, what: str, emit: Callable[[Session], object]
) -> None:
    def scenario(session: Session) -> None:
        with pytest.raises(EncodeError, match=what):
            emit(session)

    world.run(scenario)


def test_an_object_that_is_no_session_is_refused() -> None:
    with pytest.raises(CaptureError, match="expected a Session"):
        publish(object(), Noted("x"), topic="notes")  # type: ignore[arg-type]


def test_an_undeclared_class_is_refused(world: CaptureDatabase) -> None:
    class Undeclared:
        pass

    def scenario(session: Session) -> None:
        with pytest.raises(CaptureError, match="@event"):
            publish(session, Undeclared(), topic="notes")
        with pytest.raises(CaptureError, match="type"):
            publish(session, {"a": 1}, topic="notes")

    world.run(scenario)
