"""A relay put together from settings: engines, publisher, configuration, probes.

`build_relay` opens nothing but what it needs to refuse wrong settings at once; `BuiltRelay.run` waits for database and
broker, and works until it is told to stop.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sqlalchemy import select, union

from outboxkit import dialects, tables
from outboxkit.brokers import open_publisher
from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit.policy import Backoff, RetryPolicy
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon import lifecycle
from outboxkit_relay.daemon.listener import Listener
from outboxkit_relay.daemon.relay import RelayDaemon
from outboxkit_relay.observe import health
from outboxkit_relay.observe.metrics import Subject
from outboxkit_relay.settings import DestinationSettings

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outboxkit.brokers import Publisher
    from outboxkit_relay.settings import RelaySettings, Settings

__all__ = ["BuiltRelay", "build_relay", "relay_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRelay:
    """A relay and all that belongs to it.

    Attributes:
        daemon: the relay.
        engine: of the database.
        direct: of the database past a pooler.
        publisher: to the broker.
        settings: what it was built from.
    """

    daemon: RelayDaemon
    engine: Engine
    direct: Engine
    publisher: Publisher
    settings: Settings
    _resources: ExitStack

    def run(self, stop: threading.Event) -> None:
        """Waits for database and broker, then publishes until `stop` is set, or with ``once`` until nothing is left.

        Raises:
            ConfigurationError: a login is refused, tables are missing, the probes' port is taken.
        """
        with ExitStack() as running:
            running.enter_context(health.serving(self.settings.probes, self._subject()))
            # A pooler refuses clients while its database is away: that is no refused login while the direct way is
            # shut.
            if not (lifecycle.await_database(self.direct, stop) and lifecycle.await_database(self.engine, stop)):
                return
            if not lifecycle.await_broker(self.publisher, _destinations(self.engine), stop):
                return
            if self.settings.relay.wake == "notify":
                running.enter_context(Listener(self.direct, self.daemon.wake))
            self.daemon.run(stop)

    def close(self) -> None:
        """Closes its connections. Idempotent."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def _subject(self) -> Subject:
        return Subject(
            look=lambda: self.daemon.stats,
            engine=self.engine,
            lease=self.settings.relay.lease,
            transport=self.publisher.features.name,
            version=version("outboxkit"),
        )


def build_relay(settings: Settings, *, once: bool = False) -> BuiltRelay:
    """Puts a relay together; nothing is connected yet.

    Args:
        settings: as `outboxkit_relay.settings.load` makes them.
        once: leave when nothing is left to publish.

    Raises:
        ConfigurationError: a URL or setting is wrong, or an extra is missing.
    """
    patience = settings.relay.lease / 3
    url = settings.broker_address()
    with ExitStack() as resources:
        engine = dialects.open_engine(settings.database(), patience=patience, pooled=settings.pooled)
        resources.callback(engine.dispose)
        direct = dialects.open_engine(settings.direct_database(), patience=patience)
        resources.callback(direct.dispose)
        publisher = open_publisher(url, settings.broker)
        resources.callback(publisher.close)
        config = relay_config(settings.relay, publisher, destinations=settings.destinations, once=once)
        daemon = RelayDaemon(
            engine, publisher, config, direct=direct, drain=settings.relay.drain, version=version("outboxkit")
        )
        if settings.relay.wake == "notify":
            Listener(direct, daemon.wake)  # refuses a database that cannot notify before anything starts
        return BuiltRelay(
            daemon=daemon,
            engine=engine,
            direct=direct,
            publisher=publisher,
            settings=settings,
            _resources=resources.pop_all(),
        )


def relay_config(
    settings: RelaySettings,
    publisher: Publisher,
    *,
    destinations: Mapping[str, DestinationSettings] | None = None,
    once: bool = False,
) -> RelayConfig:
    """What the core goes by, from the settings and from what the broker can do.

    Args:
        settings: of the relay.
        publisher: with nothing in flight yet.
        destinations: settings of single ones.
        once: leave when nothing is left.
    """
    room = publisher.capacity("")  # of any destination
    delayed = Backoff(base=settings.retry_base, cap=settings.retry_cap, attempts=settings.retry_attempts)
    return RelayConfig(
        batch_size=settings.batch_size,
        window=settings.window,
        order=settings.order or publisher.features.order,
        retry=RetryPolicy(delayed=delayed, followers=settings.on_dead),
        slow=settings.poll_slowest,
        patience=settings.patience,
        lease=settings.lease,
        once=once,
        limits=_limits(DestinationSettings(), settings, room),
        destinations={name: _limits(own, settings, room) for name, own in (destinations or {}).items()},
    )


def _limits(own: DestinationSettings, settings: RelaySettings, room: int) -> DestinationLimits:
    circuit = own.circuit or settings.circuit
    return DestinationLimits(
        in_flight=min(own.in_flight or room, room),
        rate=own.rate,
        circuit=CircuitRule(failure_rate=circuit.failure_rate, window=circuit.window, open_for=circuit.open_for),
    )


def _destinations(engine: Engine) -> Collection[str]:
    """Where messages go now: what a start can check."""
    hot, waiting = tables.outbox_messages.c.topic, tables.outbox_waiting.c.topic
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return connection.execute(union(select(hot), select(waiting))).scalars().all()
