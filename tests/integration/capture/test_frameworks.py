"""Edge E29: tenants' schemas, and the frameworks that bring their own sessions and base classes, work unchanged."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, func, select, text
from sqlalchemy.orm import Session

from outboxkit import Outbox, OutboxMixin, event, migrations, publish, tables
from tests.integration.capture.model import Noted
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


def test_a_schema_translate_map_moves_the_outbox_with_the_domain(postgres_world: CaptureDatabase) -> None:
    tenants = MetaData()
    orders = Table("tenant_orders", tenants, Column("id", Integer, primary_key=True))
    with postgres_world.observer.begin() as connection:
        connection.execute(text("CREATE SCHEMA IF NOT EXISTS tenant"))
        inside = connection.execution_options(schema_translate_map={None: "tenant"})
        tables.METADATA.create_all(inside)
        tenants.create_all(inside)
        if inside.scalar(select(func.count()).select_from(tables.outbox_version)) == 0:
            inside.execute(tables.outbox_version.insert().values(id=1, version=tables.VERSION, shards=64))

    def scenario(session: Session) -> None:
        session.connection(execution_options={"schema_translate_map": {None: "tenant"}})
        session.execute(orders.insert())
        publish(session, Noted("in the tenant"), topic="notes")
        session.commit()

    postgres_world.run(scenario)

    assert postgres_world.rows() == []
    assert postgres_world.scalar("SELECT count(*) FROM tenant.outbox_messages") == 1
    with postgres_world.observer.begin() as connection:
        connection.execute(text("DROP SCHEMA tenant CASCADE"))


@event("thing.done")
@dataclass(frozen=True)
class Done:
    number: int


@pytest.fixture
def memory() -> Any:
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        migrations.upgrade(connection)
    yield engine
    engine.dispose()


def payloads(engine: Engine) -> list[Any]:
    with engine.connect() as connection:
        return [json.loads(payload) for payload in connection.scalars(select(tables.outbox_messages.c.payload))]


def test_sqlmodel(memory: Engine) -> None:
    sqlmodel = importlib.import_module("sqlmodel")

    class Hero(OutboxMixin, sqlmodel.SQLModel, table=True):  # type: ignore[misc,name-defined,call-arg]
        __outbox__ = Outbox(topic="heroes", key="id")
        id: int | None = sqlmodel.Field(default=None, primary_key=True)

    sqlmodel.SQLModel.metadata.create_all(memory)
    with sqlmodel.Session(memory) as session:
        hero = Hero()
        hero.emit(lambda: Done(hero.id or 0))
        session.add(hero)
        session.commit()

    assert payloads(memory) == [{"number": 1}]


def test_flask_sqlalchemy() -> None:
    flask, extension = importlib.import_module("flask"), importlib.import_module("flask_sqlalchemy")
    app = flask.Flask("shop")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    db = extension.SQLAlchemy()
    db.init_app(app)

    class Item(OutboxMixin, db.Model):  # type: ignore[misc,name-defined]
        __outbox__ = Outbox(topic="items", key="id")
        id = db.Column(db.Integer, primary_key=True)

    with app.app_context():
        tables.outbox_tables(db.metadata)
        db.create_all()
        with db.engine.begin() as connection:
            migrations.upgrade(connection)
        item = Item()
        db.session.add(item)
        item.emit(lambda: Done(item.id))
        publish(db.session, Done(2), topic="items")
        db.session.commit()

        assert payloads(db.engine) == [{"number": 1}, {"number": 2}]
        db.session.remove()
        db.engine.dispose()


@pytest.mark.filterwarnings("ignore:The declarative_mixin decorator")  # of theirs, at import
def test_advanced_alchemy(memory: Engine) -> None:
    base = importlib.import_module("advanced_alchemy.base")
    repository = importlib.import_module("advanced_alchemy.repository")

    class Book(OutboxMixin, base.BigIntBase):  # type: ignore[misc,name-defined]
        __outbox__ = Outbox(topic="books", key="id")

    class Books(repository.SQLAlchemySyncRepository[Book]):  # type: ignore[misc,name-defined]
        model_type = Book

    Book.metadata.create_all(memory)
    with Session(memory) as session:
        book = Books(session=session).add(Book())
        book.emit(lambda: Done(book.id))
        session.commit()

    assert payloads(memory) == [{"number": 1}]


def test_clear_mappers_of_a_test_suite_does_not_break_capture() -> None:
    script = """
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, clear_mappers
from outboxkit import migrations, publish
clear_mappers()
engine = create_engine("sqlite://")
with engine.begin() as connection:
    migrations.upgrade(connection)
with Session(engine) as session:
    publish(session, {}, type="a", topic="t")
    session.commit()
    print(session.scalar(text("SELECT count(*) FROM outbox_messages")))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "1\n"
