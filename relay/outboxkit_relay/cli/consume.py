"""``outboxkit consume``: the handlers of consumers, until a signal."""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import click

from outboxkit import _failpoints
from outboxkit.errors import ConfigurationError
from outboxkit.registries import open_registry
from outboxkit_relay.cli.console import import_string
from outboxkit_relay.daemon import lifecycle
from outboxkit_relay.observe import health
from outboxkit_relay.observe.consumer import ProbedConsumers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outboxkit.brokers import Subscriber
    from outboxkit.consumer import Consumer
    from outboxkit_relay.cli.main import Invocation
    from outboxkit_relay.settings import Settings

__all__ = ["command", "subscriber_of"]

_log: Final = logging.getLogger(__name__)


@click.command()
@click.argument("apps", metavar="MODULE:CONSUMER...", nargs=-1, required=True)
@click.pass_obj
def command(invocation: Invocation, apps: tuple[str, ...]) -> None:
    """Run the handlers of consumers until SIGTERM or SIGINT.

    MODULE:CONSUMER is an import string, for example app:billing. A consumer's own sessions say which database;
    registry_url says where schemas are found that it does not know, unless it has resolve= of its own. With
    probes.port it answers /livez, /readyz and /metrics.

    Several run side by side, each for itself; when one ends with an error, the others stop in order, and that error is
    the end of the process.
    """
    settings = invocation.settings
    _failpoints.enable(settings.failpoints)
    consumers = [import_string.load(app) for app in dict.fromkeys(apps)]
    if len({consumer.name for consumer in consumers}) < len(consumers):
        names = ", ".join(consumer.name for consumer in consumers)
        raise ConfigurationError(f"two consumers of one name would share an inbox and each message: {names}")
    asyncio.run(_consume(consumers, settings))


async def _consume(consumers: Sequence[Consumer], settings: Settings) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    if settings.registry_url is not None:
        registry = open_registry(settings.registry_url.get_secret_value())
        for consumer in consumers:
            consumer.resolve_with(registry.resolve)
    sources = [(consumer, subscriber_of(consumer, settings)) for consumer in consumers]

    def ask() -> None:
        loop.call_soon_threadsafe(stop.set)

    probed = ProbedConsumers(tuple(consumers), version("outboxkit"))
    with health.serving(settings.probes, probed), lifecycle.stop_on_signals(ask):
        running = [_run(consumer, subscriber, stop) for consumer, subscriber in sources]
        ends = await asyncio.gather(*running, return_exceptions=True)
    for error in ends:
        if error is not None:
            raise error


async def _run(consumer: Consumer, subscriber: Subscriber, stop: asyncio.Event) -> None:
    """Runs one of them; one that has ended takes the others along, so that whoever started them starts all anew."""
    try:
        if await lifecycle.await_sessions(consumer.config.sessions, stop):
            await consumer.run(subscriber, stop)
            counts = {str(name): count for name, count in consumer.counts.items()}
            _log.info("consumer.stopped", extra={"consumer": consumer.name, "counts": counts})
    finally:
        stop.set()


def subscriber_of(consumer: Consumer, settings: Settings) -> Subscriber:
    """Returns what a consumer receives from; nothing is connected yet.

    Raises:
        ConfigurationError: the broker's URL or one of its options is wrong, or an extra is missing.
    """
    url, credentials = settings.broker_address(), settings.credentials_of("")
    return consumer.open_subscriber(url, settings.broker, credentials=credentials)
