"""The pure parts of the Kafka adapter, and the cluster inside the process."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
from confluent_kafka import KafkaError, Message
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.brokers import Batch, Subscription, kafka, open_publisher, open_subscriber
from outboxkit.brokers.kafka import embedded_cluster
from outboxkit.brokers.kafka.progress import Progress
from outboxkit.brokers.kafka.publish import failure_of
from outboxkit.errors import TransientBrokerError
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row

CONSUMER = """
import asyncio, sys
from datetime import timedelta
from outboxkit.brokers import Subscription, open_subscriber

async def main():
    reader = open_subscriber(sys.argv[1], Subscription(consumer="elsewhere", topics=("orders",)))
    payloads = []
    while len(payloads) < 20:
        deliveries = await reader.receive(100, timedelta(seconds=20))
        await reader.acknowledge(deliveries)
        payloads += [delivery.payload.decode() for delivery in deliveries]
    await reader.close()
    print(" ".join(sorted(payloads, key=int)))

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        (KafkaError.MSG_SIZE_TOO_LARGE, Failure.TOO_LARGE),
        (KafkaError._PURGE_QUEUE, Failure.INDETERMINATE),
        (KafkaError._PURGE_INFLIGHT, Failure.INDETERMINATE),
        (KafkaError._MSG_TIMED_OUT, Failure.INDETERMINATE),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, Failure.UNAUTHORIZED),
        (KafkaError.INVALID_RECORD, Failure.INVALID),
        (KafkaError.POLICY_VIOLATION, Failure.REJECTED),
        (KafkaError._FENCED, Failure.FENCED),
    ],
)
def test_an_error_has_one_meaning(code: int, failure: Failure) -> None:
    assert failure_of(KafkaError(code)) is failure


def test_the_position_stops_at_the_first_unsettled_offset() -> None:
    progress = Progress()
    laps = {offset: progress.hand_out(offset) for offset in (10, 11, 13)}

    assert progress.settle(11, laps[11])
    assert progress.position == 10
    assert progress.settle(10, laps[10])
    assert progress.position == 13
    assert progress.settle(13, laps[13])
    assert progress.position == 14


def test_what_is_read_again_must_be_settled_again() -> None:
    progress = Progress()
    first = [progress.hand_out(offset) for offset in range(5)]
    progress.rewind(2)

    assert not progress.settle(3, first[3])
    assert progress.settle(0, first[0])
    assert progress.settle(1, first[1])
    assert progress.position == 2

    second = progress.hand_out(2)
    assert not progress.settle(2, first[2])
    assert progress.position == 2
    assert progress.settle(2, second)
    assert progress.position == 3


@given(
    st.lists(st.integers(0, 19), max_size=40), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 19)), max_size=3)
)
def test_no_position_is_past_an_unsettled_offset(settled: list[int], rewinds: list[tuple[int, int]]) -> None:
    progress = Progress()
    laps = {offset: progress.hand_out(offset) for offset in range(20)}
    open_offsets = set(range(20))

    for step, offset in enumerate(settled):
        for when, back in rewinds:
            if when == step:
                progress.rewind(back)
                laps.update({again: progress.hand_out(again) for again in range(back, 20)})
                open_offsets |= set(range(back, 20))
        progress.settle(offset, laps[offset])
        open_offsets.discard(offset)

        assert progress.position == min(open_offsets, default=20)


def test_another_process_reads_from_the_embedded_cluster_what_was_published_and_nothing_else() -> None:
    with embedded_cluster(["orders"]) as url:
        publisher = open_publisher(url)
        rows = [make_row("orders", b"%d" % number, key=b"%d" % (number % 3)) for number in range(20)]
        assert not publisher.publish(Batch("orders", rows)).result(20).refusals

        told = subprocess.run(
            [sys.executable, "-c", CONSUMER, url],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )

        publisher.close()
    assert told.stdout.split() == [str(number) for number in range(20)]


async def test_the_embedded_url_is_one_cluster_for_publishers_and_subscribers_of_a_process() -> None:
    subscription = Subscription(consumer="here", topics=("kept",))
    reader = open_subscriber("kafka://embedded", subscription)
    publisher = open_publisher("kafka://embedded")

    await reader.declare(subscription)
    assert not publisher.publish(Batch("kept", [make_row("kept", b"x")])).result(20).refusals

    assert [delivery.payload for delivery in await reader.receive(5, timedelta(seconds=20))] == [b"x"]
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
