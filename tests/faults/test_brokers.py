"""The broker dies under load, and destinations are in trouble: nothing is lost, no attempt is spent, others flow."""

from __future__ import annotations

from uuid import uuid4

from sqlalchemy import text

from outboxkit import outbox
from outboxkit.policy import Failure
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ, by_key, numbers, ordinal
from tests.conftest import PROFILE
from tests.faults.brokers import on_brokers
from tests.faults.traffic import (
    EVIDENCED,
    LARGEST,
    LEFT,
    are_right,
    declare_exchange,
    is_kafka,
    message,
    open_destination,
    with_limit,
)

KEYS = 20
KILLS = 5 if PROFILE == "full" else 2
BATCH, WINDOW = 100, 8


@on_brokers("kafka")
def test_a_broker_that_is_killed_under_load_costs_no_message(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
    broker: servers.Server,
) -> None:
    relay = world.start("relay", "run")
    writer = world.load(KEYS)

    for _ in range(KILLS):
        before = world.scalar(EVIDENCED)
        world.until(lambda: world.scalar(EVIDENCED) > before, "it publishes")  # noqa: B023  at once
        broker.kill()
        world.until(lambda: world.scalar(LEFT) > BATCH, "messages wait for the broker")
        broker.start()
    so_far = world.scalar(EVIDENCED)
    world.until(lambda: world.scalar(EVIDENCED) > so_far, "it publishes again")
    assert world.scalar("SELECT count(*) FROM outbox_waiting") == 0, "an attempt was spent"
    assert world.scalar("SELECT count(*) FROM outbox_stopped_keys") == 0, "a key was stopped"
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.stop(relay)
    assert are_right(world, reader) <= KILLS * BATCH * WINDOW, "more copies than were in flight"


@on_brokers("rabbitmq")
def test_trouble_is_told_by_its_class_and_holds_up_no_other_destination(
    world: AcceptanceEnvironment, broker: servers.Server
) -> None:
    flowing, missing, unroutable = (f"{name}-{uuid4().hex}" for name in ("flowing", "missing", "unroutable"))
    troubled = {missing: Failure.UNKNOWN_TOPIC.value}
    readers = {flowing: open_destination(broker, flowing)}
    if not is_kafka(broker):
        declare_exchange(broker, unroutable)
        troubled[unroutable] = Failure.UNROUTABLE.value
    world.environment["OUTBOXKIT_BROKER_URL"] = with_limit(broker)
    relay = world.start("relay", "run")
    world.until(lambda: world.said(relay, "relay.joined"), "it has joined")
    good, bad = 100, 10
    for number in range(good):
        place = number // KEYS
        messages = [message(topic, f"k{number % KEYS}", number, place) for topic in (*troubled, flowing)]
        if number < bad:
            messages.append(message(flowing, f"bad{number}", number, 0, filler="x" * 2 * LARGEST))
        with world.engine.begin() as connection:
            outbox.write(connection, messages)

    world.until(lambda: world.scalar(EVIDENCED) == good, "what can flow has flown")
    world.until(lambda: world.scalar("SELECT count(*) FROM dead_letters") == bad, "what is too large is dead")
    world.until(lambda: len(world.said(relay, "destination.paused")) >= len(troubled), "the others are paused")
    assert {line["topic"]: line["failure"] for line in world.said(relay, "destination.paused")} == troubled
    with world.engine.connect() as connection:
        dead = connection.execute(text("SELECT DISTINCT failure, topic FROM dead_letters")).all()
    assert [tuple(row) for row in dead] == [(Failure.TOO_LARGE.value, flowing)]
    assert world.scalar(LEFT) == good * len(troubled), "what cannot flow waits, and spends no attempt"
    assert world.scalar("SELECT count(*) FROM outbox_waiting") == 0

    for topic in troubled:
        readers[topic] = open_destination(broker, topic)
    world.until(lambda: world.scalar(LEFT) == 0, "once they are there, everything flows by itself")
    world.stop(relay)
    for topic, reader in readers.items():
        seen = reader.read()
        assert sorted(numbers(seen)) == list(range(good)), topic
        assert all(places == sorted(places) for places in by_key(seen, ordinal).values()), topic
