"""What the planner makes of the relay's statements when its statistics are of another time.

An outbox is empty at one moment and holds a million rows at the next; the statistics are as old as the last look at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from outboxkit import dead_letters, outbox, tables
from outboxkit.consumer import retries
from outboxkit.rows import Evidence, Part, Reading, Row
from outboxkit_relay.store import due, mending, stopped_keys
from tests.integration.relay.plans import explained, looked_at_in_vain
from tests.integration.relay.world import engine_for

ROWS, TAKEN = 20_000, 2_000
READING = Reading(
    shards=frozenset(range(tables.SHARDS)), parts=(Part(topics=frozenset(), only=False, seen=None),), limit=TAKEN
)
FILL = f"""
    INSERT INTO outbox_messages (shard, message_id, topic, type, kind, payload, headers, content_type, occurred_at)
    SELECT mod(n, 64), gen_random_uuid(), 'orders', 'order.placed', 'event', '{{}}', '', 'application/json', now()
    FROM generate_series(1, {ROWS}) AS n
"""
MANY = 5_000
LETTERS = f"""
    INSERT INTO dead_letters (id, side, consumer, topic, message_id, type, kind, headers, failure, stage, error_class,
        error, attempts, "group")
    SELECT gen_random_uuid(), 'consumer', 'billing', 'orders', 'id ' || n, 't', 'event', '',
        'poison', 'decode', 'E', '', 1, 'g'
    FROM generate_series(1, {MANY}) AS n
"""
WAITING = f"""
    INSERT INTO inbox_waiting (consumer, topic, key, headers, origin, partition, "offset", reason)
    SELECT 'billing', 'orders', convert_to('key ' || n, 'UTF8'), '', '', 0, n, 'follower'
    FROM generate_series(1, {MANY}) AS n
"""
FOLLOWERS = f"""
    INSERT INTO outbox_waiting (shard, message_id, topic, key, type, kind, payload, headers, content_type, occurred_at,
        position, reason)
    SELECT 0, gen_random_uuid(), 'orders', convert_to('key ' || mod(n, 2), 'UTF8'), 'order.placed', 'event', '{{}}', '',
        'application/json', now(), n, 'follower'
    FROM generate_series(1, {MANY}) AS n
"""
STOPPED = """
    INSERT INTO outbox_stopped_keys (topic, key, shard, position, reason, due_at)
    SELECT topic, key, shard, min(position), 'retry', now() FROM outbox_waiting GROUP BY topic, key, shard
"""
STATISTICS = {
    "of an empty table": ["VACUUM ANALYZE outbox_messages", FILL],
    "of a moment when all was published": [FILL, "DELETE FROM outbox_messages", "ANALYZE outbox_messages", FILL],
    "of no time": [FILL],
    "of now": [FILL, "ANALYZE outbox_messages"],
}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = engine_for(database_url)
    with found.begin() as connection:
        connection.execute(text("ALTER TABLE outbox_messages SET (autovacuum_enabled = off)"))
    yield found
    found.dispose()


@pytest.mark.parametrize("statements", STATISTICS.values(), ids=STATISTICS.keys())
def test_what_is_settled_and_read_is_found_without_looking_at_the_rest(engine: Engine, statements: list[str]) -> None:
    reader, settler = (engine.connect().execution_options(isolation_level="AUTOCOMMIT") for _ in range(2))
    with reader, settler:
        for _ in range(12):  # a driver prepares what is repeated, and the server would keep a plan
            outbox.remove(settler, uuid4(), [_evidence([_gone(number) for number in range(TAKEN)])])
        for statement in statements:
            reader.exec_driver_sql(statement)
        page = outbox.read(reader, READING)

        with explained(reader) as plans:
            outbox.read(reader, _next(page.rows[-1].position, page.snapshot))
        assert looked_at_in_vain(plans) <= TAKEN

        with explained(settler) as plans:
            assert outbox.remove(settler, uuid4(), [_evidence(page.rows)]) == TAKEN
        assert looked_at_in_vain(plans) <= TAKEN


def test_letters_are_found_by_their_id_and_waiting_deliveries_by_their_key(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in (LETTERS, WAITING, "ANALYZE dead_letters", "ANALYZE inbox_waiting"):
            connection.exec_driver_sql(statement)
        session = Session(connection)
        for _ in range(12):  # a driver prepares what is repeated, and the server would keep a plan
            dead_letters.find(connection, dead_letters.Filter(message_id="nobody"))
            retries.promote(session, "billing", ("orders", b"nobody"))
        with explained(connection) as plans:
            (letter,) = dead_letters.find(connection, dead_letters.Filter(message_id="id 77"))
            assert retries.keys_waiting(session, "billing", {("orders", b"key 77")}) == {("orders", b"key 77")}
            retries.promote(session, "billing", ("orders", b"key 77"))

    assert letter.message_id == "id 77"
    assert looked_at_in_vain(plans) < MANY // 100


def test_the_heads_of_keys_are_found_without_looking_at_what_waits_behind_them(engine: Engine) -> None:
    with engine.begin() as connection:
        for statement in (FOLLOWERS, STOPPED, "ANALYZE"):
            connection.exec_driver_sql(statement)
        with explained(connection) as plans:
            heads, _ = due.due_rows(connection, READING.shards, without=(), limit=TAKEN)

    assert [head.position for head in heads] == [1, 2]
    assert looked_at_in_vain(plans) < MANY // 100


def test_a_key_that_nobody_stopped_is_stopped_by_one_look_at_what_waits(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(FOLLOWERS)
        with explained(connection) as plans:
            assert mending.mend(connection, READING.shards) == 2
        heads = {stop.position for stop in stopped_keys.list_stopped(connection)}

    assert heads == {1, 2}
    assert looked_at_in_vain(plans) <= 4 * MANY  # each of its statements reads the table once


def _next(last: int, snapshot: str) -> Reading:
    return Reading(shards=READING.shards, parts=READING.parts, limit=TAKEN, round=snapshot, last=last)


def _gone(position: int) -> Row:
    """A row that is not there."""
    sent = ("orders", None, "order.placed", "event", b"{}", b"")
    return Row.of(position, uuid4(), *sent, datetime.now(UTC), None)


def _evidence(rows: list[Row]) -> Evidence:
    zeros = [0] * len(rows)
    return Evidence(topic="orders", outcome="published", rows=rows, partitions=zeros, offsets=zeros)
