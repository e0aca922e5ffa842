"""Everything but the reading connection goes through a real PgBouncer in transaction mode."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay.exit_codes import Exit
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, declare, effects_are_in_order, forget
from tests.deadlines import DEADLINE
from tests.faults.traffic import EVIDENCED, LEFT, answers, are_right

KEYS = 20
LEASES = "SELECT count(DISTINCT owner) FROM outbox_shards"


@pytest.fixture
def world(
    database_url: str, pooler: servers.Server, kafka: servers.Server, tmp_path: Path
) -> Iterator[AcceptanceEnvironment]:
    """Writers, consumers, commands and relays are told the pooler's address; relays also the database's own."""
    forget(kafka)
    direct = make_url(database_url)
    pooled = make_url(pooler.url).set(database=direct.database).render_as_string(hide_password=False)
    made = AcceptanceEnvironment(pooled, kafka.url, tmp_path)
    made.environment["OUTBOXKIT_DATABASE_DIRECT_URL"] = database_url
    made.engine = create_engine(pooled, connect_args={"prepare_threshold": None})
    with made.engine.begin() as connection:
        migrations.upgrade(connection)
    made.create_tables()
    declare(kafka.url)
    yield made
    made.close()


def test_relays_share_take_over_and_publish_behind_a_pooler(
    world: AcceptanceEnvironment, kafka: servers.Server
) -> None:
    world.environment["OUTBOXKIT_RELAY__WAKE"] = "notify"  # who listens takes the direct way, too
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    first, second = world.start("relay", "run"), world.start("relay", "run")
    for relay in (first, second):
        world.until(lambda: world.said(relay, "relay.joined"), "joined")  # noqa: B023  at once
    writer = world.load(KEYS)
    world.until(lambda: world.scalar("SELECT count(DISTINCT relay) FROM outbox_ledger") == 2, "both publish")

    first.kill()
    first.wait()
    world.until(lambda: world.scalar(LEASES) == 1, "the other one has taken over")
    so_far = world.scalar(EVIDENCED)
    world.until(lambda: world.scalar(EVIDENCED) > so_far, "it publishes")
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    orders = world.scalar("SELECT count(*) FROM orders")
    world.until(lambda: world.scalar("SELECT count(*) FROM invoices") >= orders, "everything billed")
    assert f"{orders:,}" in world.run("status").stdout.replace(str(orders), f"{orders:,}")
    for process in (second, consumer):
        world.stop(process)
    assert not world.said(second, "lease.lost")
    assert not world.said(second, "database.away")
    are_right(world, Kafka(kafka))
    assert world.scalar("SELECT count(*) FROM invoices") == orders
    assert effects_are_in_order(world)


def test_the_pooler_and_then_its_database_go_away_and_come_back(
    world: AcceptanceEnvironment, kafka: servers.Server, pooler: servers.Server, postgres: servers.Server
) -> None:
    relay = world.start("relay", "run")
    writer = world.load(KEYS, patient=True)
    world.until(lambda: world.scalar(EVIDENCED) > 0, "it publishes")

    for number, gone in enumerate((pooler, postgres), start=1):
        gone.kill()
        world.until(lambda: len(world.said(relay, "database.away")) == number, "it has noticed")  # noqa: B023  at once
        gone.start()
        world.until(lambda: len(world.said(relay, "database.back")) == number, "it goes on")  # noqa: B023  at once
    world.until(lambda: answers(world), "the pooler has noticed, too")
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.stop(relay)
    are_right(world, Kafka(kafka))


def test_a_relay_that_knows_only_the_pooler_is_refused_at_its_start(world: AcceptanceEnvironment) -> None:
    del world.environment["OUTBOXKIT_DATABASE_DIRECT_URL"]

    relay = world.start("relay", "run")

    assert relay.wait(DEADLINE) == Exit.USAGE
    assert "this is a pooler: set database_direct_url, too" in world.logs()


def test_each_transaction_behind_a_pooler_has_its_own_limits_and_leaves_none_behind(
    world: AcceptanceEnvironment,
) -> None:
    engine = open_engine(world.environment["OUTBOXKIT_DATABASE_URL"], patience=timedelta(seconds=3), pooled=True)
    shown = text("SELECT current_setting('lock_timeout'), current_setting('timezone')")
    with engine.begin() as connection:
        assert connection.execute(shown).one() == ("3s", "UTC")
    engine.dispose()
    for _ in range(3):  # every session that the pooler has
        with world.engine.begin() as connection:
            assert connection.execute(text("SELECT current_setting('lock_timeout')")).scalar_one() == "0"
