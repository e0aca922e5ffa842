"""A broker in memory misbehaves as it is told, and what outboxkit promises holds."""

from __future__ import annotations

from outboxkit.brokers import Batch, Receipts, open_publisher
from outboxkit.brokers.memory import Faults
from outboxkit.consumer import Consumer
from outboxkit.policy import Failure
from outboxkit.rows import Row
from tests.consumer_fixture import ConsumerFixture, handles, impatient, order, row_of


def published(world: ConsumerFixture, *numbers: int) -> Receipts:
    publisher = open_publisher(f"memory://{world.exchange_name}")
    rows = [row_of(order(number, key=f"k{number % 2}"), number) for number in numbers]
    return publisher.publish(Batch("orders", rows)).result()


async def effects(world: ConsumerFixture) -> list[int]:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(), concurrency=1)
    handles(billing)
    await world.run(billing)
    return world.effects()


async def test_copies_and_lost_acknowledgements_have_one_effect(world: ConsumerFixture) -> None:
    world.exchange.faults = Faults(copies=2, lost_acknowledgements=3)
    published(world, 1, 2)

    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient())
    handles(billing)
    ran = await world.run(billing)

    assert sorted(world.effects()) == [1, 2]
    assert billing.counts == {"handled": 2, "duplicate": 7}  # six were stored, three came again
    assert sum(delivery.redelivered for delivery in ran.received) == 3


async def test_disorder_turns_keys_round_and_no_key_itself(world: ConsumerFixture) -> None:
    published(world, 1, 2, 3, 4)
    world.exchange.faults = Faults(disorder=True)

    billing = Consumer("billing", sessions=world.asynchronous, concurrency=1)
    handles(billing)
    ran = await world.run(billing)

    assert [delivery.offset for delivery in ran.received] == [1, 3, 0, 2]
    assert world.effects().index(1) < world.effects().index(3)
    assert world.effects().index(2) < world.effects().index(4)


async def test_a_lost_confirm_leaves_the_message_and_its_publisher_without_knowledge(world: ConsumerFixture) -> None:
    world.exchange.faults = Faults(lost_confirms=1)

    receipts = published(world, 1, 2)

    assert [(one.index, one.failure) for one in receipts.refusals] == [(0, Failure.INDETERMINATE)]
    assert receipts.offsets == [-1, 1]
    assert sorted(await effects(world)) == [1, 2]


async def test_a_part_of_a_batch_is_refused_for_the_reason_that_is_given(world: ConsumerFixture) -> None:
    def refuse(row: Row) -> Failure | None:
        return {1: Failure.UNROUTABLE, 3: Failure.BLOCKED}.get(row.position)

    world.exchange.faults = Faults(refuse=refuse)

    receipts = published(world, 1, 2, 3)

    told = [(one.index, one.failure) for one in receipts.refusals]
    assert told == [(0, Failure.UNROUTABLE), (2, Failure.BLOCKED)]
    assert await effects(world) == [2]
