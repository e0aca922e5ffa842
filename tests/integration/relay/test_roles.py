"""A relay needs no more than its database role may do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, text, update
from sqlalchemy.exc import DataError, ProgrammingError

from outboxkit import outbox, tables
from outboxkit.migrations.roles import create_roles
from outboxkit.policy import Failure, Order, RetryPolicy, full_jitter
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.settings import Retention
from outboxkit_relay.store import retention
from tests.database_roles import drop_roles
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write

KEPT = Retention()
QUICK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1))


@pytest.fixture
def owner(database_url: str) -> Iterator[tuple[Engine, str]]:
    """The owner's engine, and the prefix of this database's roles: roles belong to the whole cluster."""
    engine = engine_for(database_url)
    prefix = f"{engine.url.database}_"
    with engine.begin() as connection:
        create_roles(connection, prefix)
    yield engine, prefix
    with engine.begin() as connection:
        drop_roles(connection, prefix)
    engine.dispose()


@pytest.fixture
def restricted(owner: tuple[Engine, str], database_url: str) -> Iterator[Engine]:
    """The engine of a login that is a relay and nothing else."""
    engine = engine_for(database_url)

    @event.listens_for(engine, "connect")
    def become(connection: Any, _record: object) -> None:
        connection.execute(f"SET ROLE {owner[1]}relay")
        connection.commit()

    engine.dispose()  # what is open was the owner's
    yield engine
    engine.dispose()


MIXED = {
    "outbox_ledger": """
        INSERT INTO outbox_ledger (relay, topic, published_at, outcome, min_id, max_id, ids, partitions, offsets)
        SELECT gen_random_uuid(), at::text, at, 'published', gen_random_uuid(), gen_random_uuid(), '{}', '{}', '{}'
        FROM ages""",
    "outbox_audit": "INSERT INTO outbox_audit (who, action, target) SELECT 'ana', 'x', at::text FROM ages",
    "outbox_idempotency": "INSERT INTO outbox_idempotency (scope, key, expires_at) SELECT 's', at::text, at FROM ages",
    "inbox_messages": """
        INSERT INTO inbox_messages (consumer, message_id, handled_at)
        SELECT 'billing', at || ' ' || n, at FROM ages, generate_series(1, 2) AS n""",
    "dead_letters": """
        INSERT INTO dead_letters (id, side, consumer, topic, message_id, type, kind, headers, failure, stage,
            error_class, error, attempts, "group", closed_at)
        SELECT gen_random_uuid(), 'consumer', 'billing', 't', at || ' ' || n, 't', 'event', '', 'poison', 'decode', 'E',
            '', 1, 'g', CASE n WHEN 1 THEN at END
        FROM ages, generate_series(1, 2) AS n""",
    "outbox_sagas": """
        INSERT INTO outbox_sagas (saga, key, version, status, step, at, number, tries, done, undo, state, history,
            updated_at)
        SELECT status, ages.at::text, 1, status, '', 0, 0, 0, '[]', '[]', '', '[]', ages.at
        FROM ages, unnest(ARRAY['running', 'compensating', 'completed', 'compensated', 'stuck']) AS status""",
}
AGES = "SELECT clock_timestamp() - n * interval '1 hour' AS at FROM unnest(ARRAY[1, 2, 3, 10001, 10002, 10003]) AS n"


def _filled(engine: Engine) -> None:
    """Rows of each kind, three that are hours old and three that are a year old."""
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE TEMPORARY TABLE ages ON COMMIT DROP AS {AGES}")
        for statement in MIXED.values():
            connection.exec_driver_sql(statement)
        connection.exec_driver_sql("UPDATE outbox_audit SET at = target::timestamptz")  # a trigger has written the time


def test_a_relay_cleans_up_as_its_role_what_the_owner_would(owner: tuple[Engine, str], restricted: Engine) -> None:
    assert set(MIXED) == set(retention.PRUNED)
    _filled(owner[0])
    with owner[0].connect() as connection:
        expected = {name: retention.prune_table(connection, KEPT, name, limit=100) for name in retention.PRUNED}
        connection.rollback()
    assert min(expected.values()) > 0

    with restricted.begin() as connection:
        assert retention.prune_table(connection, KEPT, "outbox_ledger", limit=2) == 2
    with restricted.begin() as connection:
        found = {name: retention.prune_table(connection, KEPT, name, limit=100) for name in retention.PRUNED}
    assert found == expected | {"outbox_ledger": expected["outbox_ledger"] - 2}


def test_a_relay_leaves_what_another_transaction_holds(owner: tuple[Engine, str], restricted: Engine) -> None:
    _filled(owner[0])
    with owner[0].begin() as holding, restricted.begin() as connection:
        holding.exec_driver_sql("SELECT 1 FROM outbox_audit FOR UPDATE")
        assert retention.prune_table(connection, KEPT, "outbox_audit", limit=100) == 0


@pytest.mark.parametrize(
    ("relation", "kept"),
    [
        ("outbox_audit", "29 days"),
        ("inbox_messages", "23 hours"),
        ("dead_letters", "1 hour"),
        ("outbox_ledger", "0"),
        ("outbox_messages", "1000 days"),
        ("outbox_version", "1000 days"),
        ("outbox_audit", None),
        (None, "1000 days"),
    ],
)
def test_no_relay_deletes_what_is_young_or_on_its_way(
    owner: tuple[Engine, str], restricted: Engine, relation: str | None, kept: str | None
) -> None:
    _filled(owner[0])
    with restricted.begin() as connection, pytest.raises(ProgrammingError, match="a relay does not delete"):
        connection.execute(text("SELECT outboxkit_prune(:relation, :kept, 9)"), {"relation": relation, "kept": kept})


@pytest.mark.parametrize("at_most", [None, 0, -1, 100_001])
def test_a_relay_deletes_in_portions(owner: tuple[Engine, str], restricted: Engine, at_most: int | None) -> None:
    with restricted.begin() as connection, pytest.raises(DataError, match="portion"):
        connection.execute(text("SELECT outboxkit_prune('outbox_audit', '1 year', :at_most)"), {"at_most": at_most})


@pytest.mark.parametrize("role", ["relay", "consumer"])
def test_nobody_erases_an_open_letter_by_closing_it_in_the_past(
    owner: tuple[Engine, str], restricted: Engine, role: str
) -> None:
    engine, prefix = owner
    _filled(engine)
    dated = "UPDATE dead_letters SET state = '{}', closed_at = '2000-01-01' WHERE closed_at IS NULL"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}{role}")
        for state in ("discarded", "replaying", "replayed"):
            with pytest.raises(ProgrammingError, match="decide"), connection.begin_nested():
                connection.exec_driver_sql(dated.format(state))
        assert connection.exec_driver_sql(dated.format("dead")).rowcount == 6, "nothing changes"
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM dead_letters WHERE closed_at IS NULL")) == 6


@pytest.mark.parametrize(
    ("role", "states"),
    [
        ("relay", ("replaying", "replayed")),
        ("consumer", ("replaying", "replayed")),
        ("repairer", ("dead", "discarded")),
        ("repairer", ("dead", "replayed")),
    ],
)
def test_when_a_letter_was_closed_is_told_by_the_database(
    owner: tuple[Engine, str], restricted: Engine, role: str, states: tuple[str, str]
) -> None:
    engine, prefix = owner
    _filled(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE dead_letters SET state = '{states[0]}', closed_at = NULL")
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}{role}")
        connection.exec_driver_sql(f"UPDATE dead_letters SET state = '{states[1]}', closed_at = '2000-01-01'")
    with restricted.begin() as connection:
        assert connection.scalar(text("SELECT outboxkit_prune('dead_letters', '1 day', 100)")) == 0
    with engine.begin() as connection:
        assert (
            connection.scalar(text("SELECT count(*) FROM dead_letters WHERE closed_at > now() - interval '1 h'")) == 12
        )
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}repairer")
        connection.exec_driver_sql("UPDATE dead_letters SET state = 'dead', closed_at = '2000-01-01'")
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(closed_at) FROM dead_letters")) == 0, "an open one has no time"


def test_no_consumer_erases_a_saga_by_ending_it_in_the_past(owner: tuple[Engine, str], restricted: Engine) -> None:
    engine, prefix = owner
    _filled(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}consumer")
        connection.exec_driver_sql("UPDATE outbox_sagas SET status = 'completed', updated_at = '2000-01-01'")
    with restricted.begin() as connection:
        assert connection.scalar(text("SELECT outboxkit_prune('outbox_sagas', '1 day', 100)")) == 0


def test_a_relay_publishes_retries_buries_and_releases_as_its_role(
    owner: tuple[Engine, str], restricted: Engine
) -> None:
    engine = owner[0]
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    with engine.begin() as connection:
        outbox.schedule(connection, [(message(9, key="later"), timedelta(milliseconds=100))])
    write(engine, *(message(number) for number in range(3)), message(7, key="other"))

    with relaying(restricted, publisher, RelayConfig(retry=QUICK, order=Order.STRICT), lease=timedelta(seconds=1)):
        until(lambda: count(engine, tables.dead_letters) == 1, "the head is dead")
        with engine.begin() as connection:
            connection.execute(update(tables.outbox_stopped_keys).values(request="release", requested_by="ana"))
        until(lambda: len(publisher.accepted) == 4, "everything else is published")
        until(lambda: count(engine, tables.outbox_messages) == count(engine, tables.outbox_waiting) == 0)

    assert sorted(int(row.payload) for row in publisher.accepted) == [1, 2, 7, 9]
    assert count(engine, tables.outbox_relays) == 0
