"""A relay inside an application.

    async with Relay(load()) as relay:
        commit_hooks.on_commit(engine, relay.wake)
        ...

It is the same relay as ``outboxkit relay run``, in threads of this process: it shares the work with all others, and
when the process dies, they take over. Its work costs processor time that the application would have had.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from outboxkit_relay.daemon.build import BuiltRelay, build_relay

if TYPE_CHECKING:
    from outboxkit_relay.observe.stats import RelayStats
    from outboxkit_relay.settings import Settings

__all__ = ["Relay"]

_log: Final = logging.getLogger(__name__)


class Relay:
    """A relay in a thread of this process, for as long as the block runs; the block may be ``with`` or ``async with``.

    Entering starts it and does not wait for database or broker: the relay does. Leaving stops it as SIGTERM would: it
    finishes what is in flight, up to ``relay.drain``.

    Args:
        settings: as `outboxkit_relay.load` makes them.

    Raises:
        ConfigurationError: on entering, a URL or setting is wrong; on leaving, what it found out later: a refused
            login, missing tables.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = threading.Event()
        self._built: BuiltRelay | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def stats(self) -> RelayStats | None:
        """The latest statistics of the relay; None before it has begun."""
        return None if self._built is None else self._built.daemon.stats

    def wake(self) -> None:
        """Lets it look at once: messages were committed. From any thread; returns at once."""
        if self._built is not None:
            self._built.daemon.wake()

    def __enter__(self) -> Self:
        self._built = build_relay(self._settings)
        self._thread = threading.Thread(target=self._run, args=(self._built,), name="outboxkit-relay", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._built is not None:
            self._built.close()
        if self._failure is not None and error is None:
            raise self._failure

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, trace)

    def _run(self, built: BuiltRelay) -> None:
        try:
            built.run(self._stop)
        except BaseException as error:  # noqa: BLE001  raised when the block ends
            self._failure = error
            _log.error("relay.failed", extra={"error": type(error).__name__, "reason": str(error)})
