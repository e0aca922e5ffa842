"""Topics and queues of a test's own, and reading them: shared by the tests of real brokers."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
from confluent_kafka.admin import AdminClient, NewTopic
from pika.adapters.blocking_connection import BlockingChannel

from outboxkit.brokers import Delivery, Subscriber
from tests import servers
from tests.deadlines import DEADLINE
from tests.servers import rabbitmq as local_node
from tests.servers.containers import ContainerServer
from tests.servers.local import LocalServer

SOON = timedelta(seconds=2)
PATIENCE = timedelta(seconds=DEADLINE)


def control(rabbitmq: servers.Server, *command: str) -> None:
    """Runs rabbitmqctl where the broker runs."""
    if isinstance(rabbitmq, ContainerServer):
        code, said = rabbitmq.container.exec_run(["rabbitmqctl", *command])
        assert code == 0, said
    elif isinstance(rabbitmq, LocalServer):
        local_node.control(rabbitmq, *command)
    else:
        pytest.fail(f"{rabbitmq.name} was given by {rabbitmq.source}: it cannot be told to raise an alarm")


def create(kafka: servers.Server, name: str, *, partitions: int = 1, **config: str) -> None:
    settings = {key.replace("_", "."): value for key, value in config.items()}
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for future in admin.create_topics([NewTopic(name, partitions, 1, config=settings)]).values():
        future.result(10)
    deadline = time.monotonic() + DEADLINE
    while name not in admin.list_topics(timeout=60).topics:  # the brokers hear of it a little later
        assert time.monotonic() < deadline


def bound(channel: BlockingChannel, topic: str, queue: str, routing_key: str = "#", **arguments: object) -> None:
    channel.exchange_declare(topic, exchange_type="topic", durable=True)
    settings = {"x-" + name.replace("_", "-"): value for name, value in arguments.items()}
    channel.queue_declare(queue, durable=True, arguments=settings)
    channel.queue_bind(queue, topic, routing_key)


async def read(subscriber: Subscriber, count: int) -> list[Delivery]:
    received: list[Delivery] = []
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while len(received) < count:
        assert time.monotonic() < deadline, f"{len(received)} of {count} came"
        received += await subscriber.receive(count, SOON)
    return received
