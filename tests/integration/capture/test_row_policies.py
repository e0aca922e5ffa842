"""Row-level security: applications record no readers; consumers that do not trust each other see their own rows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, Table, func, insert, select, update
from sqlalchemy.exc import ProgrammingError

from outboxkit import tables
from outboxkit.dead_letters import Terms, repair_and_replay
from outboxkit.headers import LETTER, REPLAY_FOR
from outboxkit.migrations.roles import create_roles
from outboxkit.migrations.row_policies import separate_consumers
from tests.consumer_fixture import ConsumerFixture, consumer, handles, letters, order
from tests.database_roles import drop_roles

NOW = datetime(2026, 11, 30, tzinfo=UTC)
ROWS: dict[str, dict[str, Any]] = {
    "inbox_messages": {"message_id": "1"},
    "inbox_waiting": {"topic": "t", "headers": b"", "origin": "", "partition": 0, "offset": 0, "reason": "retry"},
    "inbox_batches": {"id": uuid4, "host": "h", "expires_at": NOW, "messages": []},
    "inbox_suspects": {"identity": "i", "deaths": 1},
    "inbox_consumers": {"id": uuid4, "host": "h", "expires_at": NOW},
    "dead_letters": {
        "id": uuid4, "side": "consumer", "topic": "t", "message_id": "1", "type": "t", "kind": "event", "headers": b"",
        "failure": "poison", "stage": "decode", "error_class": "E", "error": "", "attempts": 1, "group": "g",
    },
    "outbox_schemas": {"fingerprint": "f", "role": "reader", "type": "t", "text": "{}"},
}  # fmt: skip
BY_CONSUMER = [table for table in tables.METADATA.sorted_tables if "consumer" in table.c]


@pytest.fixture
def roles(postgres_engine: Engine) -> Iterator[str]:
    prefix = f"{postgres_engine.url.database}_"
    logins = ("billing", "shipping", "stranger")
    with postgres_engine.begin() as connection:
        create_roles(connection, prefix)
        for login in logins:
            connection.exec_driver_sql(f"CREATE ROLE {prefix}{login} IN ROLE {prefix}consumer")
        separate_consumers(connection, {f"{prefix}{login}": [login] for login in ("billing", "shipping")}, prefix)
        create_roles(connection, prefix)  # again: it keeps the separation
    yield prefix
    with postgres_engine.begin() as connection:
        drop_roles(connection, prefix, *logins)


def row(table: Table, consumer: str) -> dict[str, Any]:
    return {name: value() if value is uuid4 else value for name, value in ROWS[table.name].items()} | {
        "consumer": consumer
    }


def refused(connection: Connection, statement: Any) -> bool:
    savepoint = connection.begin_nested()
    try:
        connection.execute(statement)
    except ProgrammingError as error:
        return "row-level security" in str(error)
    finally:
        savepoint.rollback()
    return False


@pytest.mark.parametrize("login", ["billing", "stranger"])
def test_a_consumer_sees_and_writes_rows_of_its_own_only(postgres_engine: Engine, roles: str, login: str) -> None:
    assert {table.name for table in BY_CONSUMER} == set(ROWS)
    with postgres_engine.begin() as connection:
        for table in BY_CONSUMER:
            connection.execute(insert(table), [row(table, "billing"), row(table, "shipping")])

    with postgres_engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}{login}")
        for table in BY_CONSUMER:
            seen = list(connection.scalars(select(table.c.consumer)))
            assert seen == (["billing"] if login == "billing" else []), table.name
            assert refused(connection, insert(table).values(row(table, "shipping"))), table.name
            if table.name not in ("dead_letters", "outbox_schemas"):
                changed = connection.execute(update(table).values(consumer=table.c.consumer)).rowcount
                assert changed == len(seen), table.name
            if table.name != "dead_letters":
                assert connection.execute(table.delete()).rowcount == len(seen), table.name

    with postgres_engine.begin() as connection:
        for table in BY_CONSUMER:
            assert "shipping" in set(connection.scalars(select(table.c.consumer)))


def test_a_row_cannot_be_given_away(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}billing")
        connection.execute(insert(tables.inbox_messages).values(row(tables.inbox_messages, "billing")))
        assert refused(connection, update(tables.inbox_messages).values(consumer="shipping"))


@pytest.mark.parametrize("role", ["relay", "repairer"])
def test_who_serves_all_consumers_sees_all_letters(postgres_engine: Engine, roles: str, role: str) -> None:
    letters = tables.dead_letters
    with postgres_engine.begin() as connection:
        connection.execute(insert(letters), [row(letters, name) for name in ("billing", "shipping", "")])
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}{role}")
        assert connection.scalar(select(func.count()).select_from(letters)) == 3
        connection.execute(insert(letters).values(row(letters, "")))


def test_without_logins_the_separation_is_taken_back(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.begin() as connection:
        separate_consumers(connection, {}, roles)
        connection.execute(insert(tables.inbox_messages).values(row(tables.inbox_messages, "shipping")))
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}stranger")
        assert list(connection.scalars(select(tables.inbox_messages.c.consumer))) == ["shipping"]


def test_an_application_records_writers_and_no_reader(postgres_engine: Engine, roles: str) -> None:
    schemas = tables.outbox_schemas
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}app")
        assert refused(connection, insert(schemas).values(row(schemas, "billing")))
        connection.execute(insert(schemas).values(row(schemas, "") | {"role": "writer"}))
        assert list(connection.scalars(select(schemas.c.role))) == ["writer"]


@pytest.fixture
async def owner(postgres_engine: Engine, roles: str) -> AsyncIterator[ConsumerFixture]:
    """The world as the owner of the tables sees it, with tables of the application."""
    owner = ConsumerFixture(postgres_engine.url.render_as_string(hide_password=False))
    with owner.engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT ALL ON effects, effects_id_seq TO {roles}consumer")
    yield owner
    await owner.close()


@pytest.fixture
async def logins(owner: ConsumerFixture, roles: str) -> AsyncIterator[dict[str, ConsumerFixture]]:
    """The same world, as each login sees it."""
    worlds = {}
    for name in ("billing", "shipping"):
        url = owner.engine.url.update_query_dict({"options": f"-crole={roles}{name}"})
        worlds[name] = ConsumerFixture(url.render_as_string(hide_password=False), has_tables=True)
        worlds[name].exchange_name = owner.exchange_name
    yield worlds
    for world in worlds.values():
        await world.close()


async def test_a_consumer_works_as_a_login_of_its_own(
    owner: ConsumerFixture, logins: dict[str, ConsumerFixture]
) -> None:
    world = logins["billing"]
    billing, tries = consumer(world), list[int]()

    def fails(number: int, ctx: Any) -> None:
        tries.append(number)
        if number == 3 or (number == 2 and tries.count(2) == 1):
            raise KeyError

    handles(billing, fails)
    world.send(order(1, key="a"), order(2, key="b"), order(3, key="c"))
    await world.run(billing)

    assert sorted(world.effects()) == [1, 2]
    (letter,) = letters(owner)
    assert (letter.consumer, letter.key) == ("billing", b"c")


@pytest.mark.parametrize("receiver", ["billing", "shipping"])
async def test_a_replay_has_one_receiver_although_the_other_does_not_see_the_letter(
    owner: ConsumerFixture, logins: dict[str, ConsumerFixture], receiver: str
) -> None:
    consumers = {name: consumer(world, name) for name, world in logins.items()}
    calls = {
        "billing": handles(consumers["billing"], lambda number, ctx: ctx.dead_letter("no") if number == 13 else None),
        "shipping": handles(consumers["shipping"]),
    }
    owner.send(order(13))
    for name, world in logins.items():
        await world.run(consumers[name])
    (letter,) = letters(owner)

    with owner.engine.begin() as connection:
        terms = Terms(to=None if receiver == "billing" else receiver)
        repair_and_replay(connection, {letter.id: b'{"number": 14}'}, terms, by="ops", why="repaired")
    assert owner.relay() == 1
    for name, world in logins.items():
        await world.run(consumers[name])

    got = {name: [number for number, _ in made] for name, made in calls.items()}
    assert got == {"billing": [13], "shipping": [13]} | {receiver: [13, 14]}
    assert consumers["billing" if receiver == "shipping" else "shipping"].counts["ignored"] == 1


@pytest.mark.parametrize("claim", ["no letter", "other content", "other receiver", "no name"])
async def test_a_forged_replay_commands_nothing_where_the_letter_is_hidden(
    owner: ConsumerFixture, logins: dict[str, ConsumerFixture], claim: str
) -> None:
    with owner.engine.begin() as connection:
        letter = row(tables.dead_letters, "billing") | {"topic": "orders", "payload": b'{"number": 1}'}
        connection.execute(insert(tables.dead_letters).values(letter | {"state": "replaying"}))
    named = str(uuid4() if claim == "no letter" else letter["id"]).encode()
    receiver = {"other receiver": b"returns", "no name": b"billing\0"}.get(claim, b"billing")
    world = logins["shipping"]
    shipping = consumer(world, "shipping")
    handles(shipping)

    owner.send(order(2 if claim == "other content" else 1, headers=((REPLAY_FOR, receiver), (LETTER, named))))
    await world.run(shipping)

    assert owner.effects() == [2 if claim == "other content" else 1]
