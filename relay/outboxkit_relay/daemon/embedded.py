"""A relay put together from settings: for the command line, and inside an application.

    async with Relay(settings.load()) as relay:
        hints.on_commit(engine, relay.wake)
        ...

It is the same relay as ``outboxkit relay run``, in threads of this process: it shares the work with all others, and
when the process dies, they take over. Its work costs processor time that the application would have had.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from sqlalchemy import select, union

from outboxkit import dialects, tables
from outboxkit.brokers import open_publisher
from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit.policy import Backoff, RetryPolicy
from outboxkit_relay.core.destinations import Limits
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon import lifecycle, relay
from outboxkit_relay.daemon.listener import Listener
from outboxkit_relay.observe import health
from outboxkit_relay.settings import DestinationSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from sqlalchemy import Engine

    from outboxkit.brokers import Publisher
    from outboxkit_relay.observe.stats import RelayStats
    from outboxkit_relay.settings import RelaySettings, Settings

__all__ = ["Relay", "opened", "rules_of"]

_log: Final = logging.getLogger(__name__)


class Relay:
    """A relay in a thread of this process, for as long as the block runs; the block may be ``with`` or ``async with``.

    Entering starts it and does not wait for database or broker: the relay does. Leaving stops it as SIGTERM would: it
    finishes what is in flight, up to ``relay.drain``.

    Args:
        settings: as `outboxkit_relay.settings.load` makes them.

    Raises:
        ConfigurationError: on entering, a URL or setting is wrong; on leaving, what it found out later: a refused
            login, missing tables.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._resources = ExitStack()
        self._relay: relay.Relay | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def snapshot(self) -> RelayStats | None:
        """What it has told of itself last; None before it has begun."""
        return None if self._relay is None else self._relay.snapshot

    def wake(self) -> None:
        """Lets it look at once: somebody has committed messages. From any thread; returns at once."""
        if self._relay is not None:
            self._relay.wake()

    def __enter__(self) -> Self:
        self._relay, run = self._resources.enter_context(opened(self._settings))
        self._thread = threading.Thread(target=self._run, args=(run,), name="outboxkit-relay", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._resources.close()
        if self._failure is not None and error is None:
            raise self._failure

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _run(self, run: Callable[[threading.Event], None]) -> None:
        try:
            run(self._stop)
        except BaseException as error:  # noqa: BLE001  raised when the block ends
            self._failure = error
            _log.error("relay.failed", extra={"error": type(error).__name__, "reason": str(error)})


@contextmanager
def opened(
    settings: Settings, *, once: bool = False
) -> Iterator[tuple[relay.Relay, Callable[[threading.Event], None]]]:
    """A relay, and the function that runs it until an event is set; its connections end with the block.

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
        rules = rules_of(settings.relay, publisher, destinations=settings.destinations, once=once)
        found = relay.Relay(
            engine, publisher, rules, direct=direct, drain=settings.relay.drain, version=version("outboxkit")
        )
        listener = Listener(direct, found.wake) if settings.relay.wake == "notify" else None

        def run(stop: threading.Event) -> None:
            with health.serving(settings.probes, _subject(found, engine, publisher, settings)):
                # A pooler refuses clients while its database is away: that is no refused login while the direct way is
                # shut.
                if not (lifecycle.await_database(direct, stop) and lifecycle.await_database(engine, stop)):
                    return
                if not lifecycle.await_broker(publisher, _destinations(engine), stop):
                    return
                with ExitStack() as hints:
                    if listener is not None:
                        hints.enter_context(listener)
                    found.run(stop)

        yield found, run


def rules_of(
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


def _limits(own: DestinationSettings, settings: RelaySettings, room: int) -> Limits:
    circuit = own.circuit or settings.circuit
    return Limits(
        in_flight=min(own.in_flight or room, room),
        rate=own.rate,
        circuit=CircuitRule(failure_rate=circuit.failure_rate, window=circuit.window, open_for=circuit.open_for),
    )


def _subject(found: relay.Relay, engine: Engine, publisher: Publisher, settings: Settings) -> health.Subject:
    return health.Subject(
        look=lambda: found.snapshot,
        engine=engine,
        lease=settings.relay.lease,
        transport=publisher.features.name,
        version=version("outboxkit"),
    )


def _destinations(engine: Engine) -> Collection[str]:
    """Where messages go now: what a start can check."""
    hot, waiting = tables.outbox_messages.c.topic, tables.outbox_waiting.c.topic
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        return connection.execute(union(select(hot), select(waiting))).scalars().all()
