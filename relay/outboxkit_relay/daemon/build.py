"""A relay put together from settings: engines, publisher, configuration, probes.

`build_relay` opens nothing but what it needs to refuse wrong settings at once; `BuiltRelay.run` waits for database and
broker, and works until it is told to stop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self
from uuid import UUID

from sqlalchemy import event, make_url, select, union
from sqlalchemy.exc import DBAPIError

from outboxkit import dialects, tables
from outboxkit._legible import Lost, legible
from outboxkit.brokers import open_publisher
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit.policy import Backoff, RetryPolicy
from outboxkit_relay import redaction
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon import lifecycle
from outboxkit_relay.daemon.janitor import Janitor
from outboxkit_relay.daemon.listener import Listener
from outboxkit_relay.daemon.publishers import Publishers, SupervisedPublisher
from outboxkit_relay.daemon.relay import RelayDaemon
from outboxkit_relay.observe import health
from outboxkit_relay.observe.metrics import Subject
from outboxkit_relay.sections import DestinationSettings
from outboxkit_relay.store import reports

if TYPE_CHECKING:
    from sqlalchemy import Dialect, Engine

    from outboxkit.brokers import Publisher
    from outboxkit_relay.settings import RelaySettings, Settings

__all__ = ["BuiltRelay", "build_relay", "relay_config", "routing_of"]

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltRelay:
    """A relay and all that belongs to it.

    Attributes:
        daemon: the relay.
        engine: of the database.
        direct: of the database past a pooler.
        publishers: to the brokers, the default one first.
        config: of its core.
        settings: what it was built from.
    """

    daemon: RelayDaemon
    engine: Engine
    direct: Engine
    publishers: Publishers
    config: RelayConfig
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
            _log.info("settings.read", extra={"file": str(self.settings.read_from or "none")})
            try:
                if not lifecycle.await_brokers(self.publishers, self._destinations(), stop, tell=self._leave_word):
                    return
                if self.settings.relay.wake == "notify":
                    running.enter_context(Listener(self.direct, self.daemon.wake))
                running.enter_context(Janitor(self.engine, self.settings.retention, self._token))
                self.daemon.run(stop)
            except OutboxKitError as error:
                self._leave_word(error.message)
                raise

    def _destinations(self) -> Collection[str]:
        """Destinations that have messages now and are allowed: what a start can check."""
        hot, waiting = tables.outbox_messages.c.topic, tables.outbox_waiting.c.topic
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            every = union(select(hot), select(waiting)).subquery().c.topic
            found = connection.execute(select(legible(every))).scalars().all()
        return [topic for topic in found if not isinstance(topic, Lost) and self.config.allows(topic)]

    def _token(self) -> UUID | None:
        return self.daemon.stats.relay if self.daemon.stats else None

    def _leave_word(self, words: str) -> None:
        """Lets ``outboxkit status`` say on any machine why this relay does not publish."""
        with suppress(DBAPIError), self.engine.begin() as connection:
            reports.leave_word(connection, redaction.redacted(words), version=version("outboxkit"))

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
            transport=self.publishers.transport_of,
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
    names, kept = settings.broker_names(), settings.retention
    if kept.inbox < kept.replay_horizon:
        raise ConfigurationError(
            f"retention.inbox is {kept.inbox}: below the {kept.replay_horizon.days} days (retention.replay_horizon) "
            "within which the broker may deliver a message again, and what an inbox has forgotten takes effect twice"
        )
    with ExitStack() as resources:
        schema = settings.database_schema
        engine = dialects.open_engine(
            settings.database(), patience=patience, pooled=settings.pooled, schema=schema, creates=False
        )
        resources.callback(engine.dispose)
        follow_rotation(engine, settings.database)
        direct = dialects.open_engine(settings.direct_database(), patience=patience, schema=schema, creates=False)
        resources.callback(direct.dispose)
        follow_rotation(direct, settings.direct_database)
        publishers = Publishers({name: _publisher(settings, name) for name in names})
        resources.callback(publishers.close)
        config = relay_config(settings.relay, publishers, destinations=settings.destinations, once=once)
        publishers.broker_of = lambda destination: config.limits_of(destination).broker
        daemon = RelayDaemon(
            engine,
            publishers,
            config,
            direct=direct,
            drain=settings.relay.drain,
            version=version("outboxkit"),
            routing=routing_of(settings, publishers),
        )
        if settings.relay.wake == "notify":
            Listener(direct, daemon.wake)  # refuses a database that cannot notify before anything starts
        return BuiltRelay(
            daemon=daemon,
            engine=engine,
            direct=direct,
            publishers=publishers,
            config=config,
            settings=settings,
            _resources=resources.pop_all(),
        )


def follow_rotation(engine: Engine, address: Callable[[], str]) -> None:
    """Lets each new connection log in with the user and password that the settings say by then."""

    def log_in(dialect: Dialect, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        if dialect.name == "postgresql":
            now = make_url(address())
            login = {"user": now.username, "password": now.password}
            parameters |= {name: value for name, value in login.items() if value is not None}
            for name in [name for name, value in login.items() if value is None]:
                parameters.pop(name, None)

    event.listen(engine, "do_connect", log_in)


def routing_of(settings: Settings, publishers: Publishers) -> str:
    """Routing of this relay, in words that two relays can compare."""
    kinds = {one.broker: f"{one.broker or 'the default broker'} ({one.inner.features.name})" for one in publishers}
    own = {name: one.broker for name, one in settings.destinations.items() if one.broker}
    routed = [f"{name} to {kinds[broker]}" for name, broker in sorted(own.items())]
    everywhere = ", ".join([*routed, f"everything {'else ' if routed else ''}to {kinds[publishers.default.broker]}"])
    allowed = sorted(settings.relay.allowed_destinations)
    return f"{everywhere}, and only {', '.join(allowed)}" if allowed else everywhere


def _publisher(settings: Settings, broker: str) -> SupervisedPublisher:
    def open_() -> Publisher:
        credentials = settings.credentials_of(broker)
        return open_publisher(settings.address_of(broker), settings.options_of(broker), credentials=credentials)

    return SupervisedPublisher(broker, open_, partial(settings.address_of, broker))


def relay_config(
    settings: RelaySettings,
    publishers: Publishers,
    *,
    destinations: Mapping[str, DestinationSettings] | None = None,
    once: bool = False,
) -> RelayConfig:
    """The core's configuration, from the settings and from what the brokers can do.

    Args:
        settings: of the relay.
        publishers: with nothing in flight yet, the default one first.
        destinations: settings of single ones.
        once: leave when nothing is left.
    """
    delayed = Backoff(base=settings.retry_base, cap=settings.retry_cap, attempts=settings.retry_attempts)
    return RelayConfig(
        batch_size=settings.batch_size,
        window=settings.window,
        order=settings.order or publishers.default.inner.features.order,
        retry=RetryPolicy(delayed=delayed, followers=settings.on_dead),
        slow=settings.poll_slowest,
        patience=settings.patience,
        lease=settings.lease,
        once=once,
        limits=_limits(DestinationSettings(), settings, publishers),
        destinations={name: _limits(own, settings, publishers) for name, own in (destinations or {}).items()},
        allowed=settings.allowed_destinations,
    )


def _limits(own: DestinationSettings, settings: RelaySettings, publishers: Publishers) -> DestinationLimits:
    circuit = own.circuit or settings.circuit
    publisher = publishers[own.broker] if own.broker else publishers.default
    room = publisher.inner.capacity("")  # of any destination
    return DestinationLimits(
        in_flight=min(own.in_flight or room, room),
        rate=own.rate,
        circuit=CircuitRule(failure_rate=circuit.failure_rate, window=circuit.window, open_for=circuit.open_for),
        order=settings.order or publisher.inner.features.order,
        broker=publisher.broker,
    )
