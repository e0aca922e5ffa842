"""The INSERT of the write side: one statement, whatever the values, by every driver; shards as the database counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Connection, Engine, event, update
from sqlalchemy.orm import Session

from outboxkit import outbox, publish, tables
from outboxkit.errors import ConfigurationError
from outboxkit.headers import unpack_headers, wire_headers
from outboxkit.message import Kind, Message
from outboxkit.rows import shard_of
from tests.integration.capture.model import Noted
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines

NOW = datetime(2026, 11, 24, 8, 30, 0, 123456, tzinfo=UTC)
TENANTS = ("tenant_1", 'Odd "schema"')
STRANGE = ["", " ", "NULL", "null", '"', "\\", '\\"', "{a,b}", "{}", ",", "a\nb\tc", "ü€😀", "%s %(x)s :x $1", "'); --"]


def message(number: int = 0, **changes: Any) -> Message:
    plain = Message(
        id=str(uuid4()),
        type="order.placed",
        topic="orders",
        payload=b'{"n": %d}' % number,
        key=b"k",
        source="tests",
        content_type="application/json",
        occurred_at=NOW,
    )
    return replace(plain, **changes)


def strange_messages() -> list[Message]:
    texts = [
        message(topic=text or "t", type=text or "t", content_type=text, schema=text, source=text) for text in STRANGE
    ]
    binary = [message(payload=data, key=data) for data in (b"", b"\0", b"\\x00", bytes(range(256)), b"NULL")]
    others = [
        message(key=None, kind=Kind.COMMAND, expires_at=NOW + timedelta(days=1)),
        message(occurred_at=datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=45)))),
        message(id="a foreign id", key=None),
        message(id="urn:uuid:6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51"),
        message(id="6F7D4C1E9D0B5D3A8F571C0E0B5C3A51", headers=(("h", b"\0"), ("h", b"twice"))),
    ]
    return [*texts, *binary, *others]


def stored(world: CaptureDatabase) -> list[Any]:
    return [
        (
            row.message_id,
            row.topic,
            row.key,
            row.type,
            row.kind,
            bytes(row.payload),
            unpack_headers(row.headers),
            row.content_type,
            row.schema_fingerprint,
            row.occurred_at,
            row.expires_at,
            row.shard,
        )
        for row in world.rows()
    ]


def expected(one: Message) -> Any:
    row_id = outbox.stored_id(one.id)
    return (
        row_id,
        one.topic,
        one.key,
        one.type,
        one.kind.value,
        one.payload,
        list(wire_headers(one)),
        one.content_type,
        one.schema or None,
        one.occurred_at,
        one.expires_at,
        shard_of(one.topic, one.key, row_id, 64),
    )


def seen_statements(engine: Engine, scenario: Callable[[], object]) -> list[str]:
    seen: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(engine, "before_cursor_execute", listen)
    scenario()
    event.remove(engine, "before_cursor_execute", listen)
    return [statement for statement in seen if statement.startswith("INSERT")]


def written(world: CaptureDatabase, messages: list[Message], *, singly: bool) -> None:
    def scenario(session: Session) -> None:
        connection = session.connection()
        for part in [[one] for one in messages] if singly else [messages]:
            outbox.write(connection, part)
        session.commit()

    world.run(scenario)


@pytest.mark.parametrize("singly", [True, False])
def test_every_value_arrives_as_it_was_given_alone_and_among_others(world: CaptureDatabase, *, singly: bool) -> None:
    messages = strange_messages()

    written(world, messages, singly=singly)

    assert stored(world) == [expected(one) for one in messages]


def test_many_messages_keep_their_order_in_one_statement(world: CaptureDatabase) -> None:
    messages = [message(number) for number in range(1_000)]

    seen = seen_statements(world.sync_engine, lambda: written(world, messages, singly=False))

    assert [row.message_id for row in world.rows()] == [outbox.stored_id(one.id) for one in messages]
    assert len(seen) == 1


def test_scheduled_messages_are_one_statement_too(world: CaptureDatabase) -> None:
    later: list[tuple[Message, datetime | timedelta]] = [
        (message(1), timedelta(minutes=5)),
        (message(2), NOW),
        (message(3), timedelta(hours=1)),
    ]

    def scenario(session: Session) -> None:
        outbox.schedule(session.connection(), later)
        session.commit()

    seen = seen_statements(world.sync_engine, lambda: world.run(scenario))

    waiting = world.waiting()
    assert len(seen) == 1
    assert [row.message_id for row in waiting] == [outbox.stored_id(one.id) for one, _ in later]
    assert waiting[1].due_at == NOW
    assert timedelta(minutes=54) < waiting[2].due_at - waiting[0].due_at < timedelta(minutes=56)
    assert {row.reason for row in waiting} == {"scheduled"}


def test_what_is_large_is_cut_into_several_statements(postgres_world: CaptureDatabase) -> None:
    messages = [message(number, payload=b"x" * 3_000_000) for number in range(5)] + [message(9)]

    seen = seen_statements(postgres_world.sync_engine, lambda: written(postgres_world, messages, singly=False))

    assert len(seen) == 3
    assert [len(row.payload) for row in postgres_world.rows()] == [len(one.payload) for one in messages]


@pytest.mark.parametrize("count", [1, 3])
def test_tenants_schemas_are_translated_and_quoted(postgres_world: CaptureDatabase, count: int) -> None:
    """One process writes for two tenants by turns, and for nobody in particular."""
    with postgres_world.observer.begin() as connection:
        for tenant in TENANTS:
            quoted = connection.dialect.identifier_preparer.quote(tenant)
            connection.exec_driver_sql(f"CREATE SCHEMA {quoted}")
            tables.METADATA.create_all(connection.execution_options(schema_translate_map={None: tenant}))
            connection.execute(tables.outbox_version.insert().values(id=1, version=tables.VERSION, shards=2))
        connection.execution_options(schema_translate_map=None)

    def scenario(session: Session) -> None:
        for tenant in (*TENANTS, None):
            options = {"schema_translate_map": {None: tenant}}
            connection = session.connection(execution_options=options)
            outbox.write(connection, [message(topic=str(tenant)) for _ in range(count)])
            session.commit()

    try:
        postgres_world.run(scenario)
        with postgres_world.observer.connect() as connection:
            for tenant in TENANTS:
                there = connection.execution_options(schema_translate_map={None: tenant})
                found = there.execute(tables.outbox_messages.select()).all()
                assert [(row.topic, row.shard < 2) for row in found] == [(tenant, True)] * count
        assert [row.topic for row in postgres_world.rows()] == ["None"] * count
    finally:
        with postgres_world.observer.begin() as connection:
            for tenant in TENANTS:
                quoted = connection.dialect.identifier_preparer.quote(tenant)
                connection.exec_driver_sql(f"DROP SCHEMA {quoted} CASCADE")


# --- the number of shards ----------------------------------------------------------------------------------------


def looks(connection: Connection, scenario: Callable[[], object]) -> int:
    seen: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(connection, "before_cursor_execute", listen)
    scenario()
    event.remove(connection, "before_cursor_execute", listen)
    return sum(statement.startswith("SELECT outbox_version") for statement in seen)


def test_copies_of_an_engine_with_other_options_do_not_look_again(sync_world: CaptureDatabase) -> None:
    with sync_world.sync_engine.begin() as connection:
        assert looks(connection, lambda: outbox.write(connection, [message()])) == 1
    copy = sync_world.sync_engine.execution_options(logging_token="copy")
    with copy.begin() as connection:
        assert looks(connection, lambda: outbox.write(connection, [message()])) == 0


@pytest.mark.parametrize("count", [1, 3])
def test_a_running_writer_puts_rows_into_the_shards_of_a_new_number(sync_world: CaptureDatabase, count: int) -> None:
    """Set up again with fewer shards: the process that goes on would fill shards that no relay reads."""
    version = tables.outbox_version
    with Session(sync_world.sync_engine) as session:
        publish(session, Noted("before"), topic="notes", key="k")
        session.commit()
        with sync_world.observer.begin() as other:
            other.execute(update(version).values(shards=4))
        try:
            for number in range(20):
                for _ in range(count):
                    publish(session, Noted("after"), topic="notes", key=f"k{number}")
                session.commit()
        finally:
            with sync_world.observer.begin() as other:
                other.execute(update(version).values(shards=64))

    after = sync_world.rows()[1:]
    assert len(after) == 20 * count
    assert [row.shard for row in after] == [shard_of("notes", row.key, row.message_id, 4) for row in after]


def test_another_version_of_the_tables_is_refused(sync_world: CaptureDatabase) -> None:
    version = tables.outbox_version
    with Session(sync_world.sync_engine) as session:
        session.execute(update(version).values(version=98))
        publish(session, Noted("x"), topic="notes")
        with pytest.raises(ConfigurationError, match="version 98, expected"):
            session.flush()
        session.rollback()
