"""Each broken set-up is named with its fix; a healthy one is met with silence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import Connection, Engine, MetaData, create_engine, insert, make_url, text

from outboxkit import dead_letters, outbox, schema_store, tables
from outboxkit._sql import database_now
from outboxkit.findings import Finding, FindingSeverity
from outboxkit.migrations import roles
from outboxkit.migrations.row_policies import separate_consumers
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit_relay.diagnose.doctor import doctor, examine
from outboxkit_relay.diagnose.patient import Patient, Thresholds
from outboxkit_relay.observe.sentences import to_text
from outboxkit_relay.observe.stats import Unavailable
from outboxkit_relay.settings import Settings
from tests import servers
from tests.integration.relay.diagnose.world import PATIENCE, dead_letter_of_billing, settings_of
from tests.integration.relay.world import engine_for, message, until, write

pytestmark = pytest.mark.usefixtures("durable")

AT_ONCE = timedelta(0)


def _patient(connection: Connection, settings: Settings, **others: Any) -> Patient:
    usual = {"metadata": None, "subscriptions": (), "role": "relay", "thresholds": Thresholds()}
    clock = lambda: datetime.now(UTC)  # noqa: E731
    return Patient(settings=settings, connection=connection, direct=connection, **{**usual, "clock": clock, **others})


def _names(found: list[Finding]) -> set[str]:
    assert all(one.seen and one.fix for one in found), found
    return {one.check for one in found if one.severity is not FindingSeverity.NOTE}


# --- what a transaction can break, and take back -----------------------------------------------------------------


def _sql(*statements: str) -> Callable[[Connection], None]:
    def plant(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    return plant


def _pending(connection: Connection) -> None:
    outbox.write(connection, [message(1)])


def _lax(connection: Connection) -> None:
    name = connection.dialect.identifier_preparer.quote(connection.engine.url.database or "")
    connection.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")


def _row_security(connection: Connection) -> None:
    role = f"nobody_{uuid4().hex[:8]}"
    _sql(
        "ALTER TABLE outbox_waiting ENABLE ROW LEVEL SECURITY",
        f"CREATE ROLE {role}",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"SET LOCAL ROLE {role}",
    )(connection)


def _rights(connection: Connection) -> None:
    prefix = f"t{uuid4().hex[:8]}_"
    roles.create_roles(connection, prefix)
    _sql(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {prefix}app", f"SET LOCAL ROLE {prefix}app")(connection)


def _relay(connection: Connection, **values: Any) -> None:
    usual = {"id": uuid4(), "host": "box", "version": "0", "expires_at": database_now(timedelta(minutes=1))}
    connection.execute(insert(tables.outbox_relays).values(**{**usual, **values}))


def _unavailable(connection: Connection) -> None:
    one = Unavailable(topic="orderz", failure="unknown-topic", reason="no topic", since=datetime.now(UTC), tries=3)
    _relay(connection, version=_version(), state=to_text([one]))


def _version() -> str:
    return version("outboxkit")


def _forgotten_pause(connection: Connection) -> None:
    pauses.pause(connection, Target(Scope.DESTINATION, "orders"), by="ana", reason="night")
    _sql("UPDATE outbox_control SET set_at = set_at - interval '8 days'")(connection)


def _late_replay(connection: Connection) -> None:
    letter = dead_letter_of_billing(connection)
    dead_letters.replay(connection, [letter.id], by="ana", why="x")
    _relay(connection, version=_version())
    _sql("UPDATE dead_letters SET replaying_since = replaying_since - interval '1 hour'")(connection)


def _absent_consumer(connection: Connection) -> None:
    values = {"consumer": "renamed", "topic": "orders", "payload": b"", "headers": b"", "origin": "", "partition": 0}
    connection.execute(insert(tables.inbox_waiting).values(**values, offset=0, reason="retry"))


def _drift(connection: Connection) -> None:
    def schema(kind: str) -> str:
        return json.dumps({"type": "record", "name": "Order", "fields": [{"name": "n", "type": kind}]})

    for role, text_ in (("writer", schema("string")), ("reader", schema("int"))):
        values = {"role": role, "consumer": "billing" if role == "reader" else "", "type": "order.placed"}
        values |= {"fingerprint": schema_store.fingerprint_of(text_), "text": text_}
        connection.execute(insert(tables.outbox_schemas).values(values))


BROKEN: dict[str, Callable[[Connection], None]] = {
    "tables": _sql("ALTER TABLE outbox_ledger DROP COLUMN outcome"),
    "isolation": _sql("SET LOCAL default_transaction_isolation = 'repeatable read'"),
    "autovacuum": _sql("ALTER TABLE outbox_messages SET (autovacuum_enabled = false)"),
    "autovacuum-scale": _sql("ALTER TABLE outbox_messages RESET (autovacuum_vacuum_scale_factor)"),
    "unlogged-table": _sql("ALTER TABLE inbox_messages SET UNLOGGED"),
    "sequence-cache": _sql("ALTER SEQUENCE outbox_messages_position_seq CACHE 50"),
    "foreign-grants": _sql("GRANT SELECT ON dead_letters TO PUBLIC"),
    "foreign-trigger": _sql(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER swallow BEFORE INSERT ON outbox_messages FOR EACH ROW EXECUTE FUNCTION swallow()",
    ),
    "audit-trigger": _sql("ALTER TABLE outbox_audit DISABLE TRIGGER outboxkit_audit"),
    "time-trigger": _sql("DROP TRIGGER outboxkit_closed ON dead_letters"),
    "schemas": _sql("CREATE SCHEMA other", "CREATE TABLE other.outbox_version (id int)"),
    "commit-durability": _lax,
    "row-security": _row_security,
    "grants": _rights,
    "relay-absent": _pending,
    "relay-ended": lambda connection: _relay(connection, ended="the login was refused"),
    "destination-unavailable": _unavailable,
    "pause-forgotten": _forgotten_pause,
    "replay-late": _late_replay,
    "consumer-absent": _absent_consumer,
    "schema-drift": _drift,
    "retention-behind": _sql(
        "INSERT INTO outbox_ledger (relay, topic, published_at, outcome, min_id, max_id, ids, partitions, offsets) "
        "SELECT gen_random_uuid(), 'orders', now() - interval '5 days', 'published', one, one, ARRAY[one], '{0}', '{1}'"
        " FROM gen_random_uuid() AS one"
    ),
}


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = engine_for(database_url)
    yield found
    found.dispose()


def test_each_broken_database_is_named_with_its_fix_and_no_other(engine: Engine, database_url: str) -> None:
    with engine.connect() as connection:
        for name, plant in BROKEN.items():
            plant(connection)
            found = examine(_patient(connection, settings_of(database_url)))
            connection.rollback()

            assert _names(found) == {name}, found
        assert examine(_patient(connection, settings_of(database_url))) == []
        assert len(BROKEN) >= 20


@pytest.mark.parametrize("role", ["relay", "consumer", "app", "repairer"])
def test_a_healthy_database_is_met_with_silence_by_each_role(engine: Engine, database_url: str, role: str) -> None:
    prefix = f"t{uuid4().hex[:8]}_"
    with engine.begin() as connection:
        roles.create_roles(connection, prefix)
        outbox.write(connection, [message(1)])
        _relay(connection, version=_version())
    login = make_url(database_url).update_query_dict({"options": f"-c role={prefix}{role}"})

    found = doctor(settings_of(login.render_as_string(hide_password=False)), patience=PATIENCE, role=role)

    assert _names(found) == set(), found
    assert {one.check for one in found} <= {"not-examined"}  # what the role may not see


def test_a_consumer_that_could_not_tell_a_replay_for_others_is_named(engine: Engine, database_url: str) -> None:
    prefix = f"t{uuid4().hex[:8]}_"
    with engine.begin() as connection:
        roles.create_roles(connection, prefix)
        connection.exec_driver_sql(f"CREATE ROLE {prefix}billing IN ROLE {prefix}consumer")
        separate_consumers(connection, {f"{prefix}billing": ["billing"]}, prefix)
        _relay(connection, version=_version())
    login = make_url(database_url).update_query_dict({"options": f"-c role={prefix}billing"})
    settings = settings_of(login.render_as_string(hide_password=False))

    assert _names(doctor(settings, patience=PATIENCE, role="consumer")) == set()
    with engine.begin() as connection:  # as an older version has left it
        connection.exec_driver_sql("DROP FUNCTION outboxkit_is_replay")
    found = doctor(settings, patience=PATIENCE, role="consumer")

    assert _names(found) == {"replay-hidden"}, found
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP ROLE {prefix}billing")


# --- what needs more than a transaction --------------------------------------------------------------------------


def test_whatever_keeps_vacuum_from_working_is_named(engine: Engine, database_url: str) -> None:
    name = f"doctor_{uuid4().hex[:8]}"
    at_once = Thresholds(transaction=AT_ONCE, dead_rows=50)
    with engine.connect() as holder, engine.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
        outbox.write(holder, [message(1)])
        write(engine, *(message(number) for number in range(100)))
        _sql(
            "ALTER TABLE outbox_messages SET (autovacuum_vacuum_threshold = 1000000)",
            "DELETE FROM outbox_messages",
            f"BEGIN; DELETE FROM outbox_control; PREPARE TRANSACTION '{name}'",
            f"SELECT pg_create_physical_replication_slot('{name}', true)",
            "SELECT pg_stat_force_next_flush()",
        )(other)
        try:
            until(
                lambda: (
                    _count(other, "SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'outbox_messages'") > 50
                )
            )
            found = doctor(settings_of(database_url), patience=PATIENCE, thresholds=at_once)
        finally:
            _sql(f"ROLLBACK PREPARED '{name}'", f"SELECT pg_drop_replication_slot('{name}')")(other)

    expected = {"long-transaction", "prepared-transaction", "replication-slot", "dead-rows"}
    assert _names(found) == expected, found
    fixes = "\n".join(one.fix for one in found)
    assert "pg_terminate_backend(" in fixes
    assert f"ROLLBACK PREPARED '{name}'" in fixes
    assert f"pg_drop_replication_slot('{name}')" in fixes


def _count(connection: Connection, statement: str) -> int:
    return int(connection.execute(text(statement)).scalar_one())


def test_a_sequence_that_a_restore_left_behind_is_named(engine: Engine, database_url: str) -> None:
    write(engine, *(message(number) for number in range(5)))
    with engine.begin() as connection:
        _relay(connection, version=_version())
        _sql("SELECT setval('outbox_messages_position_seq', 2)")(connection)

    (found,) = doctor(settings_of(database_url), patience=PATIENCE)

    assert (found.check, found.fix) == ("sequence-behind", "SELECT setval('outbox_messages_position_seq', 5)")


def test_a_server_that_forgets_what_it_has_confirmed_is_named(postgres: servers.Server, engine: Engine) -> None:
    url = engine.url.render_as_string(hide_password=False)
    changed = ("full_page_writes", "autovacuum")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        try:
            _sql(*(f"ALTER SYSTEM SET {name} = off" for name in changed), "SELECT pg_reload_conf()")(connection)
            until(lambda: connection.scalar(text("SHOW full_page_writes")) == "off")
            found = doctor(settings_of(url), patience=PATIENCE)
        finally:
            _sql(*(f"ALTER SYSTEM RESET {name}" for name in changed), "SELECT pg_reload_conf()")(connection)
        until(lambda: connection.scalar(text("SHOW full_page_writes")) == "on")

    assert _names(found) == {"durability", "autovacuum"}
    assert "ALTER SYSTEM SET full_page_writes = on" in found[0].fix


def test_a_pooler_before_the_reading_connection_is_named(
    engine: Engine, database_url: str, pooler: servers.Server
) -> None:
    behind = make_url(pooler.url).set(database=engine.url.database).render_as_string(hide_password=False)
    listening: dict[str, Any] = {"relay": {"wake": "notify"}, "database_direct_url": SecretStr(behind)}

    wrong = doctor(settings_of(behind, **listening), patience=PATIENCE)
    right = doctor(settings_of(behind, database_direct_url=SecretStr(database_url)), patience=PATIENCE)
    refused = doctor(settings_of(behind), patience=PATIENCE)  # it takes no start-up options

    assert _names(wrong) == {"pooler", "listen"}
    assert right == []
    assert _names(refused) == {"database"}
    assert "set database_direct_url" in refused[0].seen


def test_clocks_that_disagree_are_named(engine: Engine, database_url: str) -> None:
    late = doctor(settings_of(database_url), patience=PATIENCE, clock=lambda: datetime.now(UTC) - timedelta(minutes=1))
    early = doctor(settings_of(database_url), patience=PATIENCE, clock=lambda: datetime.now(UTC) + timedelta(minutes=1))

    assert [(one.check, word in one.seen) for one, word in ((late[0], "behind"), (early[0], "ahead of"))] == [
        ("clock-skew", True),
        ("clock-skew", True),
    ]


def test_settings_that_contradict_each_other_are_named(tmp_path: Path) -> None:
    engine = engine_for(f"sqlite:///{tmp_path}/app.db")
    engine.dispose()
    wrong: dict[str, Any] = {
        "relay": {"wake": "notify"},
        "retention": {"inbox": "1d", "replay_horizon": "7d"},
        "failpoints": "settle.before_commit=exit",
    }

    found = doctor(settings_of(f"sqlite:///{tmp_path}/app.db", **wrong), patience=PATIENCE)
    no_broker = doctor(Settings(database_url=SecretStr(f"sqlite:///{tmp_path}/app.db")), patience=PATIENCE)

    assert _names(found) == {"wake", "retention-inbox", "failpoints"}
    assert _names(no_broker) == {"settings"}
    assert doctor(settings_of(f"sqlite:///{tmp_path}/app.db"), patience=PATIENCE) == []


def test_alembic_would_drop_tables_that_the_applications_metadata_lacks(engine: Engine, database_url: str) -> None:
    whole = MetaData()
    tables.outbox_tables(whole)

    (found,) = doctor(settings_of(database_url), patience=PATIENCE, metadata=MetaData())

    assert found.check == "alembic-drops"
    assert "outbox_tables(Base.metadata)" in found.fix
    assert doctor(settings_of(database_url), patience=PATIENCE, metadata=whole) == []


def test_a_database_that_is_no_right_place_is_named(postgres: servers.Server, tmp_path: Path) -> None:
    name = f"latin_{uuid4().hex[:8]}"
    url = make_url(postgres.url).set(database=name).render_as_string(hide_password=False)
    server = create_engine(postgres.url, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        _sql(f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")(connection)
        try:
            empty = doctor(settings_of(url), patience=PATIENCE)
        finally:
            _sql(f"DROP DATABASE {name} WITH (FORCE)")(connection)
    server.dispose()

    missing = doctor(settings_of(url), patience=PATIENCE)
    closed = doctor(settings_of("postgresql+psycopg://ana@127.0.0.1:1/app"), patience=PATIENCE)

    assert _names(empty) == {"encoding", "tables"}
    assert next(one.fix for one in empty if one.check == "tables") == "run `outboxkit init` (or your migration)"
    assert _names(missing) == _names(closed) == {"database"}
    assert "cannot be reached" in closed[0].seen
