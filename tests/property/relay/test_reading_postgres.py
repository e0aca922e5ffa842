"""Reading by snapshot rounds against real transactions: what a trivial full scan finds, once each, in order.

A seed decides the interleaving of writers (savepoints, rollbacks, prepared transactions), of rows that are copied in
with transaction ids of another cluster, of pages in several lanes, and of settling. A foreign transaction stays open.
What was committed stands in a table of the same database, so that a crash loses both or neither.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, insert, text
from sqlalchemy.exc import DBAPIError

from outboxkit import migrations, outbox, tables
from outboxkit._sql import database_now
from outboxkit.dialects import open_engine
from outboxkit.message import Message
from outboxkit.rows import Evidence, Reading, Row
from outboxkit_relay.core.lanes import MAIN, Lanes
from tests import servers
from tests.conftest import PROFILE

SHARDS = frozenset(range(tables.SHARDS))
KEYS = ("k0", "k1")
TOPICS = ("a", "b")
HIGH, LOW = 1 << 40, 3  # transaction ids that this cluster will not reach, and has long behind it
STEPS = 250


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = open_engine(database_url, patience=timedelta(seconds=5))
    prepare(found)
    yield found
    found.dispose()


def prepare(engine: Engine) -> None:
    with engine.begin() as connection:
        migrations.upgrade(connection)
        connection.execute(text("CREATE TABLE aggregates (key text PRIMARY KEY, changes int DEFAULT 0)"))
        connection.execute(text("CREATE TABLE truth (message_id uuid PRIMARY KEY)"))
        connection.execute(text("INSERT INTO aggregates VALUES (:key)"), [{"key": key} for key in KEYS])
        relay = {"id": UUID(int=1), "host": "here", "version": "1"}
        expires_at = database_now(timedelta(hours=1))
        connection.execute(insert(tables.outbox_relays).values(expires_at=expires_at, **relay))


class Writer:
    """One connection with at most one transaction; it commits without waiting for the disk."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.connection, self.rng = engine.connect(), rng
        self.transaction: Any = None
        self.is_prepared = False

    def step(self) -> None:
        rng, connection = self.rng, self.connection
        if self.transaction is None:
            self.transaction = connection.begin_twophase() if rng.random() < 0.2 else connection.begin()
            connection.execute(text("SET LOCAL synchronous_commit = off"))
            return
        chance = rng.random()
        if self.is_prepared or chance < 0.3:
            self.end()
        elif chance < 0.45:
            with connection.begin_nested() as savepoint:
                self.write(None)
                savepoint.rollback()
        else:
            key = rng.choice((*KEYS, None))
            if key is None or self.locks(key):
                self.write(key)

    def locks(self, key: str) -> bool:
        lock = text("SELECT 1 FROM aggregates WHERE key = :key FOR UPDATE SKIP LOCKED")
        return self.connection.execute(lock, {"key": key}).one_or_none() is not None

    def write(self, key: str | None) -> None:
        messages = [new_message(self.rng.choice(TOPICS), key) for _ in range(self.rng.randint(1, 3))]
        outbox.write(self.connection, messages)
        remember(self.connection, messages)

    def end(self) -> None:
        transaction = self.transaction
        if not self.is_prepared and hasattr(transaction, "prepare") and self.rng.random() < 0.8:
            transaction.prepare()
            self.is_prepared = True
            return
        if self.rng.random() < 0.7:
            transaction.commit()
        else:
            transaction.rollback()
        self.transaction, self.is_prepared = None, False


def new_message(topic: str, key: str | None) -> Message:
    encoded = None if key is None else key.encode()
    now = datetime.now(UTC)
    return Message(id=str(uuid4()), type="t", topic=topic, payload=b"", key=encoded, occurred_at=now)


def remember(connection: Connection, messages: list[Message]) -> None:
    rows = [{"id": UUID(message.id)} for message in messages]
    connection.execute(text("INSERT INTO truth VALUES (:id)"), rows)


def copy_in(engine: Engine, xid: int) -> None:
    """A row as a restore of another cluster's dump leaves it."""
    message = new_message("a", None)
    with engine.begin() as connection:
        outbox.write(connection, [message])
        moved = text("UPDATE outbox_messages SET xid = CAST(CAST(:xid AS text) AS xid8) WHERE message_id = :id")
        connection.execute(moved, {"xid": xid, "id": UUID(message.id)})
        remember(connection, [message])


