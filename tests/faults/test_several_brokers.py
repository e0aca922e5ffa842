"""One outbox, Kafka and RabbitMQ at once: one broker that dies holds the other up in nothing, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from sqlalchemy import text

from outboxkit import outbox
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, by_key, first_occurrences, numbers, ordinal
from tests.faults.traffic import LEFT, message, open_destination, with_both_brokers

KEYS, PORTION = 5, 100


def test_kafka_and_rabbitmq_are_fed_from_one_outbox_and_one_that_dies_holds_the_other_up_in_nothing(
    database_url: str, kafka: servers.Server, rabbitmq: servers.Server, tmp_path: Path
) -> None:
    world, name = with_both_brokers(database_url, kafka, rabbitmq, tmp_path), uuid4().hex
    readers = {topic: open_destination(kafka, topic) for topic in (f"a-{name}", f"b-{name}")}
    readers |= {topic: open_destination(rabbitmq, topic) for topic in (f"bank.a-{name}", f"bank.b-{name}")}
    relay = world.start("relay", "run")
    try:
        _write(world, list(readers), 0)
        world.until(lambda: world.scalar(LEFT) == 0, "both brokers get theirs")

        rabbitmq.kill()
        _write(world, list(readers), PORTION)
        on_kafka = text("SELECT count(*) FROM outbox_messages WHERE topic NOT LIKE 'bank.%'")
        world.until(lambda: _scalar(world, on_kafka) == 0, "Kafka's topics go on while RabbitMQ is dead")
        assert world.scalar(LEFT) == 2 * PORTION, "RabbitMQ's wait in the outbox"
        rabbitmq.start()

        world.until(lambda: world.scalar(LEFT) == 0, "and drain by themselves")
        world.stop(relay)
        for topic, reader in readers.items():
            seen = first_occurrences(reader.read())
            assert sorted(numbers(seen)) == list(range(2 * PORTION)), topic
            assert all(places == sorted(places) for places in by_key(seen, ordinal).values()), topic
        assert world.scalar("SELECT count(*) FROM dead_letters") == 0
    finally:
        world.close()
        rabbitmq.heal()


def _write(world: AcceptanceEnvironment, topics: list[str], start: int) -> None:
    for number in range(start, start + PORTION):
        with world.engine.begin() as connection:
            outbox.write(connection, [message(topic, f"k{number % KEYS}", number, number // KEYS) for topic in topics])


def _scalar(world: AcceptanceEnvironment, statement: object) -> int:
    with world.engine.connect() as connection:
        return int(connection.execute(statement).scalar_one())  # type: ignore[call-overload]
