"""Apache Kafka, through librdkafka: idempotent producer, cooperative consumer, and a cluster inside the process.

An acknowledged record is on all in-sync replicas (``acks=all``). Records of one key stay in order, because librdkafka
never gives up by itself (``message.timeout.ms=0``): giving up is `Publisher.reset`, which purges everything.

``kafka://embedded`` is librdkafka's mock cluster inside this process, for demos and quick tests. It is no evidence
about Kafka.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outboxkit.brokers.kafka import embedded
from outboxkit.brokers.kafka import examine as examination
from outboxkit.brokers.kafka.embedded import embedded_cluster
from outboxkit.brokers.kafka.publish import KafkaPublisher
from outboxkit.brokers.kafka.settings import EMBEDDED, parse
from outboxkit.brokers.kafka.subscribe import KafkaSubscriber

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from outboxkit.brokers import Credentials, Expected, Subscription
    from outboxkit.findings import Finding

__all__ = ["KafkaPublisher", "KafkaSubscriber", "embedded_cluster", "examine", "publisher", "subscriber"]


def publisher(url: str, options: Mapping[str, str], credentials: Credentials | None = None) -> KafkaPublisher:
    """Returns a publisher that connects at its first use: the plug's entry."""
    return KafkaPublisher(parse(_resolved(url), options, credentials))


def subscriber(
    url: str, subscription: Subscription, options: Mapping[str, str], credentials: Credentials | None = None
) -> KafkaSubscriber:
    """Returns a subscriber that connects at its first use: the plug's entry."""
    return KafkaSubscriber(parse(_resolved(url), options, credentials), subscription)


def examine(
    url: str, expected: Expected, options: Mapping[str, str], credentials: Credentials | None = None
) -> Iterable[Finding]:
    """Examines the cluster: the plug's entry."""
    return examination.examine(parse(_resolved(url), options, credentials), expected)


def _resolved(url: str) -> str:
    scheme, _, rest = url.partition("://")
    hosts, _, query = rest.partition("?")
    return f"{scheme}://{embedded.shared(query)}" if hosts.rstrip("/") == EMBEDDED else url
