"""Tables that are missing, or empty, are told as that, whatever asks for them first."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import (
    ConfigurationError,
    Consumer,
    Message,
    OutboxKitError,
    dead_letters,
    event,
    inbox,
    migrations,
    outbox,
    publish,
    saga,
    tables,
)
from outboxkit.capture.declare import declare
from outboxkit.dead_letters import plan
from outboxkit.idempotency import idempotent
from outboxkit.outbox import pauses
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


LETTER = uuid.uuid4()
MESSAGE = Message(id=str(LETTER), type="paid", topic="t", payload=b"{}")
EVERY = dead_letters.Filter()
TARGET = pauses.Target(pauses.Scope.DESTINATION, "t")


def claiming(session: Session) -> None:
    with inbox.claim(session, message_id="1", consumer="billing"):
        pass


def calling(session: Session) -> None:
    with idempotent(session, "key", scope="POST /orders"):
        pass


#: what applications and operators' programs call beside the verbs above: each with a session's or a connection's
SESSION_VERBS: dict[str, Callable[[Session], object]] = {
    "inbox.admit": lambda session: inbox.admit(session, "billing", MESSAGE),
    "inbox.claim": claiming,
    "idempotent": calling,
    "saga.resume": lambda session: saga.resume(session, "checkout", "1", by="me"),
    "saga.compensate": lambda session: saga.compensate(session, "checkout", "1", by="me"),
}
VERBS: dict[str, Callable[[Connection], object]] = {
    "dead_letters.find": lambda connection: dead_letters.find(connection, EVERY),
    "dead_letters.count": lambda connection: dead_letters.count(connection, EVERY),
    "dead_letters.get": lambda connection: dead_letters.get(connection, LETTER),
    "dead_letters.groups": lambda connection: dead_letters.groups(connection, EVERY),
    "dead_letters.annotate": lambda connection: dead_letters.annotate(connection, "g", by="me", note="n"),
    "dead_letters.replay": lambda connection: dead_letters.replay(connection, [LETTER], by="me", why="w"),
    "dead_letters.repair_and_replay": lambda connection: dead_letters.repair_and_replay(
        connection, {LETTER: b""}, dead_letters.Terms(), by="me", why="w"
    ),
    "dead_letters.discard": lambda connection: dead_letters.discard(connection, [LETTER], by="me", why="w"),
    "plan.draft": lambda connection: plan.draft(connection, EVERY, dead_letters.Terms()),
    "plan.replays": plan.replays,
    "plan.items": lambda connection: plan.items(connection, LETTER),
    "plan.health": lambda connection: plan.health(connection, LETTER),
    "plan.stop": lambda connection: plan.stop(connection, LETTER, by="me", why="w"),
    "plan.resume": lambda connection: plan.resume(connection, LETTER, by="me", why="w"),
    "pauses.pause": lambda connection: pauses.pause(connection, TARGET, by="me", reason="r"),
    "pauses.resume": lambda connection: pauses.resume(connection, TARGET, by="me"),
    "pauses.pauses": pauses.pauses,
    "outbox.lag": outbox.lag,
    "outbox.cancel": lambda connection: outbox.cancel(connection, "1"),
    "outbox.is_scheduled": lambda connection: outbox.is_scheduled(connection, "1"),
    "outbox.write": lambda connection: outbox.write(connection, [MESSAGE]),
    "saga.find": saga.find,
    "saga.count": saga.count,
    "saga.get": lambda connection: saga.get(connection, "checkout", "1"),
}


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


def refusal(verb: Callable[[], object]) -> str:
    try:
        verb()
    except (OutboxKitError, SQLAlchemyError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_every_verb_names_missing_tables(empty: Engine) -> None:
    found: dict[str, str] = {}
    for name, verb in SESSION_VERBS.items():
        with Session(empty) as session:
            found[name] = refusal(lambda: verb(session))  # noqa: B023  called at once
    for name, ask in VERBS.items():
        with empty.connect() as connection:
            found[name] = refusal(lambda: ask(connection))  # noqa: B023  likewise

    assert {name: text for name, text in found.items() if text != f"ConfigurationError: {tables.MISSING}"} == {}


async def test_a_consumer_that_starts_without_tables_names_them(empty: Engine) -> None:
    billing = Consumer("billing", sessions=sessionmaker(empty))
    billing.on("paid", topic="t")(lambda _message: None)

    with pytest.raises(ConfigurationError, match="outboxkit init"):
        await billing.run("memory://missing-tables")


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
