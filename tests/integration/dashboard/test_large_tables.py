"""The page over tables of millions of rows: each view finds what it shows through an index."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, text

from outboxkit import tables
from outboxkit_relay.dashboard import failures, replays, views
from outboxkit_relay.dashboard.runs import Runs
from outboxkit_relay.dashboard.setup import Setup
from tests.integration.relay.plans import explained, scanned
from tests.unit.relay.dashboard.world import furnish

pytestmark = pytest.mark.full

LEDGER, LETTERS, HANDLED = 5_000_000, 500_000, 1_000_000
LARGE = {"outbox_ledger", "dead_letters", "inbox_messages"}
FILL = {
    "ledger": f"""
        INSERT INTO outbox_ledger (relay, topic, published_at, outcome, min_id, max_id, ids, partitions, offsets)
        SELECT r, 'orders', now() - n * interval '3 days' / {LEDGER}, 'published', r, r, ARRAY[r], ARRAY[0], ARRAY[n]
        FROM (SELECT n, gen_random_uuid() AS r FROM generate_series(1, {LEDGER}) AS n) AS made
    """,
    "letters": f"""
        INSERT INTO dead_letters (id, side, consumer, topic, key, message_id, type, kind, headers, payload, failure,
            stage, error_class, error, attempts, "group", died_at, state)
        SELECT gen_random_uuid(), 'consumer', 'billing', 'orders', ('order-' || n % 1000)::bytea,
            gen_random_uuid()::text, 'order.placed', 'event', '\\x00', convert_to(repeat('x', 300), 'UTF8'), 'handler',
            'handler', 'Error' || n % 7, 'it failed', 9, 'group' || n % 7, now() - n * interval '20 days' / {LETTERS},
            CASE n % 3 WHEN 0 THEN 'replayed' ELSE 'dead' END
        FROM generate_series(1, {LETTERS}) AS n
    """,
    "inbox": f"""
        INSERT INTO inbox_messages (consumer, message_id, handled_at)
        SELECT 'billing', gen_random_uuid()::text, now() - n * interval '14 days' / {HANDLED}
        FROM generate_series(1, {HANDLED}) AS n
    """,
}


@pytest.fixture
def filled(engine: Engine) -> Engine:
    with engine.begin() as connection:
        furnish(connection)
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        for statement in FILL.values():
            connection.execute(text(statement))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("SET statement_timeout = 0")
        for table in LARGE:
            connection.exec_driver_sql(f"VACUUM ANALYZE {table}")
    return engine


def test_no_view_reads_a_large_table_as_a_whole(
    filled: Engine, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """How long each took is in the report (``--junitxml``)."""
    setup = Setup(
        engine=filled,
        patience=timedelta(seconds=30),
        inbox_retention=timedelta(days=14),
        resolve=None,
        runs=Runs(filled, None),
    )
    with filled.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        letter = connection.execute(text("SELECT id FROM dead_letters WHERE \"group\" = 'group3' LIMIT 1")).scalar_one()
        message = connection.execute(tables.dead_letters.select().limit(1)).one().message_id
        looks: dict[str, tuple[Any, dict[str, str]]] = {
            "overview": (views.overview, {}),
            "messages": (views.messages, {}),
            "messages of a key": (views.messages, {"q": "key:order-7"}),
            "messages, dead and old": (views.messages, {"q": "state:dead topic:orders age:>1h"}),
            "a message": (views.messages, {"q": message}),
            "failures": (failures.failures, {}),
            "a cause": (failures.group, {"name": "group3"}),
            "a letter": (failures.letter, {"id": str(letter)}),
            "preflight": (replays.preflight, {"group": "group3", "limit": "100"}),
            "replays": (replays.replays, {}),
            "stopped keys": (views.quarantine, {}),
            "control": (views.control, {}),
            "audit log": (views.audit, {}),
        }
        for name, (view, query) in looks.items():
            assert scanned(_plans(connection, setup, view, query)) & LARGE == set(), name
            took = min(_seconds(connection, setup, view, query) for _ in range(3))
            record_testsuite_property(name, f"{took * 1000:.0f} ms")


def _plans(connection: Connection, setup: Setup, view: Any, query: dict[str, str]) -> list[dict[str, Any]]:
    with explained(connection) as plans:
        view(connection, setup, query)
    return plans


def _seconds(connection: Connection, setup: Setup, view: Any, query: dict[str, str]) -> float:
    began = time.perf_counter()
    view(connection, setup, query)
    return time.perf_counter() - began
