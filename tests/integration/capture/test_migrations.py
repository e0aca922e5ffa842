"""Migrations: from nothing, twice, by script, beside Alembic; what is wrong is found; each role does its part only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import Engine, MetaData, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outboxkit import event, migrations, outbox_tables, publish, tables
from outboxkit.codecs import codec_named
from outboxkit.codecs import json as json_codec
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import ConfigurationError
from outboxkit.events import EventType, event_type
from outboxkit.headers import unpack_headers
from outboxkit.message import Message
from outboxkit.rows import shard_of
from tests.integration.capture.described import described
from tests.integration.capture.model import Noted
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


@pytest.fixture(params=["postgresql", "sqlite"])
def empty(request: pytest.FixtureRequest, database_url: str, tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(database_url if request.param == "postgresql" else f"sqlite:///{tmp_path}/empty.sqlite")
    yield engine
    engine.dispose()


def test_an_upgrade_makes_everything_and_a_second_one_changes_nothing(empty: Engine) -> None:
    for _ in range(2):
        with empty.begin() as connection:
            migrations.upgrade(connection)

    with empty.connect() as connection:
        assert migrations.check(connection) == []
        assert migrations.current(connection) == tables.VERSION
        assert connection.scalar(text("SELECT count(*) FROM outbox_shards")) == 64


def test_an_upgrade_that_is_rolled_back_leaves_nothing(postgres_engine: Engine) -> None:
    with postgres_engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))

    with postgres_engine.connect() as connection:
        migrations.upgrade(connection)
        connection.rollback()

        assert inspect(connection).get_table_names() == []


def test_an_upgrade_runs_by_every_driver(world: CaptureDatabase) -> None:
    world.run(lambda session: migrations.upgrade(session.connection()))

    with world.observer.connect() as connection:
        assert migrations.check(connection) == []


def test_the_script_makes_the_same_as_the_upgrade(empty: Engine) -> None:
    script = migrations.sql(empty.dialect.name)
    driver: Any = empty.raw_connection()
    driver.driver_connection.executescript(
        script
    ) if empty.dialect.name == "sqlite" else driver.driver_connection.execute(script)
    driver.commit()
    driver.close()

    with empty.connect() as connection:
        assert migrations.check(connection) == []
        difference = compare_metadata(MigrationContext.configure(connection), tables.METADATA)
    assert difference == []


def test_a_newer_database_and_an_unknown_version_are_refused(empty: Engine) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
        with pytest.raises(ConfigurationError, match="no version 999"):
            migrations.upgrade(connection, to=999)
        connection.execute(tables.outbox_version.update().values(version=998))
        with pytest.raises(ConfigurationError, match="newer"):
            migrations.upgrade(connection)
        assert "version 998" in migrations.check(connection)[0]


def test_check_names_everything_that_is_wrong(postgres_engine: Engine) -> None:
    with postgres_engine.begin() as connection:
        connection.execute(text("DROP TABLE outbox_audit"))
        connection.execute(text("DROP INDEX outbox_waiting_due"))
        connection.execute(text("ALTER TABLE dead_letters DROP COLUMN path"))
        connection.execute(text("ALTER SEQUENCE outbox_messages_position_seq CACHE 20"))
        connection.execute(text("DELETE FROM outbox_shards WHERE shard = 7"))

        problems = "\n".join(migrations.check(connection))

    for part in ("outbox_audit is missing", "outbox_waiting_due", "column path", "CACHE 20", "63 rows"):
        assert part in problems
    assert len(problems.splitlines()) == 5


def test_alembic_sees_no_difference_after_the_tables_joined_the_applications_metadata(empty: Engine) -> None:
    metadata = MetaData()
    outbox_tables(metadata)
    outbox_tables(metadata)
    metadata.create_all(empty)

    with empty.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, metadata)

    # SQLite has no identity columns; told to compare defaults, Alembic wants to make each of ours one.
    identities = {
        (table.name, column.name) for table in metadata.sorted_tables for column in table.c if column.identity
    }
    sqlite_only = set() if empty.dialect.name == "postgresql" else identities
    assert {(change[2], change[3]) for (change,) in differences} <= sqlite_only
    assert {change[0] for (change,) in differences} <= {"modify_default"}


ENVIRONMENT = """
from alembic import context
context.configure(connection=context.config.attributes["connection"])
with context.begin_transaction():
    context.run_migrations()
"""

REVISION = """
from alembic import op
from outboxkit import migrations
revision, down_revision = "{number}", {before!r}

def upgrade():
    migrations.upgrade(op.get_bind(), to={number})
