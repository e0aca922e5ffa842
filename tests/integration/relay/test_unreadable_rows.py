"""Rows that the driver cannot read, for their bytes are no text: every good one goes out, a bad one is a letter."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import Engine, Table, func, make_url, select, text

from outboxkit import tables
from outboxkit.policy import Followers, RetryPolicy, full_jitter
from outboxkit_relay import Relay, settings
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.dashboard import reading
from outboxkit_relay.dashboard.search import Search
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.diagnose.contradictions import contradictions
from outboxkit_relay.diagnose.trace import trace
from outboxkit_relay.observe import situation
from outboxkit_relay.store import unpublished
from tests import servers
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write
from tests.servers.postgres import connect, drop_database

QUICK = RelayConfig(retry=RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1), followers=Followers.SKIP))
HOT, WAITING, LETTERS = tables.outbox_messages, tables.outbox_waiting, tables.dead_letters


@pytest.fixture(params=["postgresql", "sqlite"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database that keeps any bytes as text, as every file does."""
    if request.param == "sqlite":
        made = engine_for(f"sqlite:///{tmp_path / 'any.db'}")
        yield made
        made.dispose()
        return
    postgres: servers.Server = request.getfixturevalue("postgres")
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
    if engine.dialect.name == "sqlite":
        with engine.begin() as connection:
            spoiled = (
                f"UPDATE {table} SET {column} = CAST({column} AS TEXT) || CAST(x'FF' AS TEXT) WHERE payload = :payload"
            )
            connection.execute(text(spoiled), {"payload": b"%d" % number})
        return
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url, client_encoding="SQL_ASCII", autocommit=True) as connection:
        to = sql.SQL("UPDATE {} SET {} = {} || chr(255) WHERE payload = %s")
        connection.execute(to.format(*map(sql.Identifier, (table, column, column))), (b"%d" % number,))


def _let_wait(engine: Engine) -> None:
    """Moves all rows to the waiting room, due now."""
    with engine.begin() as connection:
        columns = [column.name for column in WAITING.c if column.name in HOT.c and column.name != "position"]
        chosen = select(*(HOT.c[name] for name in columns), HOT.c.position, text("'retry'"), func.current_timestamp())
        connection.execute(WAITING.insert().from_select([*columns, "position", "reason", "due_at"], chosen))
        connection.execute(HOT.delete())


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


@pytest.mark.parametrize("column", ["topic", "type"])
def test_whoever_looks_sees_the_good_rows_and_where_the_bad_ones_stand(engine: Engine, column: str) -> None:
    """The command line and the page ask by these."""
    write(engine, *(message(number, key="k") for number in range(3)))
    spoil(engine, "outbox_messages", column, 1)

    with engine.connect() as connection:
        good = [str(one) for one in connection.scalars(select(HOT.c.message_id).where(HOT.c.payload != b"1"))]
        bad = str(connection.scalar(select(HOT.c.message_id).where(HOT.c.payload == b"1")))
        listed = reading.find(connection, Search(), limit=9).rows
        found = unpublished.find(connection, ids=[*good, bad], rest=timedelta(0), limit=9)
        topics = situation.look(connection, timedelta(seconds=30)).topics
        messages = trace(connection, "k").messages
        places = find_message.find(connection, bad)
        assert contradictions(connection) == []

    told = f"position 2 of outbox_messages: {column} is no text"
    assert {one.id: one.error for one in listed} == {**dict.fromkeys(good, ""), bad: told}
    assert {str(one.id): one.refusal for one in found} == {
        **dict.fromkeys(good, ""),
        bad: f"{told}; a relay makes it a dead letter",
    }
    assert sum(one.pending for one in topics) == 3
    assert {one.id for one in messages} == {*good, bad}
    assert "\\xff" in str(places[0][column])
    with engine.begin() as connection:
        moved = unpublished.redirect(connection, [UUID(one) for one in good], "mails", by="ana", why="x")
        given_up = unpublished.discard(connection, [UUID(one) for one in good], by="ana", why="x")
    assert [str(one) for one in (*sorted(moved), *sorted(given_up))] == sorted(good) * 2


def test_a_relay_starts_where_a_destination_is_no_text(engine: Engine, tmp_path: Path) -> None:
    write(engine, message(1, key="a"), message(2, key="b"))
    spoil(engine, "outbox_messages", "topic", 1)
    file = tmp_path / "outboxkit.toml"
    url = engine.url.render_as_string(hide_password=False)
    file.write_text(f'database_url = "{url}"\nbroker_url = "memory://{uuid4().hex}"\n')

    with Relay(settings.load(file)):
        until(lambda: count(engine, HOT) == 0)

    assert count(engine, LETTERS) == 1


def test_a_waiting_row_that_cannot_be_read_is_a_letter_too(engine: Engine) -> None:
    write(engine, *(message(number, key=None) for number in range(4)))
    _let_wait(engine)
    spoil(engine, "outbox_waiting", "type", 2)
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, QUICK):
        until(lambda: count(engine, LETTERS) == 1)
        until(lambda: count(engine, WAITING) == 0)

    assert sorted(int(row.payload) for row in publisher.accepted) == [0, 1, 3]


@pytest.mark.parametrize("table", [HOT, WAITING], ids=lambda table: str(table.name))
def test_bytes_that_a_file_keeps_as_text_go_out_as_they_are_or_not_at_all(tmp_path: Path, table: Table) -> None:
    engine = engine_for(f"sqlite:///{tmp_path / 'any.db'}")
    write(engine, *(message(number, key=None) for number in range(3)))
    if table is WAITING:
        _let_wait(engine)
    with engine.begin() as connection:
        for number, stored in ((1, "e9"), (2, "c3a9")):  # an accented letter in two encodings
            changed = f"UPDATE {table.name} SET payload = CAST(x'{stored}' AS TEXT) WHERE payload = :payload"
            connection.execute(text(changed), {"payload": b"%d" % number})
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, QUICK):
        until(lambda: count(engine, HOT) == count(engine, WAITING) == 0)

    assert sorted(row.payload for row in publisher.accepted) == [b"0", b"\xc3\xa9"]
    with engine.connect() as connection:
        assert [bytes(found) for found in connection.scalars(select(LETTERS.c.payload))] == [b"\xe9"]
    engine.dispose()
