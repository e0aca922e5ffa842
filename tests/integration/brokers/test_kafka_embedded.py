"""The cluster inside the process, and the client without any."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

from confluent_kafka import Message

from outboxkit.brokers import Batch, Subscription, kafka, open_publisher, open_subscriber
from outboxkit.brokers.kafka import embedded_cluster
from outboxkit.errors import TransientBrokerError
from outboxkit.testing.broker_conformance import make_row
from tests.deadlines import DEADLINE

CONSUMER = """
import asyncio, sys
from datetime import timedelta
from outboxkit.brokers import Subscription, open_subscriber

async def main():
    reader = open_subscriber(sys.argv[1], Subscription(consumer="elsewhere", topics=("orders",)))
    payloads = []
    while len(payloads) < 20:
        deliveries = await reader.receive(100, timedelta(seconds=300))
        await reader.acknowledge(deliveries)
        payloads += [delivery.payload.decode() for delivery in deliveries]
    await reader.close()
    print(" ".join(sorted(payloads, key=int)))

asyncio.run(main())
"""


def test_another_process_reads_from_the_embedded_cluster_what_was_published_and_nothing_else() -> None:
    with embedded_cluster(["orders"]) as url:
        publisher = open_publisher(url)
        rows = [make_row("orders", b"%d" % number, key=b"%d" % (number % 3)) for number in range(20)]
        assert not publisher.publish(Batch("orders", rows)).result(DEADLINE).refusals

        told = subprocess.run(
            [sys.executable, "-c", CONSUMER, url],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=True,
        )

        publisher.close()
    assert told.stdout.split() == [str(number) for number in range(20)]


async def test_the_embedded_url_is_one_cluster_for_publishers_and_subscribers_of_a_process() -> None:
    subscription = Subscription(consumer="here", topics=("kept",))
    reader = open_subscriber("kafka://embedded", subscription)
    publisher = open_publisher("kafka://embedded")

    await reader.declare(subscription)
    assert not publisher.publish(Batch("kept", [make_row("kept", b"x")])).result(DEADLINE).refusals

    assert [delivery.payload for delivery in await reader.receive(5, timedelta(seconds=DEADLINE))] == [b"x"]
    await reader.close()
    publisher.close()


class _OneMessage:
    def poll(self, _timeout: float) -> Message:
        return Message(topic="t", partition=0, offset=7)


def test_a_message_that_was_polled_is_handed_out_although_there_was_trouble() -> None:
    """It would not come again, and the next acknowledgement would commit past it."""
    subscriber = kafka.subscriber("kafka://127.0.0.1:1", Subscription(consumer="c", topics=("t",)), {})
    subscriber._consumer = _OneMessage()  # type: ignore[assignment]
    subscriber._trouble = TransientBrokerError("away a moment ago")

    assert [delivery.offset for delivery in subscriber._take(1, 1.0)] == [7]
