"""Messages that come again and again, and members that come and go: one effect each, nothing skipped, order kept."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from uuid import uuid4

import pytest
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit.brokers import Assignment, Batch, Delivery, Publisher, Subscriber, open_publisher, open_subscriber
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.message import Message
from tests import servers
from tests.conftest import PROFILE
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order, row_of
from tests.deadlines import DEADLINE
from tests.faults.traffic import is_kafka

FULL = PROFILE == "full"
MESSAGES, TIMES = (10_000, 10) if FULL else (200, 2)
STORM_SECONDS, CHANGE_SECONDS = 60.0, 2.0
KEYS = 20
PARTITIONS = {"partitions": "6"}


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[ConsumerFixture]:
    found = ConsumerFixture(database_url)
    yield found
    await found.close()


@pytest.fixture(params=["kafka", pytest.param("rabbitmq", marks=pytest.mark.full)])
def server(request: pytest.FixtureRequest) -> servers.Server:
    found: servers.Server = request.getfixturevalue(request.param)
    found.heal()
    return found


class Forgetful:
    """A subscriber whose acknowledgements get lost: all that was handed out comes again to the next one."""

    def __init__(self, inner: Subscriber, count: int, stop: asyncio.Event) -> None:
        self._inner, self._count, self._stop = inner, count, stop
        self._settled: set[bytes | None] = set()
        self.features = inner.features
        self.receive, self.release = inner.receive, inner.release
        self.declare, self.close = inner.declare, inner.close

    @property
    def assignment(self) -> Assignment:
        return self._inner.assignment

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self._settled.update(delivery.payload for delivery in deliveries)  # one may come twice in a round, too
        if len(self._settled) >= self._count:
            self._stop.set()


def billing_of(world: ConsumerFixture, topic: str, **options: int) -> Consumer:
    billing = Consumer("billing", sessions=world.plain, retry=impatient(), **options)  # type: ignore[arg-type]

    @billing.on(OrderPlaced, topic=topic)
    def bill(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))

    return billing


async def prepared(server: servers.Server, billing: Consumer) -> None:
    subscriber = open_subscriber(server.url, billing.subscription, PARTITIONS if is_kafka(server) else {})
    await subscriber.declare(billing.subscription)
    await subscriber.close()


def publish(publisher: Publisher, topic: str, numbers: Sequence[int]) -> None:
    messages = [numbered(topic, number) for number in numbers]
    receipts = publisher.publish(Batch(topic, [row_of(one, place) for place, one in enumerate(messages, 1)]))
    assert not receipts.result(timeout=DEADLINE).refusals


def numbered(topic: str, number: int) -> Message:
    return order(number, key=f"k{number % KEYS}", topic=topic, message_id=f"m{number}")


@pytest.mark.timeout(900)
async def test_what_comes_again_and_again_has_one_effect(
    world: ConsumerFixture, server: servers.Server, scores: list[str]
) -> None:
    topic, redelivered = f"again-{uuid4().hex[:8]}", 0
    billing = billing_of(world, topic, batch=50, prefetch=MESSAGES)  # a broker hands out no more unacknowledged
    await prepared(server, billing)
    publisher = open_publisher(server.url)
    for start in range(0, MESSAGES, 1_000):
        await asyncio.to_thread(publish, publisher, topic, range(start, min(start + 1_000, MESSAGES)))
    publisher.close()

    for _ in range(TIMES + 1):
        before, stop = Counter(billing.counts), asyncio.Event()
        subscriber = Forgetful(open_subscriber(server.url, billing.subscription), MESSAGES, stop)
        await asyncio.wait_for(billing.run(subscriber, stop), 600)
        redelivered += (Counter(billing.counts) - before)["duplicate"]

    assert redelivered >= MESSAGES * TIMES, "void: they did not come again"
    assert sorted(world.effects()) == list(range(MESSAGES))
    assert billing.counts["handled"] == MESSAGES
    assert world.count(tables.dead_letters) == 0
    scores.append(f"redelivery: {server.name}, {redelivered:,} redeliveries of {MESSAGES:,} messages, 0 double effects")


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_a_storm_of_members_doubles_nothing_skips_nothing_and_keeps_the_order_of_each_key(
    world: ConsumerFixture, server: servers.Server, scores: list[str]
) -> None:
    topic, written = f"storm-{uuid4().hex[:8]}", threading.Event()
    await prepared(server, billing_of(world, topic))
    stop_writing, counter = threading.Event(), itertools.count()
    writer = asyncio.create_task(asyncio.to_thread(_write, server.url, topic, (stop_writing, written), counter))
    changes = await _storm(world, server, topic, until=written)
    stop_writing.set()
    total = await writer

    last = await _join(world, server, topic)
    async with asyncio.timeout(DEADLINE):
        while await asyncio.to_thread(world.count, Effect) < total:  # noqa: ASYNC110  waits for a fact
            await asyncio.sleep(0.1)
    await _leave(last, cancel=False)

    found = world.effects()
    assert sorted(found) == list(range(total)), "a double effect, or one that was skipped"
    for key in range(KEYS):
        numbers = [number for number in found if number % KEYS == key]
        assert numbers == sorted(numbers), f"the key {key} was reordered"
    assert world.count(tables.dead_letters) == world.count(tables.inbox_suspects) == 0
    scores.append(
        f"storm: {server.name}, {total:,} messages, {changes} members came or went; each one effect, in order"
    )


def _write(url: str, topic: str, events: tuple[threading.Event, threading.Event], counter: itertools.count[int]) -> int:
    """Publishes steadily until told to stop; returns how many."""
    (stop, began), publisher, total = events, open_publisher(url), 0
    while not stop.wait(0.02):
        numbers = list(itertools.islice(counter, 10))
        publish(publisher, topic, numbers)
        total += len(numbers)
        began.set()
    publisher.close()
    return total


Member = tuple[asyncio.Task[None], asyncio.Event]


async def _join(world: ConsumerFixture, server: servers.Server, topic: str) -> Member:
    stop, billing = asyncio.Event(), billing_of(world, topic, concurrency=4)
    return asyncio.create_task(billing.run(server.url, stop)), stop


async def _leave(member: Member, *, cancel: bool) -> None:
    task, stop = member
    if cancel:
        task.cancel()
    stop.set()
    with suppress(asyncio.CancelledError):
        await task


async def _storm(world: ConsumerFixture, server: servers.Server, topic: str, *, until: threading.Event) -> int:
    """Lets members come and go; returns how often one did."""
    await asyncio.to_thread(until.wait, DEADLINE)
    rng, members, changes = random.Random(4711), [await _join(world, server, topic)], 0
    for _ in range(int(STORM_SECONDS / CHANGE_SECONDS)):
        await asyncio.sleep(CHANGE_SECONDS)
        changes += 1
        if len(members) > 1 and (rng.random() < 0.5 or len(members) == 4):
            await _leave(members.pop(rng.randrange(len(members))), cancel=rng.random() < 0.5)
        else:
            members.append(await _join(world, server, topic))
    for member in members:
        await _leave(member, cancel=False)
    return changes