"""


def test_an_applications_own_revision_calls_the_upgrade(empty: Engine, tmp_path: Path) -> None:
    (tmp_path / "alembic" / "versions").mkdir(parents=True)
    (tmp_path / "alembic" / "env.py").write_text(ENVIRONMENT)
    for number, before in (("1", None), ("2", "1")):
        text_ = REVISION.format(number=number, before=before)
        (tmp_path / "alembic" / "versions" / f"{number}_outbox.py").write_text(text_)
    config = Config()
    config.set_main_option("script_location", str(tmp_path / "alembic"))
    config.set_main_option("path_separator", "os")

    for target in ("1", "head"):
        with empty.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, target)

    metadata = MetaData()
    outbox_tables(metadata)
    with empty.connect() as connection:
        assert migrations.check(connection) == []
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert [change for change in differences if change[1].name != "alembic_version"] == []


def test_the_frozen_schema_of_version_1_still_takes_what_todays_code_writes(database_url: str) -> None:
    engine = create_engine(database_url)
    frozen = Path(__file__).with_name("version_1.postgresql.sql").read_text("utf-8")
    with engine.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute(frozen)
    with Session(engine) as session:
        publish(session, Noted("now"), topic="notes", key="k", expires=timedelta(hours=1))
        publish(session, Noted("later"), topic="notes", delay=timedelta(hours=1))
        session.commit()
        assert session.scalar(text("SELECT count(*) FROM outbox_messages")) == 1
        assert session.scalar(text("SELECT count(*) FROM outbox_waiting")) == 1
    with engine.begin() as connection:
        migrations.upgrade(connection)
        assert migrations.check(connection) == []
    engine.dispose()


def _version_1(engine: Engine) -> None:
    """A database as version 1 left it, with rows in it, one position given out and deleted."""
    script = Path(__file__).with_name(f"version_1.{engine.dialect.name}.sql").read_text("utf-8")
    driver: Any = engine.raw_connection()
    run = (
        driver.driver_connection.executescript if engine.dialect.name == "sqlite" else driver.driver_connection.execute
    )
    run(script)
    driver.commit()
    driver.close()
    with Session(engine) as session:
        for number in range(3):
            publish(session, Noted(str(number)), topic="notes", key="k", expires=timedelta(hours=1))
        publish(session, Noted("later"), topic="notes", delay=timedelta(hours=1))
        session.commit()
        session.execute(tables.outbox_messages.delete().where(tables.outbox_messages.c.position == 3))
        session.commit()


def test_tables_of_version_1_become_those_of_today_and_keep_their_rows(empty: Engine) -> None:
    _version_1(empty)

    for _ in range(2):
        with empty.begin() as connection:
            migrations.upgrade(connection)

    with Session(empty) as session:
        assert migrations.check(session.connection()) == []
        assert session.scalar(text("SELECT version FROM outbox_version")) == tables.VERSION
        publish(session, Noted("after"), topic="notes", key="k")
        session.commit()
        rows = session.execute(text("SELECT position, payload FROM outbox_messages ORDER BY position")).all()
        assert [(position, json.loads(payload)["text"]) for position, payload in rows] == [
            (1, "0"),
            (2, "1"),
            (4, "after"),
        ]
        assert session.scalar(text("SELECT count(*) FROM outbox_waiting")) == 1


def test_migrated_tables_equal_new_ones(empty: Engine, tmp_path: Path) -> None:
    with empty.begin() as connection:
        migrations.upgrade(connection)
    new = described(empty)
    with empty.begin() as connection:
        for table in new:
            connection.exec_driver_sql(f"DROP TABLE {table}")
    _version_1(empty)
    with empty.begin() as connection:
        migrations.upgrade(connection)

    assert described(empty) == new
    with empty.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []


# --- writers that bypass the ORM ---------------------------------------------------------------------------------


def test_the_sql_function_writes_the_envelope_that_publish_writes(postgres_engine: Engine) -> None:
    with Session(postgres_engine) as session:
        publish(session, Noted("x"), topic="notes", key="kä", headers={"tenant": "a"})
        session.commit()
        session.execute(
            text("""SELECT outboxkit_emit('notes', 'order.noted', '{"text": "x"}', 'kä', '{"tenant": "a"}')""")
        )
        session.commit()
        ours, theirs = session.execute(
            tables.outbox_messages.select().order_by(tables.outbox_messages.c.position)
        ).all()

    same = ("shard", "topic", "key", "type", "kind", "content_type", "schema_fingerprint", "expires_at")
    assert [getattr(theirs, name) for name in same] == [getattr(ours, name) for name in same]
    assert json.loads(theirs.payload) == json.loads(ours.payload)
    changing = {"ce_id", "ce_time"}
    written, expected = unpack_headers(theirs.headers), unpack_headers(ours.headers)
    assert [name for name, _ in written] == [name for name, _ in expected]
    assert [pair for pair in written if pair[0] not in changing] == [
        pair for pair in expected if pair[0] not in changing
    ]
    assert dict(written)["ce_id"].decode() == str(theirs.message_id)
    assert len(dict(written)["ce_time"]) == len(dict(expected)["ce_time"])
    assert theirs.message_id.version == 7


def test_the_sql_function_spreads_keyless_messages_as_we_do(postgres_engine: Engine) -> None:
    with postgres_engine.begin() as connection:
        for _ in range(50):
            connection.execute(text("SELECT outboxkit_emit('notes', 'order.noted', '{}')"))
        rows = connection.execute(tables.outbox_messages.select()).all()

    assert [row.shard for row in rows] == [shard_of("notes", None, row.message_id, 64) for row in rows]
    assert len({row.shard for row in rows}) > 10


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("NULL, 'a.b', '{}'", "needs a topic"),
        ("""'t', 'a.b', '{}', headers => '{"ce_id": "forged"}'""", "reserved"),
        ("""'t', 'a.b', '{}', headers => '{"Outboxkit-x": "forged"}'""", "reserved"),
        ("'t', 'a.b', to_jsonb(repeat('x', 900001))", "larger than"),
        ("'t', 'a.b', '{}', repeat('k', 1025)", "larger than"),
        ("'t', 'a.b', '{}', headers => jsonb_build_object('h', repeat('x', 20000))", "headers"),
        ("'t', 'a.b', '{}', kind => 'rumour'", "event or command"),
        ("repeat('t', 256), 'a.b', '{}'", "249"),
        ("'', 'a.b', '{}'", "249"),
        ("'t', repeat('a', 256), '{}'", "255"),
    ],
    ids=["null", "reserved", "reserved by case", "payload", "key", "headers", "kind", "topic", "no topic", "type"],
)
def test_the_sql_function_refuses_what_publish_refuses(postgres_engine: Engine, arguments: str, why: str) -> None:
    with postgres_engine.connect() as connection, pytest.raises(DBAPIError, match=why):
        connection.exec_driver_sql(f"SELECT outboxkit_emit({arguments})")


def test_a_trigger_captures_raw_sql(postgres_engine: Engine) -> None:
    with postgres_engine.begin() as connection:
        for statement in (
            "CREATE TABLE raw (id int PRIMARY KEY, total int)",
            """CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON raw
               FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('raws', 'raw', 'id')""",
            "INSERT INTO raw VALUES (1, 10), (2, 20)",
            "UPDATE raw SET total = total",
            "UPDATE raw SET total = 11 WHERE id = 1",
            "DELETE FROM raw WHERE id = 2",
        ):
            connection.exec_driver_sql(statement)
        rows = connection.execute(tables.outbox_messages.select().order_by(tables.outbox_messages.c.position)).all()

    assert [(row.type, row.key) for row in rows] == [
        ("raw.created", b"1"),
        ("raw.created", b"2"),
        ("raw.updated", b"1"),
        ("raw.deleted", b"2"),
    ]
    assert json.loads(rows[2].payload) == {
        "change": "updated",
        "key": {"id": 1},
        "changed": ["total"],
        "old": {"total": 10},
        "new": {"total": 11},
    }


@event("paid.created")
@dataclass
class PaidCreated:
    change: str
    key: dict[str, int]
    changed: list[str]
    old: dict[str, object]
    new: PaidRow


@dataclass
class PaidRow:
    id: int
    total: Decimal
    rates: list[Decimal]
    raw: bytes
    took: timedelta
    owed: Decimal | None = None
    missing: bytes | None = None


PAID: dict[str, str] = {
    "0, 12.50, '{0.10,2}', '\\x00ff', '1 day 00:00:02'": "P1DT2.000000S",
    "0, -0.00000000000000000001, '{}', '', '-00:00:00.000007'": "-P0DT0.000007S",
    "0, 1e20, '{1}', decode(repeat('ff', 200), 'hex'), '1 year 2 months -3 days 25:00:00'": "P423DT3600.000000S",
}


@pytest.mark.parametrize("style", ["postgres", "iso_8601", "sql_standard"])
@pytest.mark.parametrize(("values", "span"), PAID.items(), ids=range(len(PAID)))
def test_a_trigger_writes_values_as_the_orm_does_so_that_one_class_reads_both(
    postgres_engine: Engine, values: str, span: str, style: str
) -> None:
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL intervalstyle = '{style}'")
        connection.exec_driver_sql("SET LOCAL bytea_output = 'escape'")
        connection.exec_driver_sql("CREATE DOMAIN money_amount AS numeric")
        connection.exec_driver_sql(
            "CREATE TABLE paid (id int PRIMARY KEY, total money_amount, rates numeric[], raw bytea, took interval, "
            "owed numeric, missing bytea)"
        )
        connection.exec_driver_sql(
            """CREATE TRIGGER capture AFTER INSERT OR UPDATE OR DELETE ON paid
               FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('paid', 'paid', 'id')"""
        )
        connection.exec_driver_sql(f"INSERT INTO paid VALUES ({values})")
        connection.exec_driver_sql("SET LOCAL intervalstyle = 'postgres'")  # psycopg reads no other
        (stored,) = connection.execute(text("SELECT id, total, rates, raw, took, owed, missing FROM paid"))
        (row,) = connection.execute(tables.outbox_messages.select())

    message = Message(id="1", type="paid.created", topic="paid", payload=row.payload)
    contract = event_type(PaidCreated)
    read = from_plain(PaidCreated, codec_named("json").decode(message, contract, lambda _: ""))
    assert read.new == PaidRow(*stored)
    assert json.loads(row.payload)["new"]["took"] == span
    assert isinstance(json.loads(row.payload)["new"]["total"], str)


@dataclass(frozen=True)
class Row:
    """Every kind of column whose JSON has more than one spelling."""

    id: Decimal
    total: Decimal
    digest: bytes
    every: timedelta
    back: timedelta
    long: timedelta
    parts: list[Decimal]
    price: Decimal
    nothing: Decimal | None


def test_a_trigger_writes_values_as_the_codec_writes_them(postgres_engine: Engine) -> None:
    expected = Row(
        id=Decimal(1),
        total=Decimal("12.50"),
        digest=bytes(range(100)),
        every=timedelta(days=1, seconds=2),
        back=-timedelta(hours=30, microseconds=7),
        long=timedelta(days=395),
        parts=[Decimal("1.10"), Decimal(2)],
        price=Decimal("3.00"),
        nothing=None,
    )
    with postgres_engine.begin() as connection:
        for statement in (
            "SET bytea_output = 'escape'",
            "SET IntervalStyle = 'sql_standard'",
            "CREATE DOMAIN money2 AS numeric(9, 2)",
            """CREATE TABLE raw (id numeric PRIMARY KEY, total numeric(9, 2), digest bytea, every interval,
               back interval, long interval, parts numeric[], price money2, nothing numeric)""",
            """CREATE TRIGGER capture AFTER INSERT OR UPDATE ON raw
               FOR EACH ROW EXECUTE FUNCTION outboxkit_capture('raws', 'raw', ' id ')""",
        ):
            connection.exec_driver_sql(statement)
        values = dataclasses.asdict(expected) | {"long": "1 year 1 month"}
        columns = ", ".join(f":{name}" for name in values)
        connection.execute(text(f"INSERT INTO raw VALUES ({columns})"), values)
        (row,) = connection.execute(tables.outbox_messages.select()).all()

    content = json.loads(row.payload)["new"]
    assert from_plain(Row, content) == expected
    assert content == json.loads(json_codec.codec().encode(expected, EventType(name="raw", version=1, cls=Row)).payload)
    assert row.key == b"1"


@pytest.mark.parametrize("key", ["'ident'", "'id, ident'", "''", None])
def test_a_trigger_with_a_key_that_is_no_column_is_refused(postgres_engine: Engine, key: str | None) -> None:
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE raw (id int PRIMARY KEY)")
        arguments = "'raws', 'raw'" + (f", {key}" if key is not None else "")
        connection.exec_driver_sql(
            f"CREATE TRIGGER capture AFTER INSERT ON raw FOR EACH ROW EXECUTE FUNCTION outboxkit_capture({arguments})"
        )
        with pytest.raises(DBAPIError, match="columns of the table"):
            connection.exec_driver_sql("INSERT INTO raw VALUES (1)")


def test_every_function_finds_our_tables_before_anybody_s_temporary_ones(postgres_engine: Engine) -> None:
    with postgres_engine.connect() as connection:
        found = connection.execute(
            text("SELECT proname, proconfig FROM pg_proc WHERE proname LIKE 'outboxkit%'"),
        ).all()
        assert len(found) >= 5
        assert {name: config for name, config in found if not str(config).endswith(", pg_temp']")} == {}
        connection.exec_driver_sql("CREATE TEMPORARY TABLE outbox_messages (LIKE public.outbox_messages)")
        connection.exec_driver_sql("SELECT outboxkit_emit('notes', 'order.noted', '{}')")
        assert connection.scalar(text("SELECT count(*) FROM public.outbox_messages")) == 1
