"""Rules of rows: the database refuses what can never be right, whoever writes it; what was there before stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import (
    Column,
    Engine,
    LargeBinary,
    String,
    Table,
    create_engine,
    insert,
    sql,
    text,
)
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
RULES = ("23514", "22001")  # SQLSTATE of a constraint, and of VARCHAR(n)
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


def _long(table: Table) -> list[Column[Any]]:
    """The columns of a table's indexes and of its primary key that are as long as somebody makes them."""
    indexed = {column.name for index in table.indexes for column in index.columns} | set(
        table.primary_key.columns.keys()
    )
    for column in table.c:
        if column.name in indexed and column.computed is not None:
            indexed |= set(re.findall(r"\w+", str(column.computed.sqltext)))
    free = [column for column in table.c if column.computed is None and isinstance(column.type, String | LargeBinary)]
    return [column for column in free if column.name in indexed and column.name != "role"]


def _incompressible(column: Column[Any], size: int) -> bytes | str:
    """Bytes, or text of four bytes a character where characters are counted, that no compression makes shorter."""
    chance = Random(size)
    if isinstance(column.type, LargeBinary):
        return chance.randbytes(size)
    wide = isinstance(column.type, String) and column.type.length is not None
    return "".join(chr(chance.randrange(0x10000, 0x1F000) if wide else chance.randrange(33, 127)) for _ in range(size))


def _refused_by(engine: Engine, table: Table, values: dict[str, Any]) -> tuple[str, str]:
    """Code and text of the database's refusal; empty when it takes the row."""
    required = [one for one in table.c if not one.nullable and one.server_default is None and one.identity is None]
    plain = sql.table(table.name, *(sql.column(one.name, one.type) for one in table.c))
    filled = {one.name: _typed(one) for one in required} | values
    with engine.connect() as connection:
        try:
            connection.execute(insert(plain).values(filled))
        except DBAPIError as error:
            return getattr(error.orig, "sqlstate", None) or "refused", str(error.orig)
    return "", ""


def _typed(column: Column[Any]) -> Any:
    """A value as Python has it, which keeps the rules of its column."""
    by_type = {"Instant": NOW, "Uuid": uuid4(), "Array": [], "LargeBinary": b"", "JSON": []}
    return by_type.get(type(column.type).__name__, _anything(column))


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


def test_no_row_is_too_long_for_an_index(postgres_engine: Engine) -> None:
    """A value is taken, or a rule names its column: an index never refuses a row."""
    too_long = []
    for table in tables.METADATA.sorted_tables:
        longest = {column.name: _longest(postgres_engine, table, column) for column in _long(table)}
        if longest and (reason := _refused_by(postgres_engine, table, longest)[1]):
            too_long.append((table.name, reason))

    assert too_long == []


def _longest(engine: Engine, table: Table, column: Column[Any]) -> bytes | str:
    for size in (9_000, 2_700, 1_024, 255, 249, 100, 64, 16, 10, 8):
        value = _incompressible(column, size)
        state, reason = _refused_by(engine, table, {column.name: value})
        if state not in RULES:
            assert not state, f"{table.name}.{column.name} of {size:,}: {reason}"
            return value
    pytest.fail(f"{table.name}.{column.name} takes nothing")


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
