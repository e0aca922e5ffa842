"""Edges E41-E61: the relay and its PostgreSQL, where no other test stands for them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import OperationalError

from outboxkit import migrations, outbox, tables
from outboxkit.brokers import Batch, Receipts
from outboxkit.dialects import open_engine
from outboxkit.errors import LeaseLost
from outboxkit.policy import Failure, Followers, Order, RetryPolicy, full_jitter
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.store import leases
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write
from tests.servers import postgres as servers

QUICK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1))
FOR_EVER = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1), followers=Followers.BLOCK)
OURS = "datname = current_database() AND application_name = 'outboxkit' AND pid <> pg_backend_pid()"
WAITS_FOR_STANDBY = f"FROM pg_stat_activity WHERE {OURS} AND wait_event = 'SyncRep'"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = engine_for(database_url)
    yield found
    found.dispose()


def run(engine: Engine, statement: str) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql(statement)


def scalar(engine: Engine, question: str) -> Any:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return connection.exec_driver_sql(question).scalar_one()


def numbers(publisher: ScriptedPublisher) -> list[int]:
    return [int(row.payload) for row in publisher.accepted]


def registered(engine: Engine) -> UUID:
    relay = uuid4()
    with engine.begin() as connection:
        leases.register(connection, relay, host="here", version="", lease=timedelta(hours=1))
    return relay


class Looking(ScriptedPublisher):
    """Looks, while it is called, whether a transaction of the relay stays open."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine

    def publish(self, batch: Batch) -> Future[Receipts]:
        until(
            lambda: (
                scalar(self._engine, f"SELECT count(*) FROM pg_stat_activity WHERE {OURS} AND xact_start < now()") == 0
            )
        )
        return super().publish(batch)


def test_e41_no_transaction_of_the_relay_is_open_while_the_broker_is_called(engine: Engine, database_url: str) -> None:
    patient = open_engine(database_url, patience=timedelta(minutes=1))  # else the server ends what stays open
    publisher = Looking(engine)
    write(engine, *(message(number) for number in range(5)))

    with relaying(patient, publisher, lease=timedelta(minutes=1)):
        until(lambda: numbers(publisher) == [0, 1, 2, 3, 4])
    patient.dispose()


