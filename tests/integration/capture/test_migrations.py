"""Migrations: from nothing, twice, by script, beside Alembic; what is wrong is found; each role does its part only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, Engine, MetaData, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import Session

from outboxkit import control, migrations, outbox_tables, publish, tables
from outboxkit.errors import ConfigurationError
from outboxkit.message import shard_of, unpack_headers
from outboxkit.migrations.roles import FUNCTIONS, GRANTS, LAG, NEVER_GIVEN, VIEWS, create_roles, is_hidden
from tests.integration.capture.model import Noted
from tests.integration.capture.world import World

pytestmark = pytest.mark.sqlalchemy_lines


@pytest.fixture(params=["postgresql", "sqlite"])
def empty(request: pytest.FixtureRequest, database_url: str, tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(database_url if request.param == "postgresql" else f"sqlite:///{tmp_path}/empty.sqlite")
    yield engine
    engine.dispose()


@pytest.fixture
def postgres_engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    with engine.begin() as connection:
        migrations.upgrade(connection)
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


def test_an_upgrade_that_is_rolled_back_leaves_nothing(postgres_engine: Engine, database_url: str) -> None:
    with postgres_engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public"))

    with postgres_engine.connect() as connection:
        migrations.upgrade(connection)
        connection.rollback()

        assert inspect(connection).get_table_names() == []


def test_an_upgrade_runs_by_every_driver(world: World) -> None:
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
    ],
    ids=["null", "reserved", "reserved by case", "payload", "key", "headers", "kind"],
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


# --- roles -------------------------------------------------------------------------------------------------------


@pytest.fixture
def roles(postgres_engine: Engine, database_url: str) -> Iterator[str]:
    prefix = f"{postgres_engine.url.database}_"
    with postgres_engine.begin() as connection:
        create_roles(connection, prefix)
        create_roles(connection, prefix)
    yield prefix
    with postgres_engine.begin() as connection:
        for role in (*GRANTS, "migrator"):
            connection.exec_driver_sql(f"REASSIGN OWNED BY {prefix}{role} TO CURRENT_USER")
            connection.exec_driver_sql(f"DROP OWNED BY {prefix}{role}")
            connection.exec_driver_sql(f"DROP ROLE {prefix}{role}")


def may(connection: Connection, statement: str) -> bool:
    """Whether the current role may run it; a savepoint undoes the effect and the error."""
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql(statement)
    except ProgrammingError as error:
        if "permission denied" not in str(error):
            raise
        return False
    finally:
        savepoint.rollback()
    return True


def statements(table: str) -> dict[str, str]:
    columns = [column for column in tables.METADATA.tables[table].columns if column.name not in NEVER_GIVEN]
    first = columns[0].name
    insert = ", ".join(f'"{column.name}"' for column in columns if not column.identity)
    return {
        "SELECT": f"SELECT * FROM {table} LIMIT 0",
        "INSERT": f"INSERT INTO {table} ({insert}) SELECT {insert} FROM (SELECT {nulls(columns)}) AS v WHERE false",
        "UPDATE": f'UPDATE {table} SET "{first}" = DEFAULT WHERE false',
        "DELETE": f"DELETE FROM {table} WHERE false",
    }


def nulls(columns: list[Any]) -> str:
    return ", ".join(f'NULL::{column.type.compile(postgres_dialect())} AS "{column.name}"' for column in columns)


def postgres_dialect() -> Any:
    return create_engine("postgresql+psycopg://").dialect


@pytest.mark.parametrize("role", list(GRANTS))
def test_each_role_may_do_what_the_matrix_says_and_nothing_else(postgres_engine: Engine, roles: str, role: str) -> None:
    wrong = []
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {roles}{role}")
        for table in tables.METADATA.tables:
            granted = set(GRANTS[role].get(table, "").split(", "))
            for privilege, statement in statements(table).items():
                if may(connection, statement) != (privilege in granted):
                    wrong.append((table, privilege))

    assert wrong == []


def test_an_application_role_publishes_by_the_library_and_by_sql(postgres_engine: Engine, roles: str) -> None:
    with Session(postgres_engine) as session:
        session.connection().exec_driver_sql(f"SET ROLE {roles}app")
        publish(session, Noted("mine"), topic="notes")
        publish(session, Noted("later"), topic="notes", delay=timedelta(hours=1))
        session.flush()
        session.execute(text("SELECT outboxkit_emit('notes', 'order.noted', '{}')"))
        session.connection().exec_driver_sql("RESET ROLE")
        assert session.scalar(text("SELECT count(*) FROM outbox_messages")) == 2
        assert session.scalar(text("SELECT count(*) FROM outbox_waiting")) == 1
        session.rollback()


def test_an_application_may_ask_how_far_the_relays_are_behind_and_sees_no_message(
    postgres_engine: Engine, roles: str
) -> None:
    with Session(postgres_engine) as session:
        session.connection().exec_driver_sql(f"SET ROLE {roles}app")
        publish(session, Noted("mine"), topic="notes")
        session.flush()
        assert control.lag(session.connection()).depth == 1
        hidden = [column.name for column in tables.outbox_messages.c if column.name not in LAG]
        assert not [name for name in hidden if may(session.connection(), f"SELECT {name} FROM outbox_messages")]
        session.rollback()


def test_no_application_writes_its_own_position_or_transaction_id(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {roles}app")
        assert not may(connection, "INSERT INTO outbox_messages (xid) SELECT NULL::xid8 WHERE false")
        assert not may(connection, "CREATE TABLE mine (id int)")


# --- operators ---------------------------------------------------------------------------------------------------

CANARY = "canary-4f1d"
LETTER = "6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51"


@pytest.fixture
def trouble(postgres_engine: Engine, roles: str) -> str:
    """One row with a canary in each column that is hidden; a key that is parked behind a dead head."""
    with Session(postgres_engine) as session:
        publish(session, {"n": CANARY}, type="a", topic="notes", key=CANARY, headers={"h": CANARY})
        publish(session, {"n": CANARY}, type="a", topic="notes", key=CANARY, delay=timedelta(hours=1))
        session.commit()
    with postgres_engine.begin() as connection:
        for statement in (
            f"""INSERT INTO outbox_stopped_keys (topic, key, shard, position, reason)
                VALUES ('notes', '{CANARY}', 1, 77, 'parked'), ('notes', 'other', 1, 78, 'retry')""",
            f"""INSERT INTO dead_letters (id, side, topic, key, message_id, type, kind, headers, payload, position,
                    failure, stage, error_class, error, attempts, fingerprint)
                VALUES ('{LETTER}', 'relay', 'notes', '{CANARY}', 'm', 'a', 'event', '{CANARY}', '{CANARY}', 77,
                    'rejected', 'publish', 'E', 'no', 1, 'f'),
                (gen_random_uuid(), 'consumer', 'notes', '{CANARY}', 'm', 'a', 'event', '{CANARY}', '{CANARY}', 77,
                    'rejected', 'handle', 'E', 'no', 1, 'f')""",
            f"""INSERT INTO inbox_messages (consumer, message_id, content_hash, outcome)
                VALUES ('c', 'm', '{CANARY}', '{CANARY}')""",
            f"""INSERT INTO inbox_waiting (consumer, topic, key, payload, headers, origin, partition, "offset", reason)
                VALUES ('c', 't', '{CANARY}', '{CANARY}', '{CANARY}', 'o', 1, 1, 'retry')""",
            f"""INSERT INTO inbox_batches (id, consumer, host, expires_at, messages)
                VALUES (gen_random_uuid(), 'c', 'h', now(), '"{CANARY}"')""",
        ):
            connection.exec_driver_sql(statement)
    return roles


def test_the_operators_views_show_every_row_and_nothing_of_what_it_holds(postgres_engine: Engine, trouble: str) -> None:
    assert set(VIEWS) == {
        "dead_letters",
        "inbox_batches",
        "inbox_messages",
        "inbox_waiting",
        "outbox_messages",
        "outbox_stopped_keys",
        "outbox_waiting",
    }
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {trouble}operator")
        for table, view in VIEWS.items():
            rows = connection.exec_driver_sql(f"SELECT * FROM {view}").mappings().all()
            assert rows, view
            assert set(rows[0]) == {column.name for column in tables.METADATA.tables[table].c if not is_hidden(column)}
            assert not [row for row in rows if CANARY in str(dict(row)) or CANARY.encode().hex() in str(dict(row))]
            assert not may(connection, f"SELECT 1 FROM {table} LIMIT 0")
            assert not may(connection, f"DELETE FROM {view}")


@pytest.mark.parametrize("role", list(GRANTS))
def test_only_operators_have_the_views_and_the_functions(postgres_engine: Engine, trouble: str, role: str) -> None:
    calls = {
        "outboxkit_pause": "'destination', 'notes', 'why'",
        "outboxkit_resume": "'destination', 'notes'",
        "outboxkit_ask": "'notes', 78, 'release', 'why'",
        "outboxkit_discard": f"'{LETTER}', 'why'",
        "outboxkit_replay": f"'{LETTER}', 'why'",
    }
    assert set(calls) == set(FUNCTIONS)
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {trouble}{role}")
        allowed = [name for name, arguments in calls.items() if may(connection, f"SELECT {name}({arguments})")]
        visible = [view for view in VIEWS.values() if may(connection, f"SELECT 1 FROM {view}")]

    assert allowed == (list(calls) if role == "operator" else [])
    assert visible == (list(VIEWS.values()) if role == "operator" else [])


def test_what_an_operator_decides_is_done_and_written_down_under_the_logins_name(
    postgres_engine: Engine, trouble: str
) -> None:
    def call(statement: str) -> Any:
        return connection.exec_driver_sql(f"SELECT outboxkit_{statement}").scalar()

    with postgres_engine.begin() as connection:
        me = connection.exec_driver_sql("SELECT session_user").scalar()
        connection.exec_driver_sql(f"SET ROLE {trouble}operator")
        call("pause('destination', 'notes', 'broker is moved', '1 hour')")
        call("pause('destination', 'notes', 'longer')")
        paused = connection.exec_driver_sql("SELECT scope, target, reason, set_by, until FROM outbox_control").all()
        answers = [
            call("resume('destination', 'notes', 'moved')"),
            call("resume('destination', 'notes')"),
            call("ask('notes', 78, 'release', 'try again')"),
            call("ask('notes', 79, 'skip', 'there is none')"),
            call(f"replay('{LETTER}', 'consumer is repaired')"),
            call(f"replay('{LETTER}', 'twice')"),
            call("ask('notes', 77, 'release', 'a replay is not replaced')"),
            call(f"discard('{LETTER}', 'it is being replayed')"),
        ]
        connection.exec_driver_sql("RESET ROLE")
        asked = connection.exec_driver_sql("SELECT position, request, requested_by FROM outbox_stopped_keys ORDER BY 1")
        audit = connection.exec_driver_sql("SELECT who, action, target FROM outbox_audit ORDER BY id").all()

        assert [tuple(row) for row in paused] == [("destination", "notes", "longer", me, None)]
        assert answers == [True, False, True, False, True, False, False, False]
        assert asked.all() == [(77, "repair", me), (78, "release", me)]
        assert connection.exec_driver_sql("SELECT count(*) FROM outbox_control").scalar() == 0
        assert [tuple(row) for row in audit] == [
            (me, "control.pause", "destination notes"),
            (me, "control.pause", "destination notes"),
            (me, "control.resume", "destination notes"),
            (me, "quarantine.release", "notes at 78"),
            (me, "dlq.replay", LETTER),
        ]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("outboxkit_pause('galaxy', 'x', 'why')", "destination, a type or a key"),
        ("outboxkit_pause('type', 'x', '')", "has a reason"),
        ("outboxkit_ask('notes', 77, 'repair', 'why')", "released or skipped"),
        ("outboxkit_replay((SELECT id FROM dead_letters_redacted WHERE side = 'consumer'), 'why')", "not the head"),
    ],
)
def test_the_operators_functions_refuse_what_they_cannot_do_safely(
    postgres_engine: Engine, trouble: str, call: str, why: str
) -> None:
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {trouble}operator")
        with pytest.raises(DBAPIError, match=why):
            connection.exec_driver_sql(f"SELECT {call}")


def test_a_temporary_table_of_the_operators_takes_no_place(postgres_engine: Engine, trouble: str) -> None:
    with postgres_engine.begin() as connection:
        connection.exec_driver_sql(f"SET ROLE {trouble}operator")
        connection.exec_driver_sql("CREATE TEMPORARY TABLE outbox_audit (who text, action text, target text, why text)")
        connection.exec_driver_sql("SELECT outboxkit_pause('destination', 'notes', 'why')")
        connection.exec_driver_sql("RESET ROLE")
        assert connection.exec_driver_sql("SELECT count(*) FROM pg_temp.outbox_audit").scalar() == 0
        assert connection.exec_driver_sql("SELECT count(*) FROM public.outbox_audit").scalar() == 1
