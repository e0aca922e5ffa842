"""The behaviour that every broker adapter owes, as tests over a harness. Needs pytest and pytest-asyncio (mode auto).

    pytest.register_assert_rewrite("outboxkit.testing.broker_conformance")
    from outboxkit.testing.broker_conformance import BrokerConformance, BrokerHarness

    class TestMyBroker(BrokerConformance):
        @pytest.fixture
        def harness(self):
            return BrokerHarness(url="mybroker://localhost", lonely=…, kill=…, start=…)

What a test asks of an adapter is what the port promises; where brokers differ, `outboxkit.brokers.Features` decides.
"""

# ruff: noqa: S101, PLR2004, PT017  tests assert; numbers are their point; pytest itself is not imported

from __future__ import annotations

import asyncio
import itertools
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Self

from outboxkit.brokers import (
    Batch,
    Delivery,
    Publisher,
    Receipts,
    Refusal,
    Subscriber,
    Subscription,
    open_publisher,
    open_subscriber,
)
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.message import Headers, Kind, Message, Row, pack_headers, wire_headers
from outboxkit.policy import Failure

__all__ = ["BrokerConformance", "BrokerHarness", "make_row"]

_PATIENCE_SECONDS: Final = 30.0
_PATIENCE: Final = timedelta(seconds=_PATIENCE_SECONDS)
_SHORT: Final = timedelta(milliseconds=300)
# What may be said of a message that was given up: nothing that blames it.
_GIVEN_UP: Final = {Failure.INDETERMINATE, Failure.BROKER_DOWN}

_positions = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerHarness:
    """What the suite needs to know about a broker.

    Attributes:
        url: where it is.
        options: client settings.
        lonely: makes a destination of that name which has no receiver yet.
        creates_topics: every destination exists as soon as it is named.
        kill: the broker dies at once, as by SIGKILL; None when it cannot.
        start: the broker is back, with everything that it had acknowledged.
        settle_seconds: how long fresh topology must live before a kill is fair.
    """

    url: str
    lonely: Callable[[str], Awaitable[None]]
    options: Mapping[str, str] = field(default_factory=dict)
    creates_topics: bool = False
    kill: Callable[[], None] | None = None
    start: Callable[[], None] | None = None
    settle_seconds: float = 0.0


def make_row(
    topic: str,
    payload: bytes = b"{}",
    *,
    key: bytes | None = b"k",
    headers: Headers = (),
    kind: Kind = Kind.EVENT,
) -> Row:
    """An outbox row as a relay would read it, at the next position."""
    identity = uuid.uuid4()
    now = datetime.now(UTC)
    message = Message(
        id=str(identity),
        type="order.placed",
        topic=topic,
        payload=payload,
        key=key,
        kind=kind,
        source="urn:conformance",
        content_type="application/json",
        occurred_at=now,
        correlation_id="c-1",
        headers=headers,
    )
    return Row(
        position=next(_positions),
        id=identity,
        topic=topic,
        key=key,
        type=message.type,
        kind=kind.value,
        payload=payload,
        headers=pack_headers(wire_headers(message)),
        recorded_at=now,
        expires_at=None,
    )


