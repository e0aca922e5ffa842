"""Tables that are missing, or empty, are told as that, whatever asks for them first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from outboxkit import ConfigurationError, event, migrations, publish, tables
from outboxkit.capture.declare import declare
from outboxkit.registries.memory import MemoryRegistry
from tests.integration.capture.model import Base, Noted, Order

SCHEMA: dict[str, Any] = {"type": "record", "name": "Paid", "namespace": "shop", "fields": []}


@event("paid", schema=SCHEMA)
class Paid:
    pass


def publishing(engine: Engine) -> None:
    with Session(engine) as session:
        publish(session, Noted("x"), topic="notes")
        try:
            session.commit()
        finally:
            session.rollback()


def delaying(engine: Engine) -> None:
    with Session(engine) as session:
        publish(session, Noted("x"), topic="notes", delay="5m")
        try:
            session.commit()
        finally:
            session.rollback()


def emitting(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Order(total=1).place())
        try:
            session.commit()
        finally:
            session.rollback()


def declaring(engine: Engine) -> None:
    with engine.begin() as connection:
        declare(connection, [Paid], registry=MemoryRegistry())


WAYS: list[Callable[[Engine], None]] = [publishing, delaying, emitting, declaring]


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/empty.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("database_url")
    engine = create_engine(url)
    Base.metadata.tables["orders"].create(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("way", WAYS)
def test_missing_tables_are_named_with_what_to_do(empty: Engine, way: Callable[[Engine], None]) -> None:
    with pytest.raises(ConfigurationError, match="outboxkit init"):
        way(empty)


@pytest.mark.parametrize("way", WAYS)
def test_tables_that_vanish_while_the_process_runs_are_named_too(empty: Engine, way: Callable[[Engine], None]) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
    way(empty)
    tables.METADATA.drop_all(empty)

    with pytest.raises(ConfigurationError, match="outboxkit init"):
        way(empty)


@pytest.mark.parametrize("way", WAYS)
def test_a_suite_that_empties_every_table_between_its_tests_goes_on_working(
    empty: Engine, way: Callable[[Engine], None]
) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
    way(empty)
    with empty.begin() as connection:
        for table in reversed(tables.METADATA.sorted_tables):
            connection.execute(table.delete())

    way(empty)


def test_one_class_instead_of_several_is_refused(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/any.db")

    with engine.connect() as connection, pytest.raises(ConfigurationError, match="collection of event classes"):
        declare(connection, Paid, registry=MemoryRegistry())  # type: ignore[arg-type]
    engine.dispose()
