"""Edges E84-E93 on a real RabbitMQ, where no other test stands for them; most with a real relay in front of it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from sqlalchemy import Engine

from outboxkit import tables
from outboxkit.brokers import Batch, Delivery, Publisher, Subscriber, Subscription, open_publisher, open_subscriber
from outboxkit.errors import TransientBrokerError
from outboxkit.policy import Failure, RetryPolicy, full_jitter
from outboxkit.testing.broker_conformance import make_row
from outboxkit.testing.broker_harness import Patience
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.relay import RelayDaemon
from tests import servers
from tests.integration.brokers.world import SOON, bound, control
from tests.integration.relay.world import count, engine_for, message, relaying, until, write

ONE_TRY = RetryPolicy(delayed=full_jitter("10ms", cap="50ms", attempts=1))


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = engine_for(f"sqlite:///{tmp_path / 'outbox.db'}")
    yield found
    found.dispose()


@pytest.fixture
def publisher(rabbitmq: servers.Server) -> Iterator[Publisher]:
    opened = open_publisher(rabbitmq.url, {"blocked_timeout": "0.2", "confirm_timeout": "1"})
    yield opened
    opened.close()


@pytest.fixture
async def subscriber(rabbitmq: servers.Server, topic: str) -> AsyncIterator[Subscriber]:
    subscription = Subscription(consumer="c", topics=(topic,))
    opened = open_subscriber(rabbitmq.url, subscription)
    await opened.declare(subscription)
    yield opened
    await opened.close()


@contextmanager
def alarm(rabbitmq: servers.Server) -> Iterator[None]:
    """The broker says that it is short of memory, and takes no message from anybody."""
    control(rabbitmq, "set_vm_memory_high_watermark", "0")
    try:
        yield
    finally:
        control(rabbitmq, "set_vm_memory_high_watermark", "0.6")


@asynccontextmanager
async def short_consumer_timeout(rabbitmq: servers.Server) -> AsyncIterator[None]:
    """The broker ends channels that hold a message for half a second.

    It is told from a thread: the loop answers heartbeats meanwhile, however long a busy machine takes.
    """
    for_now, as_before = (_timeouts(milliseconds, tick) for milliseconds, tick in ((500, 200), (1_800_000, 60_000)))
    await asyncio.to_thread(control, rabbitmq, "eval", for_now)
    try:
        yield
    finally:
        await asyncio.to_thread(control, rabbitmq, "eval", as_before)


def _timeouts(held_for: int, tick: int) -> str:
    """Milliseconds for which a message may be held, and between two looks at that, as the broker's own statement."""
    settings = {"consumer_timeout": held_for, "channel_tick_interval": tick}
    return ", ".join(f"application:set_env(rabbit, {name}, {value})" for name, value in settings.items()) + "."


def drained(channel: BlockingChannel, queue: str) -> list[bytes]:
    """Takes out what is in the queue."""
    bodies = []
    while (found := channel.basic_get(queue, auto_ack=True))[0] is not None:
        bodies.append(found[2])
    return bodies


def failures(relay: RelayDaemon) -> int:
    """Counts how often the relay was refused a message."""
    return sum(relay.stats.failures.values()) if relay.stats else 0


def paused(relay: RelayDaemon) -> list[str]:
    """Destinations that the relay says it cannot publish to."""
    return [one.topic for one in relay.stats.unavailable] if relay.stats else []


def turn_away(door: socket.socket, knocks: list[socket.socket]) -> None:
    """Accepts every connection, and ends it."""
    with suppress(OSError):  # the door is shut
        while True:
            visitor, _ = door.accept()
            knocks.append(visitor)
            visitor.close()


async def look(subscriber: Subscriber) -> int:
    """One receive that finds no broker."""
    with pytest.raises(TransientBrokerError):
        await subscriber.receive(1, timedelta(milliseconds=20))
    return 1


