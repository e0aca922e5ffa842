"""Relays clean up by themselves: what retention no longer keeps, a little at a time, one relay of all."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, insert, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.errors import ConfigurationError
from outboxkit_relay import load
from outboxkit_relay.daemon.build import build_relay
from outboxkit_relay.daemon.janitor import Janitor
from outboxkit_relay.settings import Retention
from tests.integration.relay.world import count, engine_for, until

LEDGER, INBOX = tables.outbox_ledger, tables.inbox_messages
KEPT = Retention(ledger=timedelta(days=3), every=timedelta(milliseconds=20))


def _fill(engine: Engine, rows: int, age: timedelta) -> None:
    entry = {"relay": uuid4(), "topic": "orders", "outcome": "published", "min_id": uuid4(), "max_id": uuid4()}
    with engine.begin() as connection:
        values = [{**entry, "ids": [], "partitions": [], "offsets": []} for _ in range(rows)]
        connection.execute(insert(LEDGER).values(published_at=database_now(-age)), values)


def test_a_relay_deletes_what_its_retention_no_longer_keeps(engine: Engine, tmp_path: Path) -> None:
    _fill(engine, 2_500, timedelta(days=4))
    _fill(engine, 3, timedelta(days=2))
    file = tmp_path / "outboxkit.toml"
    url = engine.url.render_as_string(hide_password=False)
    file.write_text(
        f'database_url = "{url}"\nbroker_url = "memory://{uuid4().hex}"\n[retention]\nevery = "20ms"\n'
        '[relay]\nlease = "2s"'
    )
    stop = threading.Event()
    with build_relay(load(file)) as built:
        thread = threading.Thread(target=built.run, args=(stop,))
        thread.start()
        try:
            until(lambda: count(engine, LEDGER) == 3)
        finally:
            stop.set()
            thread.join()


def test_only_the_relay_that_owns_the_first_shard_cleans_up(engine: Engine) -> None:
    _fill(engine, 5, timedelta(days=4))
    mine, asked = uuid4(), threading.Event()

    def other() -> UUID:
        asked.set()
        return uuid4()

    with Janitor(engine, KEPT, other):
        until(asked.is_set)
    assert count(engine, LEDGER) == 5

    with engine.begin() as connection:
        connection.execute(tables.outbox_shards.update().values(owner=mine))
    with Janitor(engine, KEPT, lambda: mine):
        until(lambda: count(engine, LEDGER) == 0)


def test_what_another_transaction_holds_is_left_for_the_next_time(database_url: str) -> None:
    engine, mine = engine_for(database_url), uuid4()
    _fill(engine, 5, timedelta(days=4))
    with engine.begin() as connection:
        connection.execute(tables.outbox_shards.update().values(owner=mine))
    with engine.begin() as holding, Janitor(engine, KEPT, lambda: mine):
        held = holding.execute(select(LEDGER.c.id).limit(1).with_for_update()).scalar_one()
        until(lambda: count(engine, LEDGER) == 1)
        assert count(engine, LEDGER, LEDGER.c.id == held) == 1
    with Janitor(engine, KEPT, lambda: mine):
        until(lambda: count(engine, LEDGER) == 0)
    engine.dispose()


def test_an_inbox_that_forgets_before_the_broker_does_is_refused_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "outboxkit.toml"
    head = f'database_url = "sqlite:///{tmp_path / "a.db"}"\nbroker_url = "memory://x"\n[retention]\n'
    file.write_text(f'{head}inbox = "1d"')

    with pytest.raises(ConfigurationError, match=r"retention\.inbox is 1 day, 0:00:00: below the 7 days"):
        build_relay(load(file))
    file.write_text(f'{head}inbox = "1d"\nreplay_horizon = "12h"')
    build_relay(load(file)).close()
