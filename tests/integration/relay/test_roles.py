"""A relay needs no more than its database role may do."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, update

from outboxkit import outbox, tables
from outboxkit.migrations.roles import GRANTS, create_roles
from outboxkit.policy import Failure, Order, RetryPolicy, full_jitter
from outboxkit_relay.core.state import RelayConfig
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write

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
        for role in (*GRANTS, "migrator"):
            connection.exec_driver_sql(f"REASSIGN OWNED BY {prefix}{role} TO CURRENT_USER")
            connection.exec_driver_sql(f"DROP OWNED BY {prefix}{role}")
            connection.exec_driver_sql(f"DROP ROLE {prefix}{role}")
    engine.dispose()


def test_a_relay_publishes_retries_buries_and_releases_as_its_role(
    owner: tuple[Engine, str], database_url: str
) -> None:
    engine, prefix = owner
    restricted = engine_for(database_url)

    @event.listens_for(restricted, "connect")
    def become(connection: Any, _record: object) -> None:
        connection.execute(f"SET ROLE {prefix}relay")
        connection.commit()

    restricted.dispose()
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
    restricted.dispose()