def test_e43_a_stopped_key_is_held_back_by_the_next_relay_too(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(engine, message(0), message(1))
    with relaying(engine, publisher, RelayConfig(retry=QUICK, order=Order.STRICT)):
        until(lambda: count(engine, tables.dead_letters) == 1)

    write(engine, message(2), message(3, key="other"))
    with relaying(engine, publisher, RelayConfig(retry=QUICK, order=Order.STRICT)):
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert numbers(publisher) == [3]
    assert count(engine, tables.outbox_waiting) == 2


def test_e48_however_many_messages_are_tried_again_fresh_ones_are_not_held_up(engine: Engine) -> None:
    publisher, many = ScriptedPublisher(), 500
    publisher.refuse = lambda row: Failure.REJECTED if row.key != b"fresh" else None
    write(engine, *(message(number, key=f"bad{number}") for number in range(many)))

    with relaying(engine, publisher, RelayConfig(retry=FOR_EVER), lease=timedelta(seconds=9)):
        until(lambda: count(engine, tables.outbox_waiting) == many)
        write(engine, *(message(number, key="fresh") for number in range(100)))
        until(lambda: numbers(publisher) == list(range(100)))

    assert count(engine, tables.outbox_waiting) == many


def test_e50_messages_are_inserted_and_deleted_and_never_updated_and_a_claim_writes_no_row(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    write(engine, *(message(number) for number in range(50)))
    with relaying(engine, publisher):
        until(lambda: count(engine, tables.outbox_messages) == 0)
    relay = registered(engine)
    where = f"SELECT concat(ctid, xmin, xmax) FROM outbox_relays WHERE id = '{relay}'"

    before = scalar(engine, where)
    with engine.connect() as connection:
        outbox.confirm_lease(connection, relay)

    assert scalar(engine, where) == before
    engine.dispose()  # a session that ends tells what it did
    told = "SELECT {} FROM pg_stat_user_tables WHERE relname = 'outbox_messages'"
    until(lambda: scalar(engine, told.format("n_tup_del")) == 50)
    assert scalar(engine, told.format("n_tup_upd")) == 0


@contextmanager
def claiming(engine: Engine) -> Iterator[Future[timedelta]]:
    """A claim that waits for a synchronous standby, which there is not, until the end of the block at the latest."""
    relay, outcome, is_over = registered(engine), Future[timedelta](), threading.Event()

    def claim() -> None:
        with engine.connect() as connection:
            try:
                left = outbox.confirm_lease(connection, relay)
                while not is_over.is_set():  # the server's processes obey one after the other: the first may not wait
                    left = outbox.confirm_lease(connection, relay)
                outcome.set_result(left)
            except LeaseLost as error:
                outcome.set_exception(error)

    thread = threading.Thread(target=claim)
    run(engine, "ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
    try:
        run(engine, "SELECT pg_reload_conf()")
        until(lambda: scalar(engine, "SHOW synchronous_standby_names") == "nobody")
        thread.start()
        until(lambda: scalar(engine, f"SELECT count(*) {WAITS_FOR_STANDBY}") == 1)
        yield outcome
    finally:
        is_over.set()
        run(engine, "ALTER SYSTEM RESET synchronous_standby_names")
        run(engine, "SELECT pg_reload_conf()")
        thread.join()


def test_e54_where_a_standby_is_synchronous_a_claim_waits_for_it(engine: Engine) -> None:
    with claiming(engine) as outcome:
        assert not outcome.done()

    assert outcome.result(0) > timedelta(0)


def test_e54_a_claim_whose_wait_for_a_standby_was_cut_short_has_failed(engine: Engine) -> None:
    with claiming(engine) as outcome:
        scalar(engine, f"SELECT pg_cancel_backend(pid) {WAITS_FOR_STANDBY}")
        until(outcome.done)

    with pytest.raises(LeaseLost):
        outcome.result(0)


def test_e55_a_standby_is_waited_for_and_nothing_is_published_before_it_is_the_primary(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = servers.private("standby")
    try:
        server.start()
        engine = engine_for(servers.create_database(server.url))
        write(engine, message(1))
        engine.dispose()
        server.stop()
        (server.folder / "data" / "standby.signal").touch()
        server.start()
        assert scalar(engine, "SELECT pg_is_in_recovery()")

        publisher = ScriptedPublisher()
        with relaying(engine, publisher):
            until(lambda: "database.away" in caplog.text)
            (away,) = [record for record in caplog.records if record.message == "database.away"]
            assert "read-only transaction" in vars(away)["error"]
            assert publisher.sent == []
            scalar(engine, "SELECT pg_promote()")
            until(lambda: numbers(publisher) == [1])
        engine.dispose()
    finally:
        server.close()


def test_e56_a_connection_that_is_half_open_is_given_up_within_seconds(engine: Engine) -> None:
    """What the operating system was told, for an engine whose patience is three seconds."""
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        with socket.fromfd(driver.fileno(), socket.AF_INET, socket.SOCK_STREAM) as line:
            asked = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert [line.getsockopt(socket.IPPROTO_TCP, option) for option in asked] == [3, 1, 3, 6000]


def test_e57_what_row_level_security_hides_from_the_relay_stays_until_it_may_see_it(
    engine: Engine, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = f"{engine.url.database}_half"
    run(engine, f"CREATE ROLE {role}")
    run(engine, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}")
    run(engine, "ALTER TABLE outbox_messages ENABLE ROW LEVEL SECURITY")
    run(engine, f"CREATE POLICY half ON outbox_messages TO {role} USING (topic = 'seen')")
    restricted = engine_for(database_url)
    restricted.dispose()

    @event.listens_for(restricted, "connect")
    def become(connection: Any, _record: object) -> None:
        connection.execute(f"SET ROLE {role}")
        connection.commit()

    publisher = ScriptedPublisher()
    write(engine, message(1, topic="hidden"), message(2, topic="seen"))
    try:
        with relaying(restricted, publisher):
            until(lambda: numbers(publisher) == [2])
            until(lambda: count(engine, tables.outbox_messages) == 1)
        told = [vars(record)["tables"] for record in caplog.records if record.message == "relay.rows_hidden"]
        assert told == [["outbox_messages"]]
        caplog.clear()
        run(engine, "ALTER TABLE outbox_messages DISABLE ROW LEVEL SECURITY")
        with relaying(restricted, publisher):
            until(lambda: numbers(publisher) == [2, 1])
        assert "relay.rows_hidden" not in caplog.text
    finally:
        restricted.dispose()
        run(engine, f"DROP OWNED BY {role}")
        run(engine, f"DROP ROLE {role}")


@pytest.mark.parametrize("condition", ["serialization_failure", "deadlock_detected", "lock_not_available"])
def test_e60_a_conflict_in_the_database_is_tried_again_and_is_no_messages_fault(engine: Engine, condition: str) -> None:
    run(engine, "CREATE SEQUENCE tries")
    run(
        engine,
        f"""CREATE FUNCTION once() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN IF nextval('tries') = 1 THEN RAISE {condition}; END IF; RETURN NULL; END $$""",
    )
    run(engine, "CREATE TRIGGER once AFTER DELETE ON outbox_messages EXECUTE FUNCTION once()")
    publisher = ScriptedPublisher()
    write(engine, *(message(number) for number in range(3)))

    with relaying(engine, publisher):
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert scalar(engine, "SELECT last_value FROM tries") > 1, "void: there was no conflict"
    assert sorted(set(numbers(publisher))) == [0, 1, 2]
    assert count(engine, tables.outbox_waiting) == count(engine, tables.dead_letters) == 0


def test_e61_an_upgrade_that_does_not_get_its_lock_gives_up_and_queues_nobody_behind_it(
    engine: Engine, database_url: str
) -> None:
    impatient = open_engine(database_url, patience=timedelta(milliseconds=200))
    with engine.begin() as slow, impatient.connect() as connection:
        slow.execute(text("LOCK TABLE outbox_version IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(OperationalError, match="timeout"):
            migrations.upgrade(connection)
    impatient.dispose()


def test_e61_messages_are_written_and_published_while_an_upgrade_is_under_way(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    with engine.connect() as connection, connection.begin():
        migrations.upgrade(connection)

        write(engine, message(1))
        with relaying(engine, publisher):
            until(lambda: numbers(publisher) == [1])