def test_e84_under_an_alarm_nothing_more_is_written_and_afterwards_everything_is_taken(
    rabbitmq: servers.Server, publisher: Publisher, channel: BlockingChannel, topic: str
) -> None:
    """Until the broker is sent something it does not say that it takes nothing: what went out first is in doubt."""
    bound(channel, topic, f"{topic}.q")
    assert not publisher.publish(Batch(topic, [make_row(topic, b"before")])).result(60).refusals

    with alarm(rabbitmq):
        first = publisher.publish(Batch(topic, [make_row(topic, b"first")])).result(60)
        second = publisher.publish(Batch(topic, [make_row(topic, b"second")])).result(60)
        publisher.reset()
        third = publisher.publish(Batch(topic, [make_row(topic, b"third")])).result(60)
    after = publisher.publish(Batch(topic, [make_row(topic, b"after")])).result(60)

    assert [refusal.failure for refusal in first.refusals] == [Failure.INDETERMINATE]
    assert [refusal.failure for refusal in (*second.refusals, *third.refusals)] == [Failure.BLOCKED] * 2
    assert not after.refusals
    assert drained(channel, f"{topic}.q") == [b"before", b"first", b"after"]


def test_e84_an_alarm_pauses_the_destination_spends_no_attempt_and_then_everything_flows_in_order(
    rabbitmq: servers.Server, publisher: Publisher, channel: BlockingChannel, engine: Engine, *, topic: str
) -> None:
    bound(channel, topic, f"{topic}.q")

    with relaying(engine, publisher, RelayConfig(retry=ONE_TRY)) as relay:
        write(engine, message(0, topic=topic))
        until(lambda: count(engine, tables.outbox_messages) == 0, "it publishes")
        with alarm(rabbitmq):
            write(engine, *(message(number, topic=topic) for number in range(1, 6)))
            until(lambda: failures(relay) >= 2 * 5, "it has tried more often than a message has attempts")
            assert paused(relay) == [topic]
            assert count(engine, tables.outbox_messages) == 5
            assert count(engine, tables.outbox_waiting) == count(engine, tables.dead_letters) == 0
        until(lambda: count(engine, tables.outbox_messages) == 0, "it publishes again")

    copies = Counter(drained(channel, f"{topic}.q"))
    assert list(copies) == [b"%d" % number for number in range(6)]
    assert max(copies.values()) <= 2, "only what was under way when the alarm began is sent again"


def test_e85_a_full_queue_that_refuses_pauses_the_destination_spends_no_attempt_and_drains_in_order(
    publisher: Publisher, channel: BlockingChannel, engine: Engine, topic: str
) -> None:
    queue = f"{topic}.q"
    bound(channel, topic, queue, max_length=1, overflow="reject-publish")
    write(engine, *(message(number, topic=topic) for number in range(6)))

    with relaying(engine, publisher, RelayConfig(retry=ONE_TRY)) as relay:
        until(lambda: failures(relay) > 2 * 6, "it has tried more often than a message has attempts")
        assert relay.stats
        assert {failure for _, failure in relay.stats.failures} == {Failure.REFUSING}
        assert count(engine, tables.outbox_messages) > 0
        assert count(engine, tables.outbox_waiting) == count(engine, tables.dead_letters) == 0
        bodies = list[bytes]()

        def consume() -> bool:
            bodies.extend(drained(channel, queue))
            return len(bodies) == 6

        until(consume, "somebody consumes")

    assert bodies == [b"%d" % number for number in range(6)]


def test_e86_an_alternate_exchange_without_a_queue_hides_nothing_and_a_queue_on_it_takes_what_nobody_else_does(
    publisher: Publisher, channel: BlockingChannel, topic: str
) -> None:
    rest = f"{topic}-rest"
    channel.exchange_declare(rest, exchange_type="fanout", durable=True)
    channel.exchange_declare(topic, exchange_type="topic", durable=True, arguments={"alternate-exchange": rest})

    lost = publisher.publish(Batch(topic, [make_row(topic, b"lost")])).result(60)
    channel.queue_declare(f"{rest}.q", durable=True)
    channel.queue_bind(f"{rest}.q", rest)
    caught = publisher.publish(Batch(topic, [make_row(topic, b"caught")])).result(60)

    assert [refusal.failure for refusal in lost.refusals] == [Failure.UNROUTABLE]
    assert not caught.refusals
    assert drained(channel, f"{rest}.q") == [b"caught"]


