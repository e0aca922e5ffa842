"""Rows that the driver cannot read, for their bytes are no text: every good one goes out, a bad one is a letter."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, func, make_url, select, text

from outboxkit import tables
from outboxkit.policy import Followers, RetryPolicy, full_jitter
from outboxkit_relay.core.state import RelayConfig
from tests import servers
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write
from tests.servers.postgres import connect, drop_database

QUICK = RelayConfig(retry=RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1), followers=Followers.SKIP))
HOT, WAITING, LETTERS = tables.outbox_messages, tables.outbox_waiting, tables.dead_letters


@pytest.fixture
def engine(postgres: servers.Server) -> Iterator[Engine]:
    """A database that keeps any bytes as text; a file does, too, but there the driver is told to read them anyway."""
    name = f"test_{uuid4().hex[:12]}"
    with connect(postgres.url) as connection:
        create = "CREATE DATABASE {} TEMPLATE template0 ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.execute(sql.SQL(create).format(sql.Identifier(name)))
    url = make_url(postgres.url).set(database=name).render_as_string(hide_password=False)
    made = engine_for(url)
    yield made
    made.dispose()
    drop_database(url)


def spoil(engine: Engine, table: str, column: str, number: int) -> None:
    """Makes the text of one row's column bytes that are no text, as a program of another encoding does."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, client_encoding="SQL_ASCII", autocommit=True) as connection:
        to = sql.SQL("UPDATE {} SET {} = {} || chr(255) WHERE payload = %s")
        connection.execute(to.format(*map(sql.Identifier, (table, column, column))), (b"%d" % number,))


@pytest.mark.parametrize("column", ["topic", "type"])
def test_a_row_that_cannot_be_read_is_a_letter_and_every_good_one_goes_out(engine: Engine, column: str) -> None:
    write(engine, *(message(number, key=f"k{number % 3}") for number in range(30)))
    bad = (0, 11, 12, 29)
    for number in bad:
        spoil(engine, "outbox_messages", column, number)
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, QUICK):
        until(lambda: count(engine, LETTERS) == len(bad))
        until(lambda: count(engine, HOT) == count(engine, WAITING) == 0)  # followers go out, too

    sent = [int(row.payload) for row in publisher.accepted]
    assert sorted(sent) == [number for number in range(30) if number not in bad]
    assert all([n for n in sent if n % 3 == key] == sorted(n for n in sent if n % 3 == key) for key in range(3))
    with engine.connect() as connection:
        found = connection.execute(
            select(LETTERS.c.payload, LETTERS.c.failure, LETTERS.c.error, LETTERS.c[column])
        ).all()
    assert sorted(int(row.payload) for row in found) == list(bad)
    assert all(row.failure == "invalid" and column in row.error and "\\xff" in row[3] for row in found), found


def test_a_waiting_row_that_cannot_be_read_is_a_letter_too(engine: Engine) -> None:
    write(engine, *(message(number, key=None) for number in range(4)))
    with engine.begin() as connection:
        columns = [column.name for column in WAITING.c if column.name in HOT.c and column.name != "position"]
        chosen = select(*(HOT.c[name] for name in columns), HOT.c.position, text("'retry'"), func.current_timestamp())
        connection.execute(WAITING.insert().from_select([*columns, "position", "reason", "due_at"], chosen))
        connection.execute(HOT.delete())
    spoil(engine, "outbox_waiting", "type", 2)
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, QUICK):
        until(lambda: count(engine, LETTERS) == 1)
        until(lambda: count(engine, WAITING) == 0)

    assert sorted(int(row.payload) for row in publisher.accepted) == [0, 1, 3]
