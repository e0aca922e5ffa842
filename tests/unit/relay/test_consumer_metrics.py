"""Numbers of a consumer for Prometheus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from outboxkit.consumer import Consumer
from outboxkit_relay.observe.consumer import OUTCOMES, ConsumerMetrics
from tests.consumer_fixture import ConsumerFixture, handles, impatient, order


async def test_what_became_of_messages_is_counted_by_consumer_and_outcome(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=1))
    registry = CollectorRegistry()
    registry.register(ConsumerMetrics(billing))

    def value(outcome: str) -> float | None:
        return registry.get_sample_value(
            "outboxkit_consumer_messages_total", {"consumer": "billing", "outcome": outcome}
        )

    def fail(number: int, _ctx: Any) -> None:
        if number == 2:
            raise KeyError

    handles(billing, fail)
    assert value("handled") == 0
    world.send(order(1, message_id="a"), order(1, message_id="a"), order(2), order(3, type="order.cancelled"))
    await world.run(billing)

    assert [value(name) for name in ("handled", "duplicate", "retried", "buried", "ignored")] == [1, 1, 1, 1, 1]


async def test_every_count_of_a_consumer_has_its_number(world: ConsumerFixture) -> None:
    """A new outcome must be named here, too."""
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=1))
    handles(billing)
    world.send(order(1))
    await world.run(billing)

    assert {str(name) for name in billing.counts} <= set(OUTCOMES)


async def test_every_metric_of_a_consumer_is_documented_with_its_labels(world: ConsumerFixture) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "metrics.md").read_text().partition("## A consumer")[2]
    rows = re.findall(r"^\| `(outboxkit_\w+)` \|([^|]*)\|", page, re.MULTILINE)
    documented = {name.removesuffix("_total"): set(filter(None, labels.strip().split(", "))) for name, labels in rows}
    billing = Consumer("billing", sessions=world.asynchronous)
    billing._tally.ignore("orders", "order.cancelled")

    families = list(ConsumerMetrics(billing).collect())

    told = {family.name: {name for one in family.samples for name in one.labels} for family in families}
    assert all("consumer" in labels for labels in told.values())
    assert {name: labels - {"le", "consumer"} for name, labels in told.items()} == documented
