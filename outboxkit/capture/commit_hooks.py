"""Hints: a relay looks at once when a transaction with messages has committed, and not at its next look.

A hint is never needed and never trusted: a relay that gets none looks a little later. So it may cost nothing that
matters: it is given after the commit, by a thread and a connection of its own, and no trouble with it reaches the
writer. `on_commit` calls a function, for a relay in the same process; `notify` wakes relays elsewhere through
PostgreSQL's NOTIFY, many commits by one.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Engine, event, func, select
from sqlalchemy.exc import DBAPIError

from outboxkit import tables
from outboxkit.dialects import dialect_of, open_engine
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncEngine

__all__ = ["CHANNEL", "notify", "on_commit"]

CHANNEL: Final = "outboxkit"  #: that relays listen on

_NOTIFY: Final = select(func.pg_notify(CHANNEL, ""))
_log: Final = logging.getLogger(__name__)

_TABLE: Final = tables.outbox_messages.name
_WROTE: Final = "outboxkit_wrote"
_COMMITTED: Final = "outboxkit_committed"
_PATIENCE: Final = timedelta(seconds=2)
_GAP: Final = 0.005  # seconds between two notifications: each one takes a lock that all databases of a cluster share
_REST: Final = 5.0  # seconds without a try after one that failed


def on_commit(engine: Engine | AsyncEngine, wake: Callable[[], None]) -> Callable[[], None]:
    """Calls a function after each commit that has added messages through this engine.

    It is called when the connection has gone back to its pool, or begins its next transaction. It must return at once
    and raise nothing: `outboxkit_relay.Relay.wake` is such a function.

    Returns:
        A function that ends it.

    Raises:
        ConfigurationError: this is no engine, or nothing to call.
    """
    if not callable(wake):
        raise ConfigurationError(f"on_commit() calls a function without arguments, and {wake!r:.80} is none")
    commits = _Commits(_blocking(engine), wake)
    commits.listen()
    return commits.ignore


def notify(engine: Engine | AsyncEngine, *, url: str | None = None) -> Callable[[], None]:
    """Wakes the relays that run with ``wake = "notify"`` after each commit that has added messages.

    Nothing is started before the first such commit; a process that forks starts its own. What fails is logged once, and
    the relays look by themselves.

    Args:
        engine: that the application writes with.
        url: for the connection of its own; default: the engine's. It needs psycopg, whatever driver the engine has.

    Returns:
        A function that ends it.

    Raises:
        ConfigurationError: this database cannot notify.
    """
    target = _blocking(engine)
    if not dialect_of(target).features.notifies:
        raise ConfigurationError(f"{target.dialect.name} cannot notify; relays in other processes look by themselves")
    sender = _Sender(url or target.url.render_as_string(hide_password=False))
    end = on_commit(engine, sender.wake)

    def close() -> None:
        end()
        sender.close()

    return close


def _blocking(engine: Engine | AsyncEngine) -> Engine:
    found: object = engine if isinstance(engine, Engine) else getattr(engine, "sync_engine", None)
    if not isinstance(found, Engine):
        raise ConfigurationError(f"expected an Engine or an AsyncEngine, got {type(engine).__qualname__}")
    return found


class _Commits:
    """Notices commits of an engine that have added messages; what it knows stands with the driver's connection."""

    def __init__(self, engine: Engine, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._listeners: Final[list[tuple[Engine, str, Callable[..., None]]]] = [
            (engine, "after_cursor_execute", self._executed),
            (engine, "commit", self._committing),
            (engine, "rollback", self._rolled_back),
            (engine, "begin", self._begun),
            (engine, "checkin", self._returned),
        ]

    def listen(self) -> None:
        for listener in self._listeners:
            event.listen(*listener)

    def ignore(self) -> None:
        for listener in self._listeners:
            event.remove(*listener)

    @staticmethod
    def _executed(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT") and _TABLE in statement:
            connection.info[_WROTE] = True

    @staticmethod
    def _committing(connection: Connection) -> None:
        if connection.info.pop(_WROTE, False):
            connection.info[_COMMITTED] = True  # in a moment

    @staticmethod
    def _rolled_back(connection: Connection) -> None:
        connection.info.pop(_WROTE, None)

    def _begun(self, connection: Connection) -> None:
        if connection.info.pop(_COMMITTED, False):
            self._wake()

    def _returned(self, _driver: Any, record: Any) -> None:
        record.info.pop(_WROTE, None)
        if record.info.pop(_COMMITTED, False):
            self._wake()


class _Sender:
    """One thread and one connection that notify; `wake` only leaves a mark."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._start_again()
        _senders.add(self)

    def wake(self) -> None:
        """Leaves a mark, so that a notification is sent at the next moment."""
        self._pending = True
        self._wanted.set()
        if self._thread is None and not self._ending:
            with self._lock:
                if self._thread is None:
                    self._start()

    def close(self) -> None:
        """Ends the thread, if there is one, after a last notification if one is due."""
        with self._lock:
            self._ending = True
            thread = self._thread
        self._pause.set()
        self._wanted.set()
        if thread is not None:
            thread.join(_PATIENCE.total_seconds() * 2)

    def _start_again(self) -> None:
        """Starts afresh, also in a child after a fork: what the parent's thread held is not ours."""
        self._lock, self._wanted, self._pause = threading.Lock(), threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._pending = self._ending = self._failed = False

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="outboxkit-hints", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter ends
            return
        self._thread = thread

    def _run(self) -> None:
        while self._pending or not self._ending:
            try:
                engine = open_engine(self._url, patience=_PATIENCE)
                try:
                    self._send(engine)
                finally:
                    engine.dispose()
            except (DBAPIError, ConfigurationError) as error:
                if not self._failed:
                    _log.warning("hints.failed", extra={"error": type(error).__name__})
                self._failed = True
                if self._pause.wait(_REST):
                    return

    def _send(self, engine: Engine) -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while self._pending or not self._ending:
                self._wanted.wait()
                self._wanted.clear()
                if self._pending:
                    self._pending = False
                    connection.execute(_NOTIFY)
                    self._failed = False
                    self._pause.wait(_GAP)


_senders: Final[weakref.WeakSet[_Sender]] = weakref.WeakSet()


def _after_fork() -> None:
    for sender in _senders:
        sender._start_again()  # noqa: SLF001  the module's own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
