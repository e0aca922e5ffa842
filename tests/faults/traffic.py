"""Messages and destinations for tests that write rows of their own, and what must be true of whatever was published."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pika
from confluent_kafka.admin import AdminClient, NewTopic
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from outboxkit import migrations
from outboxkit.message import Message
from tests import canaries, servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ, by_key, first_occurrences, numbers, ordinal

LARGEST = 2_000  # bytes that a destination of `open_destination` takes
LEFT = "SELECT (SELECT count(*) FROM outbox_messages) + (SELECT count(*) FROM outbox_waiting)"
EVIDENCED = "SELECT coalesce(sum(cardinality(ids)), 0) FROM outbox_ledger"
OURS = "datname = current_database() AND application_name = 'outboxkit'"


def is_kafka(broker: servers.Server) -> bool:
    return broker.url.startswith("kafka")


def with_limit(broker: servers.Server) -> str:
    """The URL for a relay that takes no more than `LARGEST`; a Kafka topic has that limit itself."""
    return broker.url if is_kafka(broker) else f"{broker.url}?max_message_bytes={LARGEST}"


def open_destination(broker: servers.Server, topic: str) -> Kafka | RabbitMQ:
    """Creates a topic, or an exchange with a queue, that takes small messages only; returns who reads it."""
    if is_kafka(broker):
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        admin.create_topics([NewTopic(topic, 2, config={"max.message.bytes": str(LARGEST)})])[topic].result(30)
        return Kafka(broker, topic)
    declare_exchange(broker, topic)
    reader = RabbitMQ(broker, topic, f"audit.{topic}")
    reader.prepare()
    return reader


def with_both_brokers(
    database_url: str, kafka: servers.Server, rabbitmq: servers.Server, folder: Path
) -> AcceptanceEnvironment:
    """Tables, and settings by which topics named ``bank.*`` go to RabbitMQ and all others to Kafka."""
    for broker in (kafka, rabbitmq):
        broker.heal()
    world = AcceptanceEnvironment(database_url, kafka.url, folder)
    with world.engine.begin() as connection:
        migrations.upgrade(connection)
    world.environment["OUTBOXKIT_BROKERS__BANK__URL"] = rabbitmq.url
    world.environment["OUTBOXKIT_DESTINATIONS"] = '{"bank.*": {"broker": "bank"}}'
    return world


def declare_exchange(broker: servers.Server, topic: str) -> None:
    """An exchange without a queue: nothing can be routed from it."""
    connection = pika.BlockingConnection(pika.URLParameters(broker.url))
    connection.channel().exchange_declare(topic, "topic", durable=True)
    connection.close()


def message(topic: str, key: str, number: int, place: int, *, filler: str = "") -> Message:
    """The `number`-th of a test, the `place`-th of its key."""
    body = {"number": number, "ordinal": place, "filler": filler}
    return Message(
        id=str(uuid4()),
        type="order.placed",
        topic=topic,
        payload=json.dumps(body).encode(),
        key=key.encode(),
        source="shop",
        content_type="application/json",
        occurred_at=datetime.now(UTC),
        headers=(("x-person", canaries.HEADER.encode()),),
    )


def evidenced(world: AcceptanceEnvironment) -> set[str]:
    """The ids of which the ledger says that they were published."""
    with world.engine.connect() as connection:
        return {str(row) for row in connection.execute(text("SELECT unnest(ids) FROM outbox_ledger")).scalars()}


def are_right(world: AcceptanceEnvironment, reader: Kafka | RabbitMQ) -> int:
    """Every order that was placed is published, none is invented or reordered, and the ledger tells the truth.

    Returns how many copies there are.
    """
    with world.engine.connect() as connection:
        placed = connection.execute(text("SELECT number FROM orders ORDER BY number")).scalars().all()
    seen = reader.read()
    first = first_occurrences(seen)
    assert sorted(numbers(first)) == placed, "an order was lost or invented"
    for key, ordinals in by_key(first, ordinal).items():
        assert ordinals == sorted(ordinals), f"{key} was reordered"
    assert evidenced(world) == {message.id for message in seen}, "false evidence"
    assert world.scalar("SELECT count(*) FROM dead_letters") == 0, "an outage was taken for poison"
    return len(seen) - len(first)


def answers(world: AcceptanceEnvironment) -> bool:
    """Whether the database is up again."""
    try:
        return world.scalar("SELECT 1") == 1
    except DBAPIError:
        return False
