"""The half of the broker suite that is about reading: redelivery, release, acknowledgement, a cancelled receive."""

# ruff: noqa: S101, PLR2004  tests assert; numbers are their point; pytest itself is not imported

from __future__ import annotations

import asyncio
import threading

from outboxkit.brokers import Assignment, Batch
from outboxkit.errors import ConfigurationError
from outboxkit.testing.broker_harness import (
    PATIENCE,
    SHORT,
    BrokerHarness,
    Patience,
    World,
    make_row,
    outcome,
    read,
)

__all__ = ["ReadingConformance"]


class ReadingConformance:
    """Part of `outboxkit.testing.broker_conformance.BrokerConformance`."""

    async def test_what_was_not_acknowledged_comes_again_in_order(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            rows = [make_row(world.topic, b"%d" % n) for n in range(20)]
            outcome(world.publisher.publish(Batch(world.topic, rows)))
            received = await world.take(20)
            await world.reader.acknowledge(received[:8])
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            again = await read(successor, lambda seen: len(seen) == 12)

            assert [delivery.payload for delivery in again] == [b"%d" % n for n in range(8, 20)]

    async def test_acknowledging_out_of_order_never_settles_what_was_left_out(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(6)])))
            received = await world.take(6)
            await world.reader.acknowledge([received[4], received[1]])
            await world.reader.acknowledge([received[5], received[0]])
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            again = await read(successor, lambda seen: {b"2", b"3"} <= {d.payload for d in seen})

            assert [delivery.payload for delivery in again][:2] == [b"2", b"3"]

    async def test_what_is_released_comes_again_in_order_before_what_follows(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(10)])))
            received = await world.take(10, limit=4)
            await world.reader.acknowledge(received[:3])

            await world.reader.release(received[3:])
            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"10")])))

            again = await world.take(8)
            assert [delivery.payload for delivery in again] == [b"%d" % n for n in range(3, 11)]
            await world.reader.acknowledge(again)
            assert not await world.reader.receive(1, SHORT)

    async def test_a_late_acknowledgement_of_something_released_settles_nothing(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(3)])))
            received = await world.take(3)
            await world.reader.release(received)
            again = await world.take(3)

            await world.reader.acknowledge(received)
            await world.reader.close()

            successor = await world.joined("reader", topics=(world.topic,))
            third = await read(successor, lambda seen: len(seen) == 3)
            assert [d.payload for d in again] == [d.payload for d in third] == [b"0", b"1", b"2"]

    async def test_the_assignment_says_what_is_read_and_how_much_of_it_is_not_settled(
        self, harness: BrokerHarness
    ) -> None:
        async with World(harness) as world:
            assert world.reader.assignment == Assignment()
            outcome(world.publisher.publish(Batch(world.topic, [make_row(world.topic, b"%d" % n) for n in range(5)])))
            received = await world.take(5)
            await world.reader.acknowledge(received[:2])

            patience = Patience()
            while world.reader.assignment.lag != 3:
                patience.wait_for_more(0, f"not 3 unsettled: {world.reader.assignment}")
                assert not await world.reader.receive(1, SHORT)
            assert world.reader.assignment.sources

    async def test_a_cancelled_receive_loses_nothing(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            assert not await world.reader.receive(5, SHORT)
            waiting = asyncio.ensure_future(world.reader.receive(5, PATIENCE))
            await asyncio.sleep(0)  # it waits now
            rows = [make_row(world.topic, b"%d" % n) for n in range(3)]
            assert not outcome(world.publisher.publish(Batch(world.topic, rows))).refusals
            # The loop stands still, so that what an adapter's thread brings meanwhile finds its caller cancelled.
            threading.Event().wait(SHORT.total_seconds())

            waiting.cancel()
            await asyncio.wait([waiting])

            assert [d.payload for d in await world.take(3)] == [b"0", b"1", b"2"]

    async def test_receiving_from_nothing_returns_in_time(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            await world.reader.receive(1, SHORT)  # joined
            receiving = asyncio.ensure_future(world.reader.receive(10, SHORT))
            much_longer = asyncio.ensure_future(asyncio.sleep(20 * SHORT.total_seconds()))

            await asyncio.wait({receiving, much_longer}, return_when=asyncio.FIRST_COMPLETED)

            assert receiving.done()
            assert not receiving.result()
            much_longer.cancel()

    async def test_a_missing_topic_is_a_configuration_error_that_says_what_to_do(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            if harness.creates_topics:
                return
            lost = world.opened(world.subscription("reader", topics=(f"{world.topic}-missing",)))

            text = ""
            try:
                await lost.receive(1, PATIENCE)
            except ConfigurationError as error:
                text = str(error)

            assert f"{world.topic}-missing" in text
            assert "outboxkit init --topology" in text

    async def test_declaring_twice_is_fine(self, harness: BrokerHarness) -> None:
        async with World(harness) as world:
            lines = await world.reader.declare(world.subscription("reader", topics=(world.topic,)))

            assert any(world.topic in line for line in lines)
