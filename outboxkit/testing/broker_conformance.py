"""The behaviour that every broker adapter owes, as tests over a harness. Needs pytest and pytest-asyncio (mode auto).

    suite = ("broker_conformance", "broker_harness", "broker_reading")
    pytest.register_assert_rewrite(*(f"outboxkit.testing.{module}" for module in suite))
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
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta

from outboxkit.brokers import (
    Batch,
    Receipts,
    open_publisher,
)
from outboxkit.errors import ConfigurationError
from outboxkit.message import Kind
from outboxkit.policy import Failure
from outboxkit.testing.broker_harness import (
    GIVEN_UP,
    PATIENCE,
    PATIENCE_SECONDS,
    SHORT,
    BrokerHarness,
    StubbornRelay,
    World,
    await_fact,
    by_key,
    by_key_of_rows,
    first_occurrences,
    make_row,
    outcome,
    read,
    read_distinct,
    refusals_of,
    values_of,
)
from outboxkit.testing.broker_reading import ReadingConformance

__all__ = ["BrokerConformance", "BrokerHarness", "make_row"]


class BrokerConformance(ReadingConformance):
    """Subclass it and give it a fixture ``harness``."""

    async def test_what_is_acknowledged_arrives_in_order_per_key_byte_for_byte(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n, key=b"key-%d" % (n % 7)) for n in range(300)]

            futures = [world.publisher.publish(Batch(world.topic, rows[at : at + 100])) for at in range(0, 300, 100)]

            assert not refusals_of(futures)
            received = await world.read(300)
            assert by_key(received) == by_key_of_rows(rows)

    async def test_evidence_is_given_where_the_features_say_so(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n) for n in range(5)]

            receipts = outcome(world.publisher.publish(Batch(world.topic, rows)))

            received = await world.read(5)
            assert len(receipts.partitions) == len(receipts.offsets) == 5
            if world.publisher.features.evidence:
                found = {(d.partition, d.offset): d.payload for d in received}
                told = zip(receipts.partitions, receipts.offsets, strict=True)
                assert [found[place] for place in told] == [row.payload for row in rows]
            else:
                assert set(receipts.partitions) == set(receipts.offsets) == {-1}

    async def test_headers_keep_duplicates_in_order_and_bytes_that_are_no_text(self, harness: BrokerHarness) -> None:
        headers = (
            ("tenant", b"north"),
            ("twice", b"1"),
            ("blob", b"\xff\x00\xfe"),
            ("empty", b""),
            ("twice", b"\xff2"),
            ("größe", "ü".encode()),
            ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        )
        async with World(harness) as world:
            row = make_row(world.topic, headers=headers)

            assert not outcome(world.publisher.publish(Batch(world.topic, [row]))).refusals

            (delivery,) = await world.read(1)
            for name in {name for name, _ in headers}:
                assert values_of(delivery.headers, name) == values_of(headers, name)

    async def test_the_envelope_arrives_in_the_spelling_of_the_port(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            row = make_row(world.topic)

            outcome(world.publisher.publish(Batch(world.topic, [row])))

            (delivery,) = await world.read(1)
            seen = dict(delivery.headers)
            assert seen["ce_id"] == str(row.id).encode()
            assert seen["ce_type"] == b"order.placed"
            assert seen["ce_source"] == b"urn:conformance"
            assert seen["ce_sequence"] == b"%020d" % row.position
            assert seen["content-type"] == b"application/json"
            assert delivery.topic == world.topic
            assert world.topic in delivery.origin

    async def test_the_facts_of_the_record_are_told(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            began = datetime.now(UTC)
            headers = (("content-encoding", b"gzip"), ("reply-to", b"answers"))
            rows = [make_row(world.topic, b"%d" % n, headers=headers) for n in range(3)]

            outcome(world.publisher.publish(Batch(world.topic, rows)))

            for delivery in await world.read(3):
                assert (delivery.content_encoding, delivery.reply_to) == ("gzip", "answers")
                assert values_of(delivery.headers, "content-encoding") == [b"gzip"]
                assert values_of(delivery.headers, "reply-to") == [b"answers"]
                assert delivery.timestamp is not None
                assert abs(delivery.timestamp - began) < timedelta(minutes=1)
                assert (delivery.partition is None) == (delivery.offset is None)
                assert (delivery.offset is not None) == world.publisher.features.evidence
                assert delivery.routing_key in {None, "order.placed"}
                assert delivery.fault is None

    async def test_no_key_and_an_empty_payload_are_kept(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            row = make_row(world.topic, b"", key=None)

            assert not outcome(world.publisher.publish(Batch(world.topic, [row]))).refusals

            (delivery,) = await world.read(1)
            assert delivery.key is None
            assert delivery.payload == b""

    async def test_a_binary_key_is_kept(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            row = make_row(world.topic, key=b"\x00\xff\x80")

            assert not outcome(world.publisher.publish(Batch(world.topic, [row]))).refusals

            assert [delivery.key for delivery in await world.read(1)] == [b"\x00\xff\x80"]

    async def test_an_unknown_destination_is_refused_and_others_flow(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            nowhere = f"{world.topic}-nowhere"
            if harness.creates_topics:
                return

            lost = world.publisher.publish(Batch(nowhere, [make_row(nowhere)]))
            good = world.publisher.publish(Batch(world.topic, [make_row(world.topic)]))

            assert {refusal.failure for refusal in outcome(lost).refusals} == {Failure.UNKNOWN_TOPIC}
            assert not outcome(good).refusals
            troubles = world.publisher.check([world.topic, nowhere], PATIENCE)
            assert {name: refusal.failure for name, refusal in troubles.items()} == {nowhere: Failure.UNKNOWN_TOPIC}
            assert "outboxkit init --topology" in troubles[nowhere].text

    async def test_a_destination_that_appears_later_is_found(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            late = f"{world.topic}-late"
            world.publisher.publish(Batch(late, [make_row(late)])).result(PATIENCE_SECONDS)
            reader = await world.joined("reader", topics=(late,))

            row = make_row(late, b"second")
            await_fact(lambda: not outcome(world.publisher.publish(Batch(late, [row]))).refusals)

            received = await read(reader, lambda seen: any(delivery.payload == b"second" for delivery in seen))
            assert received

    async def test_a_message_without_a_receiver_is_kept_or_refused_but_never_lost(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            lonely = f"{world.topic}-lonely"
            await harness.lonely(lonely)

            batch = Batch(lonely, [make_row(lonely, b"%d" % n) for n in range(20)])
            refusals = outcome(world.publisher.publish(batch)).refusals

            if refusals:
                assert [refusal.index for refusal in refusals] == list(range(20))
                assert {refusal.failure for refusal in refusals} == {Failure.UNROUTABLE}
            else:
                reader = await world.joined("late", topics=(lonely,))
                assert len(await read(reader, lambda seen: len(seen) == 20)) == 20

    async def test_only_the_message_that_is_too_large_is_refused(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            limit = world.publisher.features.max_message_bytes
            if limit is None:
                return
            rows = [make_row(world.topic, b"before"), make_row(world.topic, bytes(limit + 1)), make_row(world.topic)]

            refusals = outcome(world.publisher.publish(Batch(world.topic, rows))).refusals
            alone = {
                refusal.index: outcome(world.publisher.publish(Batch(world.topic, [rows[refusal.index]]))).refusals
                for refusal in refusals
            }

            assert [index for index, again in alone.items() if again] == [1]
            assert alone[1][0].failure is Failure.TOO_LARGE
            assert {delivery.payload for delivery in await world.read(2)} == {b"before", b"{}"}

    async def test_commands_reach_their_queue_only(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            queue = f"{world.topic}-commands"
            worker = await world.joined("worker", queues=(queue,))

            row = make_row(queue, b"do", kind=Kind.COMMAND)
            assert not outcome(world.publisher.publish(Batch(queue, [row]))).refusals

            (delivery,) = await read(worker, lambda seen: len(seen) == 1)
            assert (delivery.topic, delivery.payload) == (queue, b"do")
            assert not await world.reader.receive(1, SHORT)

    async def test_every_consumer_gets_every_event(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            other = await world.joined("other", topics=(world.topic,))

            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(3)])))

            mine, theirs = await world.read(3), await read(other, lambda seen: len(seen) == 3)
            assert [d.payload for d in mine] == [d.payload for d in theirs] == [b"0", b"1", b"2"]

    async def test_a_reset_ends_every_future_and_the_publisher_goes_on(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n, key=b"%d" % (n % 5)) for n in range(2_000)]
            futures = [world.publisher.publish(Batch(world.topic, rows[at : at + 200])) for at in range(0, 2_000, 200)]

            world.publisher.reset()

            assert all(future.done() for future in futures)
            refused = {
                at * 200 + refusal.index for at, future in enumerate(futures) for refusal in outcome(future).refusals
            }
            assert {refusal.failure for refusal in refusals_of(futures)} <= GIVEN_UP
            again = [rows[index] for index in sorted(refused)]
            assert not again or not outcome(world.publisher.publish(Batch(world.topic, again))).refusals
            received = await read(world.reader, lambda seen: len({d.payload for d in seen}) == 2_000)
            assert len({delivery.payload for delivery in received}) == 2_000

    async def test_closing_twice_is_fine_and_a_closed_publisher_refuses(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            world.publisher.publish(Batch(world.topic, [make_row(world.topic)])).result(PATIENCE_SECONDS)

            world.publisher.close()
            world.publisher.close()
            await world.reader.close()
            await world.reader.close()

            late = world.publisher.publish(Batch(world.topic, [make_row(world.topic)]))
            assert [refusal.failure for refusal in late.result(0).refusals] == [Failure.BROKER_DOWN]

    async def test_a_row_that_cannot_be_put_on_the_wire_is_refused_alone(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            foreign = make_row(world.topic)._replace(headers=b"written by somebody else")
            rows = [make_row(world.topic, b"before"), foreign, make_row(world.topic, b"after")]

            refusals = outcome(world.publisher.publish(Batch(world.topic, rows))).refusals

            assert [(refusal.index, refusal.failure) for refusal in refusals] == [(1, Failure.INVALID)]
            assert [delivery.payload for delivery in await world.read(2)] == [b"before", b"after"]

    async def test_an_empty_batch_ends_at_once(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            receipts = world.publisher.publish(Batch(world.topic, [])).result(PATIENCE_SECONDS)

            assert (len(receipts.partitions), len(receipts.offsets), receipts.refusals) == (0, 0, ())

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
        async with World(harness) as world:
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
                assert {refusal.failure for refusal in refusals_of(futures)} <= GIVEN_UP
                assert world.publisher.capacity(world.topic) == room
            finally:
                harness.start()

    async def test_a_broker_that_dies_while_publishing_loses_nothing_and_reorders_nothing(
        self,
        harness: BrokerHarness,
    ) -> None:
        if harness.kill is None or harness.start is None:
            return
        async with World(harness) as world:
            relay = StubbornRelay(world.publisher, world.topic)
            reading = asyncio.ensure_future(read_distinct(world.reader, relay.expected))
            await asyncio.sleep(harness.settle_seconds)  # age is the fact that is waited for

            relaying = asyncio.ensure_future(asyncio.to_thread(relay.run))
            assert await asyncio.to_thread(relay.flowing.wait, PATIENCE_SECONDS)
            await asyncio.to_thread(harness.kill)
            hit = await asyncio.to_thread(relay.hit.wait, PATIENCE_SECONDS)
            await asyncio.to_thread(harness.start)
            relay.over.set()
            await relaying

            received = await reading
            assert by_key(first_occurrences(received)) == by_key_of_rows(relay.rows)
            assert hit, "void: the kill hit no work in flight"
