"""Edge E29: every way to map a class, and the frameworks that bring their own sessions, work unchanged."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import Column, ForeignKey, Integer, String, Table, select
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    mapped_column,
    registry,
)
from sqlalchemy.orm.exc import StaleDataError

from outboxkit import Outbox, OutboxMixin
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


class Base(DeclarativeBase):
    pass


class Vehicle(OutboxMixin, Base):
    """Joined-table inheritance at the root, single-table below."""

    __tablename__ = "vehicles"
    __outbox__ = Outbox(topic="vehicles", key="id")
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "vehicle"}  # noqa: RUF012 # SQLAlchemy's idiom


class Car(Vehicle):
    __tablename__ = "cars"
    id: Mapped[int] = mapped_column(ForeignKey("vehicles.id"), primary_key=True)
    doors: Mapped[int] = mapped_column(default=4)
    __mapper_args__ = {"polymorphic_identity": "car"}  # noqa: RUF012


class Bike(Vehicle):
    __outbox__ = Outbox(topic="bikes", key=lambda bike: f"bike-{bike.id}")
    __mapper_args__ = {"polymorphic_identity": "bike"}  # noqa: RUF012


class Seat(OutboxMixin, Base):
    __tablename__ = "seats"
    __outbox__ = Outbox(topic="seats", key=("row", "place"))
    row: Mapped[int] = mapped_column(primary_key=True)
    place: Mapped[str] = mapped_column(primary_key=True)


class Versioned(OutboxMixin, Base):
    __tablename__ = "versioned"
    __outbox__ = Outbox(topic="versioned", key="label")
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="a")
    notes: Mapped[str] = mapped_column(default="long", deferred=True)
    version: Mapped[int] = mapped_column()
    __mapper_args__ = {"version_id_col": version}  # noqa: RUF012

    @hybrid_property
    def label(self) -> str:
        return f"{self.name}-{self.id}"


class DataBase(MappedAsDataclass, DeclarativeBase):
    pass


class Ticket(OutboxMixin, DataBase):
    __tablename__ = "tickets"
    __outbox__ = Outbox(topic="tickets", key="id")
    id: Mapped[int] = mapped_column(init=False, primary_key=True)
    title: Mapped[str] = mapped_column(default="t")

    def __post_init__(self) -> None:
        self.emit(lambda: {"id": self.id}, type="ticket.opened")


class Imperative(OutboxMixin):
    __outbox__ = Outbox(topic="imperative", key="id")
    id: int

    def __init__(self, name: str) -> None:
        self.name = name


imperative = registry()
imperative_table = Table(
    "imperative", imperative.metadata, Column("id", Integer, primary_key=True), Column("name", String)
)
imperative.map_imperatively(Imperative, imperative_table)


@pytest.fixture(autouse=True)
def tables_of_this_module(world: CaptureDatabase) -> Any:
    metadatas = (Base.metadata, DataBase.metadata, imperative.metadata)
    for metadata in metadatas:
        metadata.create_all(world.observer)
    yield
    for metadata in metadatas:
        metadata.drop_all(world.observer)


def addressed(world: CaptureDatabase) -> list[tuple[str, bytes, Any]]:
    return [(row.topic, row.key, json.loads(row.payload)) for row in world.rows()]


def test_inheritance_joined_and_single_emits_once_and_may_address_otherwise(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        car, bike = Car(doors=2), Bike()
        car.emit(lambda: {"doors": car.doors}, type="car.made")
        session.add_all([car, bike])
        session.flush()
        bike.emit({"gears": 3}, type="bike.made")
        session.commit()

    world.run(scenario)

    (first, car_key, _), second = addressed(world)
    assert (first, car_key) in {("vehicles", b"1"), ("vehicles", b"2")}
    assert second[0] == "bikes"
    assert second[1] in {b"bike-1", b"bike-2"}


def test_a_composite_key_is_joined(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        seat = Seat(row=4, place="b")
        session.add(seat)
        seat.emit({}, type="seat.taken")
        session.commit()

    world.run(scenario)

    assert addressed(world) == [("seats", b"4/b", {})]


def test_versions_hybrids_and_deferred_columns_are_read_after_the_flush(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        found = Versioned()
        session.add(found)
        session.commit()
        found = session.scalars(select(Versioned)).one()
        found.name = "b"
        found.emit(lambda: {"version": found.version, "notes": found.notes}, type="v")
        session.commit()

    world.run(scenario)

    assert addressed(world) == [("versioned", b"b-1", {"version": 2, "notes": "long"})]


def test_a_stale_version_takes_its_event_along(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        found = Versioned()
        session.add(found)
        session.commit()
        assert found.version == 1
        session.connection().exec_driver_sql("UPDATE versioned SET version = 9")
        found.name = "late"
        found.emit({}, type="v")
        with pytest.raises(StaleDataError):
            session.commit()
        session.rollback()
        session.commit()

    world.run(scenario)

    assert world.rows() == []


def test_dataclass_mappings_may_emit_while_they_are_made(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.add(Ticket())
        session.commit()

    world.run(scenario)

    assert addressed(world) == [("tickets", b"1", {"id": 1})]


def test_imperative_mappings_emit(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        found = Imperative("x")
        found.emit(lambda: {"id": found.id}, type="i")
        session.add(found)
        session.commit()

    world.run(scenario)

    assert addressed(world) == [("imperative", b"1", {"id": 1})]
