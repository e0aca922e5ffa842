"""Numbers and probes of consumers: in `outboxkit consume`, or inside an application that runs them.

from prometheus_client import REGISTRY
REGISTRY.register(ConsumerMetrics(billing))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from prometheus_client.registry import Collector

from outboxkit.consumer.observe.stats import why_not_alive, why_not_ready
from outboxkit_relay.observe.families import build_info, counter, gauge, histogram
from outboxkit_relay.observe.sentences import sentence_of_consumer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric

    from outboxkit.consumer import Consumer
    from outboxkit.consumer.observe.stats import ConsumerStats

__all__ = ["OUTCOMES", "ConsumerMetrics", "ProbedConsumers"]

#: What became of messages, in the words of `Consumer.counts`, and what each number says.
OUTCOMES: Final = {
    "handled": "their effect is committed",
    "duplicate": "their effect was committed before",
    "ignored": "of a type that nobody here handles",
    "expired": "their time was over",
    "retried": "failed, and wait for their next try",
    "followed": "wait behind another one of their key",
    "buried": "dead letters",
    "parked": "dead letters behind which their key waits for an operator",
    "stuck": "cannot be stored in any way; the broker still has them",
    "gone": "another process took them",
    "out of order": "took effect after a later one of their key",
}

_OF_CONSUMER: Final = ("consumer",)
_NUMBERS: Final[dict[str, tuple[str, Callable[[ConsumerStats], float]]]] = {
    "consumer_ready": ("Whether it can handle messages.", lambda one: not why_not_ready(one)),
    "consumer_sources": ("Partitions or queues that it reads now.", lambda one: one.assignment.sources or 0),
    "consumer_lag_messages": (
        "Messages in them that are not settled; NaN while the broker has not told.",
        lambda one: math.nan if one.assignment.lag is None else one.assignment.lag,
    ),
    "consumer_in_hand_messages": ("Deliveries in its memory.", lambda one: one.in_hand),
    "consumer_slots": ("Attempts that may run at once.", lambda one: one.slots),
    "consumer_busy_slots": ("Attempts that run now.", lambda one: one.busy),
    "inbox_oldest_waiting_age_seconds": (
        "Since the first failure, or the arrival, of what has waited longest, over all processes.",
        lambda one: one.backlog.oldest.total_seconds(),
    ),
}


class ConsumerMetrics(Collector):
    """Every number of consumers, made when it is asked for.

    The labels are bounded: consumer, outcome, reason, and at most 500 pairs of topic and type.

    Args:
        consumers: what to report on.
    """

    def __init__(self, *consumers: Consumer) -> None:
        self._consumers = consumers

    def collect(self) -> Iterable[Metric]:
        """For one scrape; asks nobody."""
        found = [consumer.stats for consumer in self._consumers]
        yield from _messages(found)
        for name, (text, value) in _NUMBERS.items():
            yield gauge(name, text, _OF_CONSUMER, {(one.consumer,): value(one) for one in found})
        waiting = {
            (one.consumer, reason): getattr(one.backlog, reason)
            for one in found
            for reason in ("retry", "follower", "parked")
        }
        text = (
            "Deliveries in the waiting room, over all processes: for their next try, behind one, or behind a dead one."
        )
        yield gauge("inbox_waiting_messages", text, ("consumer", "reason"), waiting)
        yield from _durations(found)

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance."""
        return ()


def _messages(found: list[ConsumerStats]) -> Iterator[Metric]:
    received = {(one.consumer,): one.received for one in found}
    yield counter("consumer_received", "Deliveries that the broker handed out.", _OF_CONSUMER, received)
    text = "Messages, by what became of them: " + "; ".join(f"{name}: {says}" for name, says in OUTCOMES.items())
    outcomes = {
        (one.consumer, outcome.replace(" ", "_")): one.counts.get(outcome, 0) for one in found for outcome in OUTCOMES
    }
    yield counter("consumer_messages", text, ("consumer", "outcome"), outcomes)
    ignored = {(one.consumer, *pair): number for one in found for pair, number in one.ignored.items()}
    text = "Messages of types that nobody here handles."
    yield counter("consumer_ignored", text, ("consumer", "topic", "type"), ignored)


def _durations(found: list[ConsumerStats]) -> Iterator[Metric]:
    text = "In a handler, failed calls included."
    yield histogram("handler_duration_seconds", text, _OF_CONSUMER, {(one.consumer,): one.handler for one in found})
    text = "In a transaction of a handler, with its commit."
    transactions = {(one.consumer,): one.transaction for one in found}
    yield histogram("consumer_transaction_duration_seconds", text, _OF_CONSUMER, transactions)
    text = "From the commit of the sender to that of the effect."
    critical = {(one.consumer,): one.critical_time for one in found}
    yield histogram("critical_time_seconds", text, _OF_CONSUMER, critical)


# --- probes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbedConsumers:
    """The consumers of one process, as the health endpoints ask them: all of them must be well.

    Attributes:
        consumers: that run here.
        version: of this software.
    """

    consumers: tuple[Consumer, ...]
    version: str

    def why_not_alive(self) -> str:
        """The reason to restart the process, empty when there is none."""
        return "; ".join(filter(None, (why_not_alive(one.stats) for one in self.consumers)))

    def readiness(self) -> tuple[str, Mapping[str, object]]:
        """The reason why one of them handles nothing, empty when all can; and how each stands."""
        found = [one.stats for one in self.consumers]
        return "; ".join(filter(None, map(why_not_ready, found))), {"consumers": list(map(_standing, found))}

    def metrics(self) -> _ProbedMetrics:
        """Returns what collects their numbers."""
        return _ProbedMetrics(self)


class _ProbedMetrics(ConsumerMetrics):
    """The numbers of consumers in a process of their own."""

    def __init__(self, probed: ProbedConsumers) -> None:
        super().__init__(*probed.consumers)
        self._version = probed.version

    def collect(self) -> Iterable[Metric]:
        """For one scrape; asks nobody."""
        yield build_info(self._version)
        yield from super().collect()

    def close(self) -> None:
        """Nothing counts in the background."""


def _standing(found: ConsumerStats) -> dict[str, object]:
    trouble = found.cut_off and sentence_of_consumer(found.consumer, found.cut_off, datetime.now(UTC))
    return {
        "consumer": found.consumer,
        "phase": found.phase.value,
        "sources": found.assignment.sources,
        "lag": found.assignment.lag,
        "in_hand": found.in_hand,
        "trouble": trouble,
    }