class BrokerConformance:
    """Subclass it and give it a fixture ``harness``."""

    async def test_what_is_acknowledged_arrives_in_order_per_key_byte_for_byte(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n, key=b"key-%d" % (n % 7)) for n in range(300)]

            futures = [world.publisher.publish(Batch(world.topic, rows[at : at + 100])) for at in range(0, 300, 100)]

            assert not _refusals(futures)
            received = await world.read(300)
            assert _by_key(received) == _by_key_of_rows(rows)

    async def test_evidence_is_given_where_the_features_say_so(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n) for n in range(5)]

            receipts = _result(world.publisher.publish(Batch(world.topic, rows)))

            received = await world.read(5)
            assert len(receipts.partitions) == len(receipts.offsets) == 5
            if world.publisher.features.evidence:
                found = {(d.partition, d.offset): d.payload for d in received}
                told = zip(receipts.partitions, receipts.offsets, strict=True)
                assert [found[place] for place in told] == [row.payload for row in rows]
            else:
                assert set(receipts.partitions) == set(receipts.offsets) == {-1}

    async def test_headers_keep_order_duplicates_and_bytes_that_are_no_text(self, harness: BrokerHarness) -> None:
        headers = (
            ("tenant", b"north"),
            ("twice", b"1"),
            ("blob", b"\xff\x00\xfe"),
            ("empty", b""),
            ("twice", b"\xff2"),
            ("größe", "ü".encode()),
            ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        )
        async with _World(harness) as world:
            row = make_row(world.topic, headers=headers)

            assert not _result(world.publisher.publish(Batch(world.topic, [row]))).refusals

            (delivery,) = await world.read(1)
            for name in {name for name, _ in headers}:
                assert _values(delivery.headers, name) == _values(headers, name)
            firsts = [name for name in dict(delivery.headers) if name in dict(headers)]
            assert firsts == list(dict(headers))

    async def test_the_envelope_arrives_in_the_spelling_of_the_port(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            row = make_row(world.topic)

            _result(world.publisher.publish(Batch(world.topic, [row])))

            (delivery,) = await world.read(1)
            seen = dict(delivery.headers)
            assert seen["ce_id"] == str(row.id).encode()
            assert seen["ce_type"] == b"order.placed"
            assert seen["ce_source"] == b"urn:conformance"
            assert seen["ce_sequence"] == b"%020d" % row.position
            assert seen["content-type"] == b"application/json"
            assert delivery.topic == world.topic
            assert world.topic in delivery.origin

    async def test_no_key_and_an_empty_payload_are_kept(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            row = make_row(world.topic, b"", key=None)

            assert not _result(world.publisher.publish(Batch(world.topic, [row]))).refusals

            (delivery,) = await world.read(1)
            assert delivery.key is None
            assert delivery.payload == b""

    async def test_a_binary_key_is_kept(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            row = make_row(world.topic, key=b"\x00\xff\x80")

            assert not _result(world.publisher.publish(Batch(world.topic, [row]))).refusals

            assert [delivery.key for delivery in await world.read(1)] == [b"\x00\xff\x80"]

    async def test_an_unknown_destination_is_refused_and_others_flow(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            nowhere = f"{world.topic}-nowhere"
            if harness.creates_topics:
                return

            lost = world.publisher.publish(Batch(nowhere, [make_row(nowhere)]))
            good = world.publisher.publish(Batch(world.topic, [make_row(world.topic)]))

            assert {refusal.failure for refusal in _result(lost).refusals} == {Failure.UNKNOWN_TOPIC}
            assert not _result(good).refusals
            troubles = world.publisher.check([world.topic, nowhere], _PATIENCE)
            assert {name: refusal.failure for name, refusal in troubles.items()} == {nowhere: Failure.UNKNOWN_TOPIC}
            assert "outboxkit init --topology" in troubles[nowhere].text

    async def test_a_destination_that_appears_later_is_found(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            late = f"{world.topic}-late"
            world.publisher.publish(Batch(late, [make_row(late)])).result(_PATIENCE_SECONDS)
            reader = await world.joined("reader", topics=(late,))

            row = make_row(late, b"second")
            _until(lambda: not _result(world.publisher.publish(Batch(late, [row]))).refusals)

            received = await _read(reader, lambda seen: any(delivery.payload == b"second" for delivery in seen))
            assert received

    async def test_a_message_without_a_receiver_is_kept_or_refused_but_never_lost(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            lonely = f"{world.topic}-lonely"
            await harness.lonely(lonely)

            batch = Batch(lonely, [make_row(lonely, b"%d" % n) for n in range(20)])
            refusals = _result(world.publisher.publish(batch)).refusals

            if refusals:
                assert [refusal.index for refusal in refusals] == list(range(20))
                assert {refusal.failure for refusal in refusals} == {Failure.UNROUTABLE}
            else:
                reader = await world.joined("late", topics=(lonely,))
                assert len(await _read(reader, lambda seen: len(seen) == 20)) == 20

    async def test_only_the_message_that_is_too_large_is_refused(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            limit = world.publisher.features.max_message_bytes
            if limit is None:
                return
            rows = [make_row(world.topic, b"before"), make_row(world.topic, bytes(limit + 1)), make_row(world.topic)]

            refusals = _result(world.publisher.publish(Batch(world.topic, rows))).refusals
            alone = {
                refusal.index: _result(world.publisher.publish(Batch(world.topic, [rows[refusal.index]]))).refusals
                for refusal in refusals
            }

            assert [index for index, again in alone.items() if again] == [1]
            assert alone[1][0].failure is Failure.TOO_LARGE
            assert {delivery.payload for delivery in await world.read(2)} == {b"before", b"{}"}

    async def test_commands_reach_their_queue_only(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            queue = f"{world.topic}-commands"
            worker = await world.joined("worker", queues=(queue,))

            row = make_row(queue, b"do", kind=Kind.COMMAND)
            assert not _result(world.publisher.publish(Batch(queue, [row]))).refusals

            (delivery,) = await _read(worker, lambda seen: len(seen) == 1)
            assert (delivery.topic, delivery.payload) == (queue, b"do")
            assert not await world.reader.receive(1, _SHORT)

    async def test_every_consumer_gets_every_event(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            other = await world.joined("other", topics=(world.topic,))

            _result(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(3)])))

            mine, theirs = await world.read(3), await _read(other, lambda seen: len(seen) == 3)
            assert [d.payload for d in mine] == [d.payload for d in theirs] == [b"0", b"1", b"2"]

    async def test_a_reset_ends_every_future_and_the_publisher_goes_on(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n, key=b"%d" % (n % 5)) for n in range(2_000)]
            futures = [world.publisher.publish(Batch(world.topic, rows[at : at + 200])) for at in range(0, 2_000, 200)]

            world.publisher.reset()

            assert all(future.done() for future in futures)
            refused = {
                at * 200 + refusal.index for at, future in enumerate(futures) for refusal in _result(future).refusals
            }
            assert {refusal.failure for refusal in _refusals(futures)} <= _GIVEN_UP
            again = [rows[index] for index in sorted(refused)]
            assert not again or not _result(world.publisher.publish(Batch(world.topic, again))).refusals
            received = await _read(world.reader, lambda seen: len({d.payload for d in seen}) == 2_000)
            assert len({delivery.payload for delivery in received}) == 2_000

    async def test_closing_twice_is_fine_and_a_closed_publisher_refuses(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            world.publisher.publish(Batch(world.topic, [make_row(world.topic)])).result(_PATIENCE_SECONDS)

            world.publisher.close()
            world.publisher.close()
            await world.reader.close()
            await world.reader.close()

            late = world.publisher.publish(Batch(world.topic, [make_row(world.topic)]))
            assert [refusal.failure for refusal in late.result(0).refusals] == [Failure.BROKER_DOWN]

    async def test_an_empty_batch_ends_at_once(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            receipts = world.publisher.publish(Batch(world.topic, [])).result(_PATIENCE_SECONDS)

            assert (len(receipts.partitions), len(receipts.offsets), receipts.refusals) == (0, 0, ())

    async def test_what_was_not_acknowledged_comes_again_in_order(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n) for n in range(20)]
            _result(world.publisher.publish(Batch(world.topic, rows)))
            received = await world.take(20)
            await world.reader.acknowledge(received[:8])
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            again = await _read(successor, lambda seen: len(seen) == 12)

            assert [delivery.payload for delivery in again] == [b"%d" % n for n in range(8, 20)]

    async def test_acknowledging_out_of_order_never_settles_what_was_left_out(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            _result(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(6)])))
            received = await world.take(6)
            await world.reader.acknowledge([received[4], received[1]])
            await world.reader.acknowledge([received[5], received[0]])
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            again = await _read(successor, lambda seen: {b"2", b"3"} <= {d.payload for d in seen})

            assert [delivery.payload for delivery in again][:2] == [b"2", b"3"]

    async def test_what_is_released_comes_again_in_order_before_what_follows(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            _result(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(10)])))
            received = await world.take(10, limit=4)
            await world.reader.acknowledge(received[:3])

            await world.reader.release(received[3:])
            _result(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"10")])))

            again = await world.take(8)
            assert [delivery.payload for delivery in again] == [b"%d" % n for n in range(3, 11)]
            await world.reader.acknowledge(again)
            assert not await world.reader.receive(1, _SHORT)

    async def test_a_late_acknowledgement_of_something_released_settles_nothing(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            _result(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(3)])))
            received = await world.take(3)
            await world.reader.release(received)
            again = await world.take(3)

            await world.reader.acknowledge(received)
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            third = await _read(successor, lambda seen: len(seen) == 3)
            assert [d.payload for d in again] == [d.payload for d in third] == [b"0", b"1", b"2"]

    async def test_a_cancelled_receive_loses_nothing(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            assert not await world.reader.receive(5, _SHORT)
            waiting = asyncio.ensure_future(world.reader.receive(5, _PATIENCE))
            await asyncio.sleep(0)  # it waits now
            rows = [make_row(world.topic, b"%d" % n) for n in range(3)]
            assert not _result(world.publisher.publish(Batch(world.topic, rows))).refusals
            # The loop stands still, so that what an adapter's thread brings meanwhile finds its caller cancelled.
            threading.Event().wait(_SHORT.total_seconds())

            waiting.cancel()
            await asyncio.wait([waiting])

            assert [d.payload for d in await world.take(3)] == [b"0", b"1", b"2"]

    async def test_receiving_from_nothing_returns_in_time(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            await world.reader.receive(1, _SHORT)  # joined
            began = time.monotonic()

            assert not await world.reader.receive(10, _SHORT)

            assert time.monotonic() - began < 5

    async def test_a_missing_topic_is_a_configuration_error_that_says_what_to_do(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            if harness.creates_topics:
                return
            lost = world.opened(world.subscription("reader", topics=(f"{world.topic}-missing",)))

            text = ""
            try:
                await lost.receive(1, _PATIENCE)
            except ConfigurationError as error:
                text = str(error)

            assert f"{world.topic}-missing" in text
            assert "outboxkit init --topology" in text

    async def test_declaring_twice_is_fine(self, harness: BrokerHarness) -> None:
        async with _World(harness) as world:
            lines = await world.reader.declare(world.subscription("reader", topics=(world.topic,)))

            assert any(world.topic in line for line in lines)

    async def test_a_setting_that_is_not_allowed_is_refused_by_name(self, harness: BrokerHarness) -> None:
        for options in ({"plugin.library.paths": "/evil.so"}, {"no such": "x"}):
            try:
                open_publisher(harness.url, options)
            except ConfigurationError as error:
                assert next(iter(options)) in str(error)
                assert "evil" not in str(error)
            else:
                raise AssertionError(f"{options} was taken")

    async def test_capacity_is_bounded_while_the_broker_is_away(self, harness: BrokerHarness) -> None:
        if harness.kill is None or harness.start is None:
            return
        async with _World(harness) as world:
            room = world.publisher.capacity(world.topic)
            harness.kill()
            try:
                futures: list[Future[Receipts]] = []
                while world.publisher.capacity(world.topic) and not any(future.done() for future in futures):
                    assert len(futures) <= room / 500, "it takes more than it said"
                    rows = [make_row(world.topic) for _ in range(500)]
                    futures.append(world.publisher.publish(Batch(world.topic, rows)))

                await asyncio.to_thread(world.publisher.reset)

                assert all(future.done() for future in futures)
                assert {refusal.failure for refusal in _refusals(futures)} <= _GIVEN_UP
                assert world.publisher.capacity(world.topic) == room
            finally:
                harness.start()

    async def test_a_broker_that_dies_while_publishing_loses_nothing_and_reorders_nothing(
        self,
        harness: BrokerHarness,
    ) -> None:
        if harness.kill is None or harness.start is None:
            return
        async with _World(harness) as world:
            relay = _StubbornRelay(world.publisher, world.topic)
            reading = asyncio.ensure_future(_read_distinct(world.reader, relay.expected))
            await asyncio.sleep(harness.settle_seconds)  # age is the fact that is waited for

            relaying = asyncio.ensure_future(asyncio.to_thread(relay.run))
            assert await asyncio.to_thread(relay.flowing.wait, _PATIENCE_SECONDS)
            await asyncio.to_thread(harness.kill)
            hit = await asyncio.to_thread(relay.hit.wait, _PATIENCE_SECONDS)
            await asyncio.to_thread(harness.start)
            relay.over.set()
            await relaying

            received = await reading
            assert _by_key(_first_occurrences(received)) == _by_key_of_rows(relay.rows)
            assert hit, "void: the kill hit no work in flight"


class _World:
    """A topic of its own with one reader and one publisher, all closed at the end."""

    def __init__(self, harness: BrokerHarness) -> None:
        self._harness = harness
        self._name = uuid.uuid4().hex[:12]
        self._subscribers: list[Subscriber] = []
        self.topic = f"conformance-{self._name}"
        self.publisher: Publisher = open_publisher(harness.url, harness.options)
        self.reader: Subscriber

    async def __aenter__(self) -> Self:
        self.reader = await self.joined("reader", topics=(self.topic,))
        return self

    async def __aexit__(self, *_: object) -> None:
        for subscriber in self._subscribers:
            await subscriber.close()
        await asyncio.to_thread(self.publisher.close)

    def subscription(self, consumer: str, topics: tuple[str, ...] = (), queues: tuple[str, ...] = ()) -> Subscription:
        # A consumer is known by its name on the whole broker: each test has its own.
        return Subscription(consumer=f"{consumer}-{self._name}", topics=topics, queues=queues)

    def opened(self, subscription: Subscription) -> Subscriber:
        subscriber = open_subscriber(self._harness.url, subscription, self._harness.options)
        self._subscribers.append(subscriber)
        return subscriber

    async def joined(self, consumer: str, topics: tuple[str, ...] = (), queues: tuple[str, ...] = ()) -> Subscriber:
        subscription = self.subscription(consumer, topics, queues)
        subscriber = self.opened(subscription)
        await subscriber.declare(subscription)
        return subscriber

    async def take(self, count: int, limit: int = 100) -> list[Delivery]:
        """So many deliveries, unacknowledged."""
        received: list[Delivery] = []
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while len(received) < count:
            assert time.monotonic() < deadline, f"only {len(received)} of {count} came"
            received += await self.reader.receive(min(limit, count - len(received)), _SHORT)
        return received

    async def read(self, count: int) -> list[Delivery]:
        """So many deliveries, acknowledged."""
        return await _read(self.reader, lambda seen: len(seen) >= count)


class _StubbornRelay:
    """Publishes in order through an outage: a window of batches, and all again from the first that is not settled."""

    _BATCH: Final = 100
    _WINDOW: Final = 4
    _BEFORE: Final = 2_000
    _AFTER: Final = 1_000

    def __init__(self, publisher: Publisher, topic: str) -> None:
        self._publisher = publisher
        self._topic = topic
        self._finished = False
        self.rows: list[Row] = []
        self.flowing = threading.Event()
        self.hit = threading.Event()  # something in flight had to be given up
        self.over = threading.Event()

    def expected(self) -> int | None:
        """How many distinct messages there are, once that is known."""
        return len(self.rows) if self._finished else None

    def run(self) -> None:
        deadline = time.monotonic() + 2 * _PATIENCE_SECONDS
        settled, last = 0, None
        while last is None or settled < last:
            assert time.monotonic() < deadline, f"{settled} of {len(self.rows)} settled, then silence"
            if last is None and self.over.is_set():
                last = len(self.rows) + self._AFTER
            self._write(min(settled + self._BATCH * self._WINDOW, last or 1 << 30))
            settled += self._send(self.rows[settled : settled + self._BATCH * self._WINDOW])
            if settled >= self._BEFORE:
                self.flowing.set()
        self._finished = True

    def _write(self, count: int) -> None:
        while len(self.rows) < count:
            number = len(self.rows)
            self.rows.append(make_row(self._topic, b"%d" % number, key=b"key-%d" % (number % 20)))

    def _send(self, rows: Sequence[Row]) -> int:
        batches = [rows[at : at + self._BATCH] for at in range(0, len(rows), self._BATCH)]
        futures: list[Future[Receipts]] = []
        for batch in batches:
            if not _refusals(futures, only_done=True):  # else it might overtake what was just refused
                futures.append(self._publisher.publish(Batch(self._topic, batch)))
        unfinished = wait(futures, timeout=2).not_done
        if unfinished or _refusals(futures, only_done=True):
            self.hit.set()
            self._publisher.reset()
            self._publisher.check([self._topic], timedelta(seconds=1))
        settled = 0
        for batch, future in zip(batches, futures, strict=False):
            refusals = _result(future).refusals
            assert {refusal.failure for refusal in refusals} <= _GIVEN_UP
            settled += refusals[0].index if refusals else len(batch)
            if refusals:
                break
        return settled


async def _read(subscriber: Subscriber, enough: Callable[[list[Delivery]], bool]) -> list[Delivery]:
    received: list[Delivery] = []
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not enough(received):
        assert time.monotonic() < deadline, f"only {len(received)} deliveries came"
        deliveries = await subscriber.receive(1_000, _SHORT)
        await subscriber.acknowledge(deliveries)
        received += deliveries
    return received


async def _read_distinct(subscriber: Subscriber, expected: Callable[[], int | None]) -> list[Delivery]:
    """Everything until that many distinct payloads were seen; patient through an outage."""
    received: list[Delivery] = []
    distinct: set[bytes | None] = set()
    deadline = time.monotonic() + 3 * _PATIENCE_SECONDS
    while len(distinct) != expected():
        assert time.monotonic() < deadline, f"{len(distinct)} of {expected()} came"
        try:
            deliveries = await subscriber.receive(500, _SHORT)
            received += deliveries  # the effect comes before the acknowledgement, which may fail
            distinct.update(delivery.payload for delivery in deliveries)
            await subscriber.acknowledge(deliveries)
        except TransientBrokerError:
            await asyncio.sleep(0.05)  # it is away: look again
    return received


def _result(future: Future[Receipts]) -> Receipts:
    return future.result(_PATIENCE_SECONDS)


def _refusals(futures: Iterable[Future[Receipts]], *, only_done: bool = False) -> list[Refusal]:
    return [refusal for future in futures if future.done() or not only_done for refusal in _result(future).refusals]


def _until(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not fact():
        assert time.monotonic() < deadline, "it never became true"


def _by_key(deliveries: Iterable[Delivery]) -> dict[bytes | None, list[bytes | None]]:
    found: dict[bytes | None, list[bytes | None]] = {}
    for delivery in deliveries:
        found.setdefault(delivery.key, []).append(delivery.payload)
    return found


def _by_key_of_rows(rows: Iterable[Row]) -> dict[bytes | None, list[bytes | None]]:
    found: dict[bytes | None, list[bytes | None]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row.payload)
    return found


def _first_occurrences(deliveries: Iterable[Delivery]) -> list[Delivery]:
    firsts: dict[bytes | None, Delivery] = {}
    for delivery in deliveries:
        firsts.setdefault(delivery.payload, delivery)
    return list(firsts.values())


def _values(headers: Headers, name: str) -> list[bytes]:
    return [value for key, value in headers if key == name]