def test_e88_what_is_confirmed_outlives_the_broker(rabbitmq: servers.Server, publisher: Publisher, topic: str) -> None:
    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as before:
        bound(before.channel(), topic, f"{topic}.q")
    rows = [make_row(topic, b"%d" % number) for number in range(20)]
    assert not publisher.publish(Batch(topic, rows)).result(60).refusals

    rabbitmq.kill()
    rabbitmq.start()

    with pika.BlockingConnection(pika.URLParameters(rabbitmq.url)) as after:
        assert drained(after.channel(), f"{topic}.q") == [row.payload for row in rows]


async def test_e90_a_message_that_is_given_back_again_and_again_is_not_dropped_by_the_broker(
    rabbitmq: servers.Server, publisher: Publisher, topic: str
) -> None:
    """RabbitMQ 4 drops after 20 deliveries what is in a quorum queue without a limit of its own."""
    subscription = Subscription(consumer="c", topics=(topic,))
    subscriber = open_subscriber(rabbitmq.url, subscription)
    await subscriber.declare(subscription)
    publisher.publish(Batch(topic, [make_row(topic, b"again"), make_row(topic, b"next")])).result(60)

    for _ in range(25):
        received = await subscriber.receive(1, SOON * 5)
        assert [delivery.payload for delivery in received] == [b"again"]
        await subscriber.release(received)

    (delivery,) = await subscriber.receive(1, SOON * 5)
    await subscriber.close()
    assert (delivery.payload, delivery.redelivered) == (b"again", True)


async def test_e92_when_the_broker_ends_a_channel_that_held_a_message_too_long_the_message_comes_again(
    rabbitmq: servers.Server, publisher: Publisher, subscriber: Subscriber, topic: str
) -> None:
    rows = [make_row(topic, b"%d" % number) for number in range(3)]
    await asyncio.wrap_future(publisher.publish(Batch(topic, rows)))
    held, patience = list[Delivery](), Patience()
    async with short_consumer_timeout(rabbitmq):
        while len(held) < 2 or held[-1].payload != b"0":  # a handler is at work all the time
            patience.wait_for_more(len(held), "it did not come again")
            with suppress(TransientBrokerError):  # on a busy machine the next channel is ended, too, and that is told
                held += await subscriber.receive(1, SOON)
        await subscriber.acknowledge(held[:1])  # too late: this changes nothing
        await subscriber.acknowledge(held[-1:])

    assert held[-1].redelivered


async def test_a_channel_that_ends_again_and_again_before_anything_is_settled_is_told(
    rabbitmq: servers.Server, publisher: Publisher, subscriber: Subscriber, topic: str
) -> None:
    """It connects every time, so connecting is no success: what counts is what was settled."""
    await asyncio.wrap_future(publisher.publish(Batch(topic, [make_row(topic)])))
    told, patience = [""], Patience()
    async with short_consumer_timeout(rabbitmq):
        while not told[-1].endswith("times before a message was settled"):
            patience.wait_for_more(len(told), told[-1])
            try:
                await subscriber.receive(1, timedelta(milliseconds=10))
            except TransientBrokerError as error:
                told.append(error.message)

    assert not [line for line in told if "is away" in line]  # it is there, and answers


async def test_e93_a_consumer_whose_broker_is_away_knocks_more_and_more_rarely() -> None:
    knocks, looks = list[socket.socket](), 0
    with socket.create_server(("127.0.0.1", 0)) as door:
        opening = threading.Thread(target=turn_away, args=(door, knocks))
        opening.start()
        subscriber = open_subscriber(
            f"amqp://127.0.0.1:{door.getsockname()[1]}/", Subscription(consumer="c", topics=("t",))
        )
        while len(knocks) < 4:
            looks += await look(subscriber)
        before, looks = len(knocks), 0
        while looks < 40:
            looks += await look(subscriber)
        await subscriber.close()
        door.shutdown(socket.SHUT_RDWR)
        opening.join()

    assert len(knocks) - before < looks / 2
