"""``outboxkit consume``: the handlers of a consumer, until a signal."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import click

from outboxkit import _failpoints
from outboxkit.brokers import open_subscriber
from outboxkit.registries import open_registry
from outboxkit_relay.cli.console import import_string
from outboxkit_relay.daemon import lifecycle
from outboxkit_relay.observe import health
from outboxkit_relay.observe.consumer import ProbedConsumers

if TYPE_CHECKING:
    from outboxkit.brokers import Subscriber
    from outboxkit.consumer import Consumer
    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.settings import Settings

__all__ = ["command", "subscriber_of"]

_log: Final = logging.getLogger(__name__)


@click.command()
@click.argument("app", metavar="MODULE:CONSUMER")
@click.pass_obj
def command(invocation: Invocation, app: str) -> None:
    """Run the handlers of a consumer until SIGTERM or SIGINT.

    MODULE:CONSUMER is an import string, for example app:billing. The consumer's own sessions say which database;
    registry_url says where schemas are found that it does not know, unless it has resolve= of its own. With
    probes.port it answers /livez, /readyz and /metrics.
    """
    settings = invocation.settings
    _failpoints.enable(settings.failpoints)
    asyncio.run(_consume(import_string.load(app), settings))


async def _consume(consumer: Consumer, settings: Settings) -> None:
    if settings.registry_url is not None:
        consumer.resolve_with(open_registry(settings.registry_url.get_secret_value()).resolve)
    subscriber = subscriber_of(consumer, settings)
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def ask() -> None:
        loop.call_soon_threadsafe(stop.set)

    probed = ProbedConsumers((consumer,), version("outboxkit"))
    with health.serving(settings.probes, probed), lifecycle.stop_on_signals(ask):
        if await lifecycle.await_sessions(consumer.config.sessions, stop):
            await consumer.run(subscriber, stop)
            counts = {str(name): count for name, count in consumer.counts.items()}
            _log.info("consumer.stopped", extra={"consumer": consumer.name, "counts": counts})


def subscriber_of(consumer: Consumer, settings: Settings) -> Subscriber:
    """Returns what a consumer receives from; nothing is connected yet.

    Raises:
        ConfigurationError: the broker's URL or one of its options is wrong, or an extra is missing.
    """
    url, credentials = settings.broker_address(), settings.credentials_of("")
    return open_subscriber(url, consumer.subscription, settings.broker, credentials=credentials)
