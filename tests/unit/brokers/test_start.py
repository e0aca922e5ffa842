"""Where a consumer begins that its broker does not know."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from outboxkit.brokers import Subscription, open_subscriber
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import Consumer
from outboxkit.errors import ConfigurationError
from tests.consumer_fixture import ConsumerFixture, handles, order

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("start", "effects"),
    [
        ("earliest", [1, 2]),
        ("latest", [2]),
        (LONG_AGO, [1, 2]),
        (datetime.now(UTC) + timedelta(days=1), [2]),
    ],
)
async def test_a_new_consumer_begins_where_it_says(world: ConsumerFixture, start: Any, effects: list[int]) -> None:
    billing = Consumer("billing", sessions=world.asynchronous, start=start)
    handles(billing)
    world.send(order(1))
    MemorySubscriber(world.exchange, billing.subscription)  # from here on it is known
    world.send(order(2))

    await world.run(billing)

    assert world.effects() == effects


async def test_a_start_says_nothing_to_a_consumer_that_is_known(world: ConsumerFixture) -> None:
    known = Subscription(consumer="billing", topics=("orders",))
    MemorySubscriber(world.exchange, known)
    world.send(order(1))
    billing = Consumer("billing", sessions=world.asynchronous, start="latest")
    handles(billing)

    await world.run(billing)

    assert world.effects() == [1]


@pytest.mark.parametrize("start", ["latest", LONG_AGO])
def test_a_queue_has_no_other_place_to_begin(start: Any) -> None:
    subscription = Subscription(consumer="billing", topics=("orders",), start=start)

    with pytest.raises(ConfigurationError, match=r"RabbitMQ has no start=.*purge the queue"):
        open_subscriber("amqp://localhost/", subscription)


@pytest.mark.parametrize("start", ["newest", None, 5, datetime(2020, 1, 1), "2020-01-01"])  # noqa: DTZ001  naive
def test_what_is_no_start_is_refused(world: ConsumerFixture, start: Any) -> None:
    with pytest.raises(ConfigurationError, match="start is 'earliest', 'latest' or a datetime with a time zone"):
        Consumer("billing", sessions=world.asynchronous, start=start)
