"""Numbers of a consumer for Prometheus: in `outboxkit consume`, or inside an application that runs it.

from prometheus_client import REGISTRY
REGISTRY.register(ConsumerMetrics(billing))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client import Metric

    from outboxkit.consumer import Consumer

__all__ = ["OUTCOMES", "ConsumerMetrics"]

#: What became of messages, in the words of `Consumer.counts`, and what each number says.
OUTCOMES: Final = {
    "handled": "their effect is committed",
    "duplicate": "their effect was committed before",
    "ignored": "of a type that nobody here handles",
    "expired": "their time was over",
    "retried": "failed, and wait for their next try",
    "followed": "wait behind another one of their key",
    "buried": "dead letters",
    "stuck": "cannot be stored in any way; the broker still has them",
    "gone": "another process took them",
    "out of order": "took effect after a later one of their key",
}


class ConsumerMetrics(Collector):
    """The counts of consumers, made when they are asked for. The labels are bounded: consumer and outcome.

    Args:
        consumers: what to report on.
    """

    def __init__(self, *consumers: Consumer) -> None:
        self._consumers = consumers

    def collect(self) -> Iterable[Metric]:
        """For one scrape."""
        text = "Messages, by what became of them: " + "; ".join(f"{name}: {says}" for name, says in OUTCOMES.items())
        family = CounterMetricFamily("outboxkit_consumer_messages", text, labels=("consumer", "outcome"))
        for consumer in self._consumers:
            for outcome in OUTCOMES:
                family.add_metric((consumer.name, outcome.replace(" ", "_")), float(consumer.counts[outcome]))
        yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance."""
        return ()
