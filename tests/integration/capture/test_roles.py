"""Database roles: each cell of the matrix both ways; operators decide through functions and see no message."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.orm import Session

from outboxkit import migrations, outbox, publish, tables
from outboxkit.headers import pack_headers
from outboxkit.migrations.roles import (
    COLUMNS,
    FUNCTIONS,
    GRANTS,
    LAG,
    NEVER_GIVEN,
    VIEWS,
    create_roles,
    is_hidden,
)
from tests.database_roles import drop_roles
from tests.integration.capture.model import Noted

pytestmark = pytest.mark.sqlalchemy_lines


@pytest.fixture
def roles(postgres_engine: Engine) -> Iterator[str]:
    prefix = f"{postgres_engine.url.database}_"
    with postgres_engine.begin() as connection:
        create_roles(connection, prefix)
        create_roles(connection, prefix)
    yield prefix
    with postgres_engine.begin() as connection:
        drop_roles(connection, prefix)


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
    every = tables.METADATA.tables[table].columns
    columns = [column for column in every if column.name not in NEVER_GIVEN and column.computed is None]
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


@pytest.mark.parametrize("role", list(GRANTS))
def test_each_column_may_be_written_by_whom_the_matrix_says(postgres_engine: Engine, roles: str, role: str) -> None:
    wrong = []
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {roles}{role}")
        for table in tables.METADATA.sorted_tables:
            for column in (column for column in table.c if not (column.identity or column.computed)):
                for privilege, statement in (
                    ("SELECT", f'SELECT "{column.name}" FROM {table.name} LIMIT 0'),
                    ("INSERT", f'INSERT INTO {table.name} ("{column.name}") SELECT NULL WHERE false'),
                    ("UPDATE", f'UPDATE {table.name} SET "{column.name}" = DEFAULT WHERE false'),
                ):
                    if _may_or_fits_not(connection, statement) != _granted(role, table.name, column.name, privilege):
                        wrong.append((table.name, column.name, privilege))
    assert wrong == []


def _granted(role: str, table: str, column: str, privilege: str) -> bool:
    whole = privilege in GRANTS[role].get(table, "").split(", ")
    if table == "outbox_messages" and privilege == "INSERT" and column in NEVER_GIVEN:
        whole = False
    return whole or column in COLUMNS.get(role, {}).get((table, privilege), ())


def _may_or_fits_not(connection: Connection, statement: str) -> bool:
    """Types are looked at before rights: a statement whose null has no type of the column is asked with a cast."""
    savepoint = connection.begin_nested()
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError as error:
        if "permission denied" in str(error):
            return False
        if "is of type" not in str(error):
            raise
        kind = str(error).split("is of type ")[1].split(" but")[0]
        savepoint.rollback()
        return _may_or_fits_not(connection, statement.replace("NULL WHERE", f"NULL::{kind} WHERE"))
    finally:
        if savepoint.is_active:
            savepoint.rollback()
    return True


def test_what_others_were_granted_is_taken_back_or_named(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.begin() as connection:
        assert migrations.check(connection) == []
        for statement in (
            "GRANT SELECT ON dead_letters TO PUBLIC",
            "GRANT UPDATE (state) ON dead_letters TO PUBLIC",
            "GRANT DELETE ON outbox_messages TO pg_monitor",
        ):
            connection.exec_driver_sql(statement)
        problems = migrations.check(connection)
        assert [problem.partition(":")[0] for problem in problems] == [
            "PUBLIC may SELECT, UPDATE on dead_letters",
            "pg_monitor may DELETE on outbox_messages",
        ]
        create_roles(connection, roles)
        assert [problem.partition(":")[0] for problem in migrations.check(connection)] == [
            "pg_monitor may DELETE on outbox_messages",
        ]


def test_who_wrote_an_entry_and_when_is_told_by_the_database(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.begin() as connection:
        me = connection.exec_driver_sql("SELECT session_user").scalar()
        connection.exec_driver_sql(f"SET LOCAL ROLE {roles}repairer")
        connection.exec_driver_sql(
            "INSERT INTO outbox_audit (who, action, target, at, login) VALUES ('x', 'a', 't', '2001-01-01', 'somebody')"
        )
        connection.exec_driver_sql("RESET ROLE")
        login, recent = connection.exec_driver_sql(
            "SELECT login, at > now() - interval '1 hour' FROM outbox_audit"
        ).one()

    assert (login, recent) == (me, True)


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
        assert outbox.lag(session.connection()).depth == 1
        hidden = [column.name for column in tables.outbox_messages.c if column.name not in LAG]
        assert not [name for name in hidden if may(session.connection(), f"SELECT {name} FROM outbox_messages")]
        session.rollback()


def test_no_application_writes_its_own_position_or_transaction_id(postgres_engine: Engine, roles: str) -> None:
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {roles}app")
        assert not may(connection, "INSERT INTO outbox_messages (xid) SELECT NULL::xid8 WHERE false")
        assert not may(connection, "CREATE TABLE mine (id int)")


# --- operators ---------------------------------------------------------------------------------------------------

CANARY = "rollout-4f1d"
PACKED = f"\\x{pack_headers((('h', CANARY.encode()),)).hex()}"  # as the rules of the table ask
LETTER = "6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51"


@pytest.fixture
def trouble(postgres_engine: Engine, roles: str) -> str:
    """One row with a rollout in each column that is hidden; a key that is parked behind a dead head."""
    with Session(postgres_engine) as session:
        publish(session, {"n": CANARY}, type="a", topic="notes", key=CANARY, headers={"h": CANARY})
        publish(session, {"n": CANARY}, type="a", topic="notes", key=CANARY, delay=timedelta(hours=1))
        session.commit()
    with postgres_engine.begin() as connection:
        for statement in (
            f"""INSERT INTO outbox_stopped_keys (topic, key, shard, position, reason)
                VALUES ('notes', '{CANARY}', 1, 77, 'parked'), ('notes', 'other', 1, 78, 'retry')""",
            f"""INSERT INTO dead_letters (id, side, topic, key, message_id, type, kind, headers, payload,
                    source_position, failure, stage, error_class, error, attempts, "group")
                VALUES ('{LETTER}', 'relay', 'notes', '{CANARY}', 'm', 'a', 'event', '{CANARY}', '{CANARY}', 77,
                    'rejected', 'publish', 'E', 'no', 1, 'f'),
                (gen_random_uuid(), 'consumer', 'notes', '{CANARY}', 'm', 'a', 'event', '{CANARY}', '{CANARY}', 77,
                    'rejected', 'handle', 'E', 'no', 1, 'f')""",
            f"""INSERT INTO inbox_messages (consumer, message_id, content_hash, outcome)
                VALUES ('c', 'm', '{CANARY}', '{CANARY}')""",
            f"""INSERT INTO inbox_waiting (consumer, topic, key, payload, headers, origin, partition, "offset", reason)
                VALUES ('c', 't', '{CANARY}', '{CANARY}', '{PACKED}', 'o', 1, 1, 'retry')""",
            f"""INSERT INTO outbox_sagas (saga, key, version, status, step, at, number, tries, done, undo, state,
                    history)
                VALUES ('s', 'k', 1, 'running', 'a', 0, 0, 0, '["{CANARY}"]', '[]', '{CANARY}', '["{CANARY}"]')""",
            f"""INSERT INTO outbox_idempotency (scope, key, request_hash, outcome, expires_at)
                VALUES ('s', 'k', '{CANARY}', '{CANARY}', now())""",
            f"""INSERT INTO dead_letter_replays (id, requested_by, why, options)
                VALUES (gen_random_uuid(), 'me', 'why', '"{CANARY}"')""",
            f"""INSERT INTO inbox_batches (id, consumer, host, expires_at, messages)
                VALUES (gen_random_uuid(), 'c', 'h', now(), '"{CANARY}"')""",
        ):
            connection.exec_driver_sql(statement)
    return roles


def test_the_operators_views_show_every_row_and_nothing_of_what_it_holds(postgres_engine: Engine, trouble: str) -> None:
    assert set(VIEWS) == {
        "dead_letter_replays",
        "dead_letters",
        "inbox_batches",
        "inbox_messages",
        "inbox_waiting",
        "outbox_idempotency",
        "outbox_messages",
        "outbox_sagas",
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
def test_only_operators_have_the_views_and_each_role_has_its_functions(
    postgres_engine: Engine, trouble: str, role: str
) -> None:
    calls = {
        "outboxkit_pause": "'destination', 'notes', 'why'",
        "outboxkit_resume": "'destination', 'notes'",
        "outboxkit_ask": "'notes', 78, 'release', 'why'",
        "outboxkit_discard": f"'{LETTER}', 'why'",
        "outboxkit_replay": f"'{LETTER}', 'why'",
        "outboxkit_prune": "'outbox_audit', '1 year', 1",
        "outboxkit_is_replay": f"'{LETTER}', '', '', ''",
    }
    assert set(calls) == {name for functions in FUNCTIONS.values() for name in functions}
    with postgres_engine.connect() as connection:
        connection.exec_driver_sql(f"SET ROLE {trouble}{role}")
        allowed = [name for name, arguments in calls.items() if may(connection, f"SELECT {name}({arguments})")]
        visible = [view for view in VIEWS.values() if may(connection, f"SELECT 1 FROM {view}")]

    assert allowed == list(FUNCTIONS.get(role, ()))
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
