"""Edges E8-E11, E17 and E18: changes that are captured without emit, and bulk statements that no object sees."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Table, delete, func, insert, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from outboxkit import CaptureError, Outbox, OutboxMixin
from outboxkit.capture import ChangeCapture, bulk
from outboxkit.capture.bulk_statements import GUARD
from tests.integration.capture.model import Line, Order, OrderPlaced
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


class Base(DeclarativeBase):
    pass


item_tags = Table(
    "item_tags",
    Base.metadata,
    Column("item_id", ForeignKey("items.id"), primary_key=True),
    Column("tag_id", ForeignKey("tags.id"), primary_key=True),
)


class Tag(Base):
    __tablename__ = "tags"
    id: Mapped[int] = mapped_column(primary_key=True)


class Item(OutboxMixin, Base):
    __tablename__ = "items"
    __outbox__ = Outbox(topic="items", key="id", changes=ChangeCapture(exclude={"secret"}))

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)
    secret: Mapped[str] = mapped_column(default="hidden")
    parts: Mapped[list[Part]] = relationship(passive_deletes=True, cascade="all, delete-orphan")
    tags: Mapped[list[Tag]] = relationship(secondary=item_tags)


class Part(OutboxMixin, Base):
    __tablename__ = "parts"
    __outbox__ = Outbox(topic="parts", key="id", changes=ChangeCapture(coalesce="flush"))

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey("items.id", ondelete="CASCADE"))
    name: Mapped[str] = mapped_column(default="")


@pytest.fixture(autouse=True)
def tables_of_this_module(world: CaptureDatabase) -> Any:
    Base.metadata.create_all(world.observer)
    yield
    Base.metadata.drop_all(world.observer)


def told(world: CaptureDatabase) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    return [(row["change"], row["old"], row["new"]) for row in world.events()]


def test_a_new_a_changed_and_a_deleted_object_are_told_with_old_and_new_values(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=1)
        session.add(item)
        session.commit()
        assert item.total == 1
        item.total = 2
        session.commit()
        session.delete(item)
        session.commit()

    world.run(scenario)

    assert told(world) == [
        ("created", {}, {"id": 1, "total": 1}),
        ("updated", {"total": 1}, {"total": 2}),
        ("deleted", {"id": 1, "total": 2}, {}),
    ]
    assert [row.type for row in world.rows()] == ["item.created", "item.updated", "item.deleted"]
    assert {row.key for row in world.rows()} == {b"1"}
    assert world.events()[1]["changed"] == ["total"]


def test_an_excluded_column_is_never_told_and_its_change_alone_is_no_event(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item()
        session.add(item)
        session.commit()
        item.secret = "other"
        session.commit()

    world.run(scenario)

    assert len(world.events()) == 1
    assert "secret" not in str(world.events())


def test_e8_an_assignment_that_changes_nothing_is_no_event(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=3)
        session.add(item)
        session.commit()
        item.total = item.total  # exactly this
        assert item in session.dirty
        session.commit()

    world.run(scenario)

    assert [change for change, _, _ in told(world)] == ["created"]


def test_e9_a_change_of_a_collection_is_no_change_of_the_object(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item()
        session.add(item)
        session.commit()
        item.tags.append(Tag())
        session.commit()

    world.run(scenario)

    assert [change for change, _, _ in told(world)] == ["created"]


def test_e11_rows_that_the_database_deletes_by_a_cascade_are_not_told(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        if world.observer.dialect.name == "sqlite":
            session.connection().exec_driver_sql("COMMIT")  # the pragma does nothing inside a transaction
            session.connection().exec_driver_sql("PRAGMA foreign_keys = ON")
            session.connection().exec_driver_sql("BEGIN")
        item = Item(parts=[Part(), Part()])
        session.add(item)
        session.flush()
        session.expire_all()
        session.delete(item)
        session.flush()
        assert session.scalar(select(func.count()).select_from(Part)) == 0
        session.commit()

    world.run(scenario)

    assert [row.type for row in world.rows()] == ["part.created", "part.created"]


def test_e17_two_flushes_of_one_transaction_are_one_event_or_two_as_the_model_says(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item, part = Item(total=1), Part(name="a")
        item.parts.append(part)
        session.add(item)
        session.commit()
        assert (item.total, part.name) == (1, "a")  # an old value is told if it was loaded
        for total, name in ((2, "b"), (3, "c")):
            item.total, part.name = total, name
            session.flush()
        session.commit()

    world.run(scenario)

    rows = [(row.type, told) for row, told in zip(world.rows(), told(world), strict=True) if "updated" in row.type]
    assert [(name, old, new) for name, (_, old, new) in rows] == [
        ("part.updated", {"name": "a"}, {"name": "b"}),
        ("part.updated", {"name": "b"}, {"name": "c"}),
        ("item.updated", {"total": 1}, {"total": 3}),
    ]


def test_e17_a_savepoint_cuts_the_coalescing_and_a_rolled_back_one_is_not_told(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=1)
        session.add(item)
        savepoint = session.begin_nested()
        item.total = 2
        session.flush()
        savepoint.rollback()
        assert item.total == 1
        with session.begin_nested():
            item.total = 3
        session.commit()

    world.run(scenario)

    assert told(world) == [("created", {}, {"id": 1, "total": 1}), ("updated", {"total": 1}, {"total": 3})]


def test_e18_what_is_inserted_and_deleted_in_one_transaction_was_never_there(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item()
        session.add(item)
        session.flush()
        session.delete(item)
        session.commit()

    world.run(scenario)

    assert world.events() == []


def test_a_created_object_that_changes_before_the_commit_is_told_once_with_its_last_values(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=1)
        session.add(item)
        session.flush()
        item.total = 5
        session.flush()
        session.commit()

    world.run(scenario)

    assert told(world) == [("created", {}, {"id": 1, "total": 5})]


def test_a_value_that_the_database_computes_is_told_as_it_is(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=1)
        session.add(item)
        session.commit()
        item.total = Item.total + 41
        session.commit()

    world.run(scenario)

    assert told(world)[1][2] == {"total": 42}


def test_a_deleted_object_that_was_expired_is_told_with_its_values(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        item = Item(total=6)
        session.add(item)
        session.commit()
        session.delete(item)
        session.commit()

    world.run(scenario)

    assert told(world)[1] == ("deleted", {"id": 1, "total": 6}, {})


# --- bulk statements ---------------------------------------------------------------------------------------------

STATEMENTS = [
    pytest.param(lambda: update(Order).values(status="x"), id="update"),
    pytest.param(lambda: delete(Order), id="delete"),
    pytest.param(lambda: insert(Order).values(total=1), id="insert"),
]


@pytest.mark.parametrize("statement", STATEMENTS)
def test_e10_a_bulk_statement_on_a_model_that_emits_is_refused(world: CaptureDatabase, statement: Any) -> None:
    def scenario(session: Session) -> None:
        with pytest.raises(CaptureError, match="bulk statement on Order"):
            session.execute(statement())

    world.run(scenario)


def test_e10_a_legacy_query_is_refused_like_a_statement(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        with pytest.raises(CaptureError, match="bulk statement on Order"):
            session.query(Order).update({"status": "x"})

    world.run(scenario)


def test_e10_a_statement_or_a_session_may_allow_it_or_only_warn(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.execute(update(Order).values(status="x"), execution_options={GUARD: "allow"})
        with pytest.warns(RuntimeWarning, match="bulk statement on Order"):
            session.execute(update(Order).values(status="x"), execution_options={GUARD: "warn"})
        session.info[GUARD] = "allow"
        session.execute(delete(Order))
        session.rollback()

    world.run(scenario)


def test_e10_other_models_and_queries_are_free(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.execute(insert(Tag).values(id=1))
        assert session.scalars(select(Order)).all() == []
        session.rollback()

    world.run(scenario)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (lambda: update(Order).where(Order.total > 1).values(total=Order.total * 10), [20, 30]),
        (lambda: delete(Order).where(Order.total > 1), [2, 3]),
        (lambda: insert(Order).values([{"total": 7}, {"total": 8}]), [7, 8]),
    ],
    ids=["update", "delete", "insert"],
)
def test_e10_bulk_runs_the_statement_and_emits_one_event_per_row(
    world: CaptureDatabase, statement: Any, expected: list[int]
) -> None:
    def scenario(session: Session) -> None:
        session.add_all([Order(total=1), Order(total=2), Order(total=3)])
        session.commit()
        known = session.scalars(select(Order).order_by(Order.id)).all()
        assert bulk(session, statement(), lambda order: OrderPlaced(order.id, order.total)) == len(expected)
        session.commit()
        assert known

    world.run(scenario)

    assert sorted(found["total"] for found in world.events()) == expected
    assert {row.topic for row in world.rows()} == {"orders"}


def test_e10_bulk_in_a_rolled_back_savepoint_emits_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Order(total=1))
        savepoint = session.begin_nested()
        bulk(session, update(Order).values(total=5), lambda order: OrderPlaced(order.id))
        savepoint.rollback()
        session.commit()

    world.run(scenario)

    assert world.events() == []


def test_e10_bulk_refuses_what_it_cannot_do(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        for statement in (select(Order), update(Tag).values(id=1)):
            with pytest.raises(CaptureError, match="OutboxMixin"):
                bulk(session, statement, lambda order: OrderPlaced(order.id))

    world.run(scenario)


def test_e10_bulk_save_objects_passes_every_hook_and_is_documented_to_emit_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            session.bulk_save_objects([Item(total=1)])
        session.commit()

    world.run(scenario)

    assert world.events() == []
    assert Line.__outbox__.bulk == "raise"
