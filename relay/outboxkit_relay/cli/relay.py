"""``outboxkit relay run``: the daemon."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING

import click
from sqlalchemy import select, union

from outboxkit import failpoints, tables
from outboxkit.brokers import open_publisher
from outboxkit.policy import Backoff, RetryPolicy
from outboxkit_relay import lifecycle, probes
from outboxkit_relay.breaker import CircuitRule
from outboxkit_relay.cli import database, pauses
from outboxkit_relay.destinations import Limits
from outboxkit_relay.relay import Relay
from outboxkit_relay.settings import DestinationSettings
from outboxkit_relay.state import Rules
from outboxkit_relay.wakeup import Listener

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sqlalchemy import Engine

    from outboxkit.brokers import Publisher
    from outboxkit_relay.cli.program import Invocation
    from outboxkit_relay.settings import RelaySettings, Settings

__all__ = ["command", "rules_of"]


@click.group()
def command() -> None:
    """Publish what is in the outbox."""


for _one in (pauses.pause, pauses.resume, pauses.listing):
    command.add_command(_one)


@command.command("run")
@click.option("--once", is_flag=True, help="Publish what is there and leave.")
@click.pass_obj
def run(invocation: Invocation, *, once: bool) -> None:
    """Publish until SIGTERM or SIGINT.

    Several relays share the work. Killed at any moment, nothing is lost: what was in flight is published again.
    """
    settings = invocation.settings
    failpoints.enable(settings.failpoints)
    lifecycle.collect_rarely()
    url, patience = settings.broker_address(), settings.relay.lease / 3
    stop = threading.Event()
    with (
        lifecycle.stop_on_signals(stop.set),
        database.opened(invocation, patience=patience) as engine,
        database.opened_directly(invocation, patience=patience) as direct,
    ):
        publisher = open_publisher(url, settings.broker)
        try:
            _run(engine, publisher, settings, stop, direct=direct, once=once)
        finally:
            publisher.close()


def rules_of(
    settings: RelaySettings,
    publisher: Publisher,
    *,
    destinations: Mapping[str, DestinationSettings] | None = None,
    once: bool = False,
) -> Rules:
    """What the core goes by, from the settings and from what the broker can do.

    Args:
        settings: of the relay.
        publisher: with nothing in flight yet.
        destinations: settings of single ones.
        once: leave when nothing is left.
    """
    room = publisher.capacity("")  # of any destination
    everywhere = DestinationSettings()
    delayed = Backoff(base=settings.retry_base, cap=settings.retry_cap, attempts=settings.retry_attempts)
    return Rules(
        batch_size=settings.batch_size,
        window=settings.window,
        order=settings.order or publisher.features.order,
        retry=RetryPolicy(delayed=delayed, followers=settings.on_dead),
        slow=settings.poll_slowest,
        patience=settings.patience,
        lease=settings.lease,
        once=once,
        limits=_limits(everywhere, settings, room),
        destinations={name: _limits(own, settings, room) for name, own in (destinations or {}).items()},
    )


def _limits(own: DestinationSettings, settings: RelaySettings, room: int) -> Limits:
    circuit = own.circuit or settings.circuit
    return Limits(
        in_flight=min(own.in_flight or room, room),
        rate=own.rate,
        circuit=CircuitRule(failure_rate=circuit.failure_rate, window=circuit.window, open_for=circuit.open_for),
    )


def _run(
    engine: Engine, publisher: Publisher, settings: Settings, stop: threading.Event, *, direct: Engine, once: bool
) -> None:
    rules = rules_of(settings.relay, publisher, destinations=settings.destinations, once=once)
    release = version("outboxkit")
    relay = Relay(engine, publisher, rules, direct=direct, drain=settings.relay.drain, version=release)
    subject = probes.Subject(
        look=lambda: relay.snapshot,
        engine=engine,
        lease=settings.relay.lease,
        transport=publisher.features.name,
        version=release,
    )
    with probes.serving(settings.probes, subject):
        # A pooler refuses clients while its database is away: that is no refused login while the direct way is shut.
        if not (lifecycle.await_database(direct, stop) and lifecycle.await_database(engine, stop)):
            return
        if not lifecycle.await_broker(publisher, _destinations(engine), stop):
            return
        hints = Listener(direct, relay.wake) if settings.relay.wake == "notify" else nullcontext()
        with hints:
            relay.run(stop)


def _destinations(engine: Engine) -> Collection[str]:
    """Where messages go now: what a start can check."""
    hot, waiting = tables.outbox_messages.c.topic, tables.outbox_waiting.c.topic
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return connection.execute(union(select(hot), select(waiting))).scalars().all()
