"""RabbitMQ, through aio-pika: events go to a topic exchange by their type, commands straight to their queue.

A publisher has one channel per destination, with confirms; every message is mandatory and persistent. A consumer has
one quorum queue per topic with a single active consumer: with several, later messages overtake a redelivered one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from outboxkit.brokers.rabbitmq import examine as examination
from outboxkit.brokers.rabbitmq.publish import RabbitPublisher
from outboxkit.brokers.rabbitmq.settings import parse
from outboxkit.brokers.rabbitmq.subscribe import RabbitSubscriber

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from outboxkit.brokers import Credentials, Expected, Subscription
    from outboxkit.findings import Finding

__all__ = ["RabbitPublisher", "RabbitSubscriber", "examine", "publisher", "subscriber"]


def publisher(url: str, options: Mapping[str, str], credentials: Credentials | None = None) -> RabbitPublisher:
    """Returns a publisher that connects at its first use: the plug's entry."""
    return RabbitPublisher(parse(url, options, credentials))


def subscriber(
    url: str, subscription: Subscription, options: Mapping[str, str], credentials: Credentials | None = None
) -> RabbitSubscriber:
    """Returns a subscriber that connects at its first use: the plug's entry."""
    return RabbitSubscriber(parse(url, options, credentials), subscription)


def examine(
    url: str, expected: Expected, options: Mapping[str, str], credentials: Credentials | None = None
) -> Iterable[Finding]:
    """Examines the broker: the plug's entry."""
    return examination.examine(parse(url, options, credentials), expected)