class Reader:
    """What the relay's core does with pages: lanes, what is in hand, and removal when it is settled."""

    def __init__(self, engine: Engine, rng: random.Random) -> None:
        self.engine, self.rng = engine, rng
        self.delivered: list[Row] = []
        self.start()

    def start(self) -> None:
        self.connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.lanes = Lanes(SHARDS)
        self.in_hand: dict[int, Row] = {}

    def step(self) -> None:
        chance = self.rng.random()
        own = [topic for topic, lane in self.lanes.topics.items() if lane is not None and not lane.is_through]
        if chance < 0.1:
            self.lanes.stop_reading("a")
            self.settle()  # what was read of it is gone before it is scanned again
        elif chance < 0.2:
            self.lanes.separate(self.rng.choice(TOPICS))
        elif chance < 0.3:
            self.settle()
        else:
            self.resume_reading()
            self.read(self.rng.choice([*own, MAIN]))

    def resume_reading(self) -> None:
        for topic in list(self.lanes.topics):
            self.lanes.resume_reading(topic)

    def read(self, name: str, limit: int = 0) -> int:
        limit = limit or self.rng.choice((1, 3, 50))
        page = outbox.read(self.connection, self.lanes.reading(name, limit))
        self.lanes.advance(name, page, limit)
        return self.take([row for row in page.rows if self.lanes.reads(row.topic)])

    def take(self, rows: list[Row]) -> int:
        fresh = [row for row in rows if row.position not in self.in_hand]
        if fresh:
            with self.engine.connect() as connection:
                outbox.confirm_lease(connection, UUID(int=1))
        self.delivered += fresh
        self.in_hand.update((row.position, row) for row in fresh)
        return len(fresh)

    def settle(self) -> None:
        with self.engine.begin() as connection:
            outbox.remove(connection, UUID(int=1), [self._evidence()])
        self.in_hand.clear()

    def _evidence(self) -> Evidence:
        rows = list(self.in_hand.values())
        nowhere = [-1] * len(rows)
        return Evidence(topic="t", outcome="published", rows=rows, partitions=nowhere, offsets=nowhere)

    def finish(self) -> None:
        """Every lane comes home; then the watchdog looks for what no snapshot could show."""
        self.resume_reading()
        for _ in range(2):
            for topic, lane in list(self.lanes.topics.items()):
                while lane is not None and not lane.is_through:
                    self.read(topic, 100)
                    lane = self.lanes.topics[topic]  # noqa: PLW2901  it goes on from page to page
            for _ in range(4):
                self.read(MAIN, 100)
        assert not self.lanes.topics, "all topics are back in the main lane"
        self.settle()
        memory = self.lanes.memory(100)
        self.rescued = outbox.read(
            self.connection, Reading(shards=memory.shards, parts=memory.parts, limit=memory.limit, missed=True)
        ).rows


class Run:
    """Writers, a reader and a foreign transaction under one seed."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)
        self.reader = Reader(engine, self.rng)
        self.copied_low = 0
        self.connect()

    def connect(self) -> None:
        self.writers = [Writer(self.engine, self.rng) for _ in range(4)]
        self.foreign = self.engine.connect()
        self.foreign.execute(text("SET idle_in_transaction_session_timeout = 0"))
        self.foreign.execute(text("SELECT pg_current_xact_id()"))

    def steps(self, count: int) -> None:
        for _ in range(count):
            chance = self.rng.random()
            if chance < 0.02:
                copy_in(self.engine, HIGH)
            elif chance < 0.03:
                copy_in(self.engine, LOW)
                self.copied_low += 1
            elif chance < 0.6:
                self.rng.choice(self.writers).step()
            else:
                self.reader.step()

    def crash(self, bring_down: Any) -> None:
        """The server goes down with rolled-back transaction ids just behind it, and everyone comes again."""
        self.reader.settle()
        for writer in self.writers:
            if writer.transaction is not None and not writer.is_prepared:
                writer.transaction.rollback()
                writer.transaction = None
        while self.reader.read(MAIN, 100):
            pass
        self.reader.settle()
        bring_down()
        with ExitStack() as stack:
            for connection in (self.foreign, self.reader.connection, *(writer.connection for writer in self.writers)):
                stack.callback(_forget, connection)
        self.engine.dispose()
        end_prepared(self.engine)
        self.reader.start()
        self.connect()

    def end(self) -> None:
        for writer in self.writers:
            while writer.transaction is not None:
                writer.end()
            writer.connection.close()
        self.reader.finish()
        for connection in (self.foreign, self.reader.connection):
            connection.close()

    def verdict(self) -> None:
        with self.engine.connect() as connection:
            committed = set(connection.execute(text("SELECT message_id FROM truth")).scalars())
        delivered = [row.id for row in self.reader.delivered]
        rescued = [row.id for row in self.reader.rescued]
        assert len(set(delivered)) == len(delivered), "nothing twice"
        assert set(delivered) | set(rescued) == committed, "nothing lost, no ghosts"
        assert len(rescued) <= self.copied_low, "only what was copied in behind every snapshot needs the watchdog"
        for place in {(row.topic, row.key) for row in self.reader.delivered if row.key is not None}:
            order = [row.position for row in self.reader.delivered if (row.topic, row.key) == place]
            assert order == sorted(order), f"order kept: {place}"
        assert len(committed) > 20


def _forget(connection: Connection) -> None:
    with suppress(DBAPIError):
        connection.invalidate()
    with suppress(DBAPIError):
        connection.close()


def end_prepared(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        query = text("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()")
        for gid in connection.execute(query).scalars().all():
            connection.exec_driver_sql("ROLLBACK PREPARED '" + gid + "'")


@pytest.mark.parametrize("seed", range(200 if PROFILE == "full" else 6))
def test_any_interleaving_of_transactions_is_read_once_and_in_order(engine: Engine, seed: int) -> None:
    run = Run(engine, seed)

    run.steps(STEPS)
    run.end()

    run.verdict()


def test_a_restart_and_a_killed_backend_lose_nothing_and_double_nothing(
    engine: Engine, postgres: servers.Server
) -> None:
    run = Run(engine, 1)

    def restart() -> None:
        postgres.kill()
        postgres.start()

    def kill_a_backend() -> None:
        pid = run.foreign.execute(text("SELECT pg_backend_pid()")).scalar_one()
        os.kill(pid, signal.SIGKILL)
        postgres.stop()
        postgres.start()

    for bring_down in (restart, kill_a_backend):
        run.steps(80)
        run.crash(bring_down)
    run.steps(80)
    run.end()

    run.verdict()
