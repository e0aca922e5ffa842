"""Row-level security: applications record no readers; consumers that do not trust each other see their own rows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, Table, func, insert, select, update
from sqlalchemy.exc import ProgrammingError

from outboxkit import tables
from outboxkit.dead_letters import Filter, find
from outboxkit.migrations.roles import GRANTS, create_roles
from outboxkit.migrations.row_policies import separate_consumers
from tests.consumer_fixture import ConsumerFixture, consumer, handles, order

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
        for role in (*GRANTS, "migrator", *logins):
            for statement in ("REASSIGN OWNED BY {} TO CURRENT_USER", "DROP OWNED BY {}", "DROP ROLE {}"):
                connection.exec_driver_sql(statement.format(prefix + role))


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


async def test_a_consumer_works_as_a_login_of_its_own(postgres_engine: Engine, roles: str) -> None:
    url = postgres_engine.url.update_query_dict({"options": f"-crole={roles}billing"})
    owner = ConsumerFixture(postgres_engine.url.render_as_string(hide_password=False))  # makes the application's tables
    with owner.engine.begin() as connection:
        connection.exec_driver_sql(f"GRANT ALL ON effects, effects_id_seq TO {roles}consumer")
    world = ConsumerFixture(url.render_as_string(hide_password=False), has_tables=True)
    billing, tries = consumer(world), list[int]()

    def fails(number: int, ctx: Any) -> None:
        tries.append(number)
        if number == 3 or (number == 2 and tries.count(2) == 1):
            raise KeyError

    handles(billing, fails)
    world.send(order(1, key="a"), order(2, key="b"), order(3, key="c"))
    await world.run(billing)

    assert sorted(world.effects()) == [1, 2]
    with owner.engine.connect() as connection:
        (letter,) = find(connection, Filter())
    assert (letter.consumer, letter.key) == ("billing", b"c")
    await world.close()
    await owner.close()
