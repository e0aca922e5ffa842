"""What the planner makes of the relay's statements when its statistics are of another time.

An outbox is empty at one moment and holds a million rows at the next; the statistics are as old as the last look at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, text

from outboxkit import outbox, tables
from outboxkit.rows import Evidence, Part, Reading, Row
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
        assert _looked_at_in_vain(plans) <= TAKEN

        with explained(settler) as plans:
            assert outbox.remove(settler, uuid4(), [_evidence(page.rows)]) == TAKEN
        assert _looked_at_in_vain(plans) <= TAKEN


def _next(last: int, snapshot: str) -> Reading:
    return Reading(shards=READING.shards, parts=READING.parts, limit=TAKEN, round=snapshot, last=last)


def _gone(position: int) -> Row:
    """A row that is not there."""
    sent = ("orders", None, "order.placed", "event", b"{}", b"")
    return Row.of(position, uuid4(), *sent, datetime.now(UTC), None)


def _evidence(rows: list[Row]) -> Evidence:
    zeros = [0] * len(rows)
    return Evidence(topic="orders", outcome="published", rows=rows, partitions=zeros, offsets=zeros)


@contextmanager
def explained(connection: Connection) -> Iterator[list[dict[str, Any]]]:
    """What the server says about each statement of the block: its plan, and how many rows each part has seen."""
    for setting in (
        "LOAD 'auto_explain'",
        "SET auto_explain.log_level = notice",
        "SET auto_explain.log_format = json",
        "SET auto_explain.log_analyze = on",
        "SET auto_explain.log_min_duration = 0",
    ):
        connection.exec_driver_sql(setting)
    plans: list[dict[str, Any]] = []

    def note(diagnostic: Any) -> None:
        _, _, plan = diagnostic.message_primary.partition("plan:\n")
        plans.append(json.loads(plan)["Plan"])

    driver: Any = connection.connection.driver_connection
    driver.add_notice_handler(note)
    try:
        yield plans
    finally:
        driver.remove_notice_handler(note)
        connection.exec_driver_sql("SET auto_explain.log_min_duration = -1")
    assert plans, "void: the server has explained nothing"


def _looked_at_in_vain(plans: list[dict[str, Any]]) -> int:
    """Rows that some part of a plan has looked at and thrown away."""
    return sum(
        sum(value for name, value in plan.items() if name.startswith("Rows Removed")) * plan["Actual Loops"]
        + _looked_at_in_vain(plan.get("Plans", []))
        for plan in plans
    )
