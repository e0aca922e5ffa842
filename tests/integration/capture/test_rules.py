"""Rules of rows: the database refuses what can never be right, whoever writes it; what was there before stays."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Column, Engine, String, Table, create_engine, insert, sql, text
from sqlalchemy.exc import DBAPIError

from outboxkit import migrations, tables
from outboxkit._sql import Instant
from outboxkit.dialects import is_about_the_row

pytestmark = pytest.mark.sqlalchemy_lines

NOW = datetime(2026, 11, 30, tzinfo=UTC)
MESSAGE = {
    "shard": 0, "message_id": uuid4(), "topic": "orders", "key": b"k", "type": "order.placed", "kind": "event",
    "payload": b"{}", "headers": b"\3", "content_type": "application/json", "occurred_at": NOW,
}  # fmt: skip
GOOD: dict[str, dict[str, Any]] = {
    "outbox_messages": MESSAGE,
    "outbox_waiting": MESSAGE | {"reason": "retry", "due_at": NOW},
    "outbox_stopped_keys": {"topic": "orders", "key": b"k", "shard": 0, "position": 1, "reason": "retry"},
    "outbox_relays": {"id": uuid4(), "host": "h", "expires_at": NOW, "version": "1"},
    "outbox_control": {"scope": "destination", "target": "orders", "reason": "audit", "set_by": "me"},
    "inbox_messages": {"consumer": "billing", "source": "", "message_id": "1", "handled_at": NOW},
    "outbox_schemas": {"fingerprint": "f", "role": "reader", "type": "order.placed", "text": "{}"},
}  # fmt: skip
BAD: list[tuple[str, dict[str, Any]]] = [
    *((table, {"shard": shard}) for table in ("outbox_messages", "outbox_waiting") for shard in (-1, 64, 999)),
    *((table, {"topic": topic}) for table in ("outbox_messages", "outbox_waiting") for topic in ("", "t" * 250)),
    ("outbox_messages", {"topic": "ü" * 125}),
    ("outbox_messages", {"key": b"k" * 1025}),
    ("outbox_stopped_keys", {"key": b"k" * 1025}),
    ("outbox_stopped_keys", {"shard": 64}),
    ("outbox_stopped_keys", {"request": "dance"}),
    ("outbox_messages", {"type": "t" * 256}),
    ("outbox_messages", {"kind": "rumour"}),
    ("outbox_waiting", {"reason": "because"}),
    ("outbox_waiting", {"attempts": -1}),
    ("outbox_messages", {"headers": b'{"a": 1}'}),
    ("outbox_messages", {"headers": b"\4\1"}),
    ("outbox_control", {"scope": "world"}),
    ("outbox_control", {"target": ""}),
    ("outbox_control", {"target": "t" * 1_000_000}),
    ("outbox_control", {"reason": "  "}),
    ("outbox_control", {"set_at": NOW, "until": datetime(2028, 1, 1, tzinfo=UTC)}),
    ("outbox_control", {"set_at": NOW, "until": datetime(2026, 1, 1, tzinfo=UTC)}),
    ("inbox_messages", {"message_id": "x" * 8000}),
    ("inbox_messages", {"source": "x" * 1025}),
    ("inbox_messages", {"consumer": "x" * 256}),
    ("outbox_schemas", {"role": "onlooker"}),
]
FOREVER = ["infinity", "-infinity", "0044-03-15 00:00:00+00 BC", "20000-01-01 00:00:00+00"]
NO_INSTANT = ["infinity", "never", "20000-01-01 00:00:00.000000", "2026-02-31 00:00:00.000000", "2026-01-01", "0000-01-01 00:00:00"]  # noqa: E501  # fmt: skip


@pytest.fixture(params=["postgresql", "sqlite"])
def empty(request: pytest.FixtureRequest, database_url: str, tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(database_url if request.param == "postgresql" else f"sqlite:///{tmp_path}/empty.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture
def engine(empty: Engine) -> Engine:
    with empty.begin() as connection:
        migrations.upgrade(connection)
    return empty


def refused(engine: Engine, table: str, values: dict[str, Any]) -> str:
    """The name of the constraint that refuses a row; empty when it is taken."""
    with engine.connect() as connection:
        try:
            connection.execute(insert(tables.METADATA.tables[table]).values(GOOD[table] | values))
        except DBAPIError as error:
            return str(error.orig) if is_about_the_row(error) else f"no error of a row: {error}"
    return ""


def test_good_rows_are_taken(engine: Engine) -> None:
    assert [refused(engine, table, {}) for table in GOOD] == [""] * len(GOOD)
    edges = {
        "shard": 63,
        "topic": "t" * 249,
        "key": b"k" * 1024,
        "type": "",
        "headers": b"",
        "occurred_at": datetime(1, 1, 1, tzinfo=UTC),
        "expires_at": datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    }
    assert refused(engine, "outbox_messages", edges) == ""
    assert refused(engine, "outbox_messages", {"key": None}) == ""
    # A fraction that rounds up to the next second is the second that it is.
    assert refused(engine, "outbox_messages", {"occurred_at": NOW.replace(second=59, microsecond=999999)}) == ""
    full = {"consumer": "c" * 255, "source": "s" * 1024, "message_id": "m" * 1024}
    assert refused(engine, "inbox_messages", full) == "", "the longest identity fits into the index"


@pytest.mark.parametrize(("table", "values"), BAD, ids=[f"{table}-{'-'.join(values)}-{at}" for at, (table, values) in enumerate(BAD)])  # noqa: E501  # fmt: skip
def test_what_can_never_be_right_is_refused_and_the_constraint_names_the_column(
    engine: Engine, table: str, values: dict[str, Any]
) -> None:
    assert f"{table}_{list(values)[-1]}_check" in refused(engine, table, values)


def test_no_instant_of_any_table_is_one_that_python_cannot_hold(engine: Engine) -> None:
    taken = []
    for table in tables.METADATA.sorted_tables:
        for column in (column for column in table.c if isinstance(column.type, Instant)):
            for instant in FOREVER if engine.dialect.name == "postgresql" else NO_INSTANT:
                reason = _inserted(engine, table, column.name, instant)
                if f"{table.name}_{column.name}_check" not in reason:
                    taken.append((table.name, column.name, instant, reason))
    assert taken == []


def _inserted(engine: Engine, table: Table, column: str, instant: str) -> str:
    """Why a row with this instant is refused."""
    required = [one for one in table.c if not one.nullable and one.server_default is None and one.identity is None]
    values = {one.name: _anything(one) for one in required} | {column: instant}
    plain = sql.table(table.name, *(sql.column(name) for name in values))
    with engine.connect() as connection:
        try:
            connection.execute(insert(plain).values(values))
        except DBAPIError as error:
            return str(error.orig)
    return ""


def _anything(column: Column[Any]) -> Any:
    """A value of a column that keeps its rules."""
    fixed: dict[str, Any] = {
        "kind": "event", "reason": "retry", "scope": "type", "side": "relay", "role": "reader", "headers": b"",
        "state": "dead", "messages": "[]", "ids": "{}", "partitions": "{}", "offsets": "{}",
    }  # fmt: skip
    by_type = {
        "Instant": "2026-01-01 00:00:00",
        "Uuid": str(uuid4()),
        "LargeBinary": b"x",
        "JSON": "{}",
        "Boolean": False,
    }
    default = by_type.get(type(column.type).__name__, "1" if isinstance(column.type, String) else 1)
    return fixed.get(column.name, default)


def test_rows_from_before_a_rule_stay_and_are_told(empty: Engine) -> None:
    script = Path(__file__).with_name(f"version_1.{empty.dialect.name}.sql").read_text("utf-8")
    driver: Any = empty.raw_connection()
    (driver.driver_connection.executescript if empty.dialect.name == "sqlite" else driver.driver_connection.execute)(script)  # noqa: E501  # fmt: skip
    driver.commit()
    driver.close()
    with empty.begin() as connection:
        for shard in (0, 999):
            connection.execute(insert(tables.outbox_messages).values(MESSAGE | {"shard": shard}))

    for _ in range(2):
        with empty.begin() as connection:
            migrations.upgrade(connection)

    with empty.connect() as connection:
        found = connection.execute(text("SELECT shard FROM outbox_messages ORDER BY shard")).scalars().all()
        (problem,) = migrations.check(connection)
    assert found == [0, 999]
    assert "outbox_messages_shard_check" in problem
    assert "repair or delete" in problem
    assert "outbox_messages_shard_check" in refused(empty, "outbox_messages", {"shard": 999})
    with empty.begin() as connection:
        connection.execute(tables.outbox_messages.delete().where(tables.outbox_messages.c.shard == 999))
        migrations.upgrade(connection)
        assert migrations.check(connection) == [], "an upgrade proves what has become right"
