"""The whole product on real servers: the real command line, killed without mercy, read by clients that are not ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests import servers
from tests.acceptance.world import (
    QUICK_GROUP,
    AcceptanceEnvironment,
    Kafka,
    RabbitMQ,
    by_key,
    effects_are_in_order,
    first_occurrences,
    forget,
    numbers,
    ordinal,
)
from tests.conftest import PROFILE
from tests.deadlines import DEADLINE

ORDERS, KEYS = 2_000, 50
OUTAGE_SECONDS = 120 if PROFILE == "full" else 10


@pytest.fixture(params=["kafka", "rabbitmq"])
def broker(request: pytest.FixtureRequest) -> servers.Server:
    found: servers.Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def reader(broker: servers.Server) -> Kafka | RabbitMQ:
    return Kafka(broker) if broker.url.startswith("kafka") else RabbitMQ(broker)


@pytest.fixture
def world(
    database_url: str, broker: servers.Server, reader: Kafka | RabbitMQ, tmp_path: Path
) -> Iterator[AcceptanceEnvironment]:
    """Tables, topology and an audit of what is published."""
    forget(broker)
    made = AcceptanceEnvironment(
        database_url, broker.url + QUICK_GROUP if broker.url.startswith("kafka") else broker.url, tmp_path
    )
    made.create_tables()
    made.run("init", "--topology", "tests.acceptance.shop:billing")
    reader.prepare()
    yield made
    made.close()


def test_no_order_is_lost_invented_doubled_or_reordered_though_relay_and_consumer_are_killed(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
) -> None:
    """Every kill hits work in flight: the ledger is locked, so that messages are at the broker and not yet settled."""
    writer = world.writer(ORDERS, KEYS)
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    relay = world.start("relay", "run")
    writer.start(ORDERS)

    for part in (1, 2):
        enough = part * ORDERS // 4
        world.until(lambda: world.scalar("SELECT count(*) FROM orders") > enough, "orders placed")  # noqa: B023  at once
        unsettled = kill_with_messages_unsettled(world, relay, reader)
        assert unsettled > 0, "void: the kill hit nothing in flight"
        relay = world.start("relay", "run")
    world.until(lambda: world.scalar("SELECT count(*) FROM invoices") > ORDERS // 4, "invoices")
    world.until(lambda: world.scalar("SELECT count(*) FROM inbox_batches") > 0, "a batch in the consumer's hands")
    consumer.kill()
    consumer.wait()
    billed = world.scalar("SELECT count(*) FROM invoices")
    assert billed < ORDERS, "void: the consumer had nothing left to do"
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    writer.join()

    world.until(lambda: world.scalar("SELECT count(*) FROM outbox_messages") == 0, "everything published")
    world.until(lambda: world.scalar("SELECT count(*) FROM invoices") >= ORDERS, "everything billed")
    world.stop(relay)
    world.stop(consumer)
    seen = reader.read()
    first = first_occurrences(seen)
    assert len(seen) > len(first), "void: nothing was published twice, the inbox had nothing to catch"
    assert sorted(numbers(first)) == list(range(ORDERS)), "an order was lost or invented"
    for key, ordinals in by_key(first, ordinal).items():
        assert ordinals == sorted(ordinals), f"{key} was reordered"
    assert world.scalar("SELECT count(*) FROM invoices") == ORDERS, "a duplicate took effect"
    assert world.scalar("SELECT count(DISTINCT number) FROM invoices") == ORDERS
    assert world.scalar("SELECT count(*) FROM dead_letters") == 0
    assert effects_are_in_order(world)


def kill_with_messages_unsettled(world: AcceptanceEnvironment, relay: object, reader: Kafka | RabbitMQ) -> int:
    """SIGKILL while the broker has messages that the outbox still holds; returns how many."""
    with world.engine.connect() as connection, connection.begin():
        connection.execute(text("LOCK TABLE outbox_ledger IN EXCLUSIVE MODE"))
        evidenced = int(
            connection.execute(text("SELECT coalesce(sum(cardinality(ids)), 0) FROM outbox_ledger")).scalar_one()
        )
        world.until(lambda: reader.count() > evidenced, "published, not settled")
        unsettled = reader.count() - evidenced
        relay.kill()  # type: ignore[attr-defined]
        relay.wait()  # type: ignore[attr-defined]
    return unsettled


def test_a_broker_that_is_away_for_a_while_costs_no_message_and_no_order(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
    broker: servers.Server,
) -> None:
    writer = world.writer(ORDERS, KEYS)
    relay = world.start("relay", "run")
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    writer.start(ORDERS // 4)
    world.until(lambda: world.scalar("SELECT count(*) FROM outbox_ledger") > 0, "published")
    world.until(lambda: writer.written == ORDERS // 4, "a quarter is placed")

    broker.stop()
    writer.go_on(ORDERS * 3 // 4)
    stopped_at = world.scalar("SELECT extract(epoch FROM clock_timestamp())::bigint")
    world.until(
        lambda: world.scalar("SELECT extract(epoch FROM clock_timestamp())::bigint") - stopped_at >= OUTAGE_SECONDS,
        "the outage",
        OUTAGE_SECONDS + DEADLINE,
    )
    assert writer.written == ORDERS * 3 // 4, "writers must not notice"
    assert world.scalar("SELECT count(*) FROM outbox_messages") >= ORDERS // 2, "void: nothing waited for the broker"
    assert world.scalar("SELECT count(*) FROM outbox_waiting") == 0, "an attempt was spent"
    assert world.scalar("SELECT count(*) FROM outbox_stopped_keys") == 0, "a key was stopped"
    assert relay.poll() is None
    assert consumer.poll() is None, world.logs()
    broker.start()
    writer.go_on(ORDERS)

    writer.join()
    world.until(lambda: world.scalar("SELECT count(*) FROM outbox_messages") == 0, "everything published")
    world.until(lambda: world.scalar("SELECT count(*) FROM invoices") >= ORDERS, "everything billed")
    world.stop(relay)
    world.stop(consumer)
    first = first_occurrences(reader.read())
    assert sorted(numbers(first)) == list(range(ORDERS))
    for key, ordinals in by_key(first, ordinal).items():
        assert ordinals == sorted(ordinals), f"{key} was reordered"
    assert world.scalar("SELECT count(*) FROM invoices") == ORDERS
    assert world.scalar("SELECT count(*) FROM dead_letters") == 0
    assert world.scalar("SELECT count(*) FROM outbox_waiting") == 0
