"""Events go to an exchange and commands to a queue: one of the wrong kind is refused alone, whatever is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pika.adapters.blocking_connection import BlockingChannel

from outboxkit.brokers import Batch, Publisher, open_publisher
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.deadlines import DEADLINE
from tests.integration.brokers.world import bound


@pytest.fixture
def publisher(rabbitmq: servers.Server) -> Iterator[Publisher]:
    opened = open_publisher(rabbitmq.url)
    yield opened
    opened.close()


def _publish(publisher: Publisher, topic: str, *kinds: str) -> list[Failure | None]:
    """Sends one message of each kind, one after the other; returns why each was refused."""
    found = []
    for kind in kinds:
        receipts = publisher.publish(Batch(topic, [make_row(topic)._replace(kind=kind)])).result(DEADLINE)
        found.append(receipts.refusals[0].failure if receipts.refusals else None)
    return found


def test_a_command_for_a_topic_of_events_is_refused_alone(
    publisher: Publisher, channel: BlockingChannel, topic: str
) -> None:
    bound(channel, topic, f"audit-{topic}")

    assert _publish(publisher, topic, "command", "event", "command", "event") == [
        Failure.REJECTED,
        None,
        Failure.REJECTED,
        None,
    ]


def test_an_event_for_a_queue_of_commands_is_refused_alone(
    publisher: Publisher, channel: BlockingChannel, topic: str
) -> None:
    channel.queue_declare(topic, durable=True)

    assert _publish(publisher, topic, "event", "command", "event", "command") == [
        Failure.REJECTED,
        None,
        Failure.REJECTED,
        None,
    ]


def test_a_queue_that_disappears_is_missed_by_its_commands_and_not_by_the_events_of_the_same_name(
    publisher: Publisher, channel: BlockingChannel, topic: str
) -> None:
    bound(channel, topic, f"audit-{topic}")
    channel.queue_declare(topic, durable=True)
    assert _publish(publisher, topic, "command", "event") == [None, None]

    channel.queue_delete(topic)

    assert _publish(publisher, topic, "command", "event") == [Failure.REJECTED, None]


def test_a_name_of_neither_kind_is_the_destinations_trouble(publisher: Publisher, topic: str) -> None:
    assert _publish(publisher, topic, "event", "command") == [Failure.UNKNOWN_TOPIC, Failure.UNKNOWN_TOPIC]
