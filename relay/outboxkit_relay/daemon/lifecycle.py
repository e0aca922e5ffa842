"""The life of a daemon: patient at the start, quick to stop, and honest in its exit code.

What an operator must change (a URL, a login, an extra, a table) ends the start at once with one line. What only needs
time (a database or broker that is away) is waited for, with full jitter and one line per change of state.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import async_sessionmaker

from outboxkit import dialects, migrations, tables
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure, OutageLog, full_jitter
from outboxkit_relay import redaction

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from types import FrameType

    from sqlalchemy import URL, Connection, Engine
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session, sessionmaker

    from outboxkit.brokers import Refusal
    from outboxkit_relay.daemon.publishers import Publishers

    Sessions = sessionmaker[Session] | async_sessionmaker[AsyncSession]

__all__ = [
    "await_brokers",
    "await_database",
    "await_sessions",
    "require_tables",
    "stop_on_signals",
    "tune_interpreter",
]

_log: Final = logging.getLogger(__name__)

_DELAYS: Final = full_jitter("500ms", cap="15s", attempts=1)
_AWAY: Final = {"database": "database.away", "broker": "broker.away"}
_BACK: Final = {"database": "database.back", "broker": "broker.back"}
_CHECK_TIMEOUT: Final = timedelta(seconds=5)
# A login that is refused while the server comes up or is full deserves a second look; a wrong one fails it too.
_REFUSALS_TO_BELIEVE: Final = 2
_ALLOCATIONS_PER_COLLECTION: Final = 100_000  # 700 by default, about 30 messages
_TURN: Final = 0.0005  # seconds
_NO_DESTINATION: Final = ("outboxkit",)  # asked for when nothing is to be published: any answer means that it is there


def tune_interpreter() -> None:
    """For a process that is a relay and nothing else: garbage is looked for rarely, and threads take turns quickly.

    What passes through a relay is freed by its reference counts; looking at all of it again and again took a quarter of
    the CPU of a message. And a thread that comes back from the network waits for its turn: turns of half a millisecond
    instead of five made a relay faster by an eighth (``benchmarks/relay.py``).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS_PER_COLLECTION, 10, 10)
    sys.setswitchinterval(_TURN)


@contextlib.contextmanager
def stop_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Calls `stop` at the first SIGTERM or SIGINT; a second one ends the process at once with 128 + its number."""
    asked = False

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True
        # In a thread: the signal may have come while this one holds the lock that `stop` needs, or a log line's.
        threading.Thread(target=stop, name="outboxkit-stop", daemon=True).start()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def await_database(engine: Engine, stop: threading.Event) -> bool:
    """Returns True when the database is there with the right tables, False when `stop` was set first.

    Raises:
        ConfigurationError: the login is refused, or the tables are missing or of another version.
    """
    patience = _Waiting("database")
    while not stop.is_set():
        try:
            with engine.connect() as connection:
                require_tables(connection)
        except DBAPIError as error:
            stop.wait(patience.with_database(engine.url, error))
        else:
            patience.over()
            return True
    return False


async def await_sessions(sessions: Sessions, stop: asyncio.Event) -> bool:
    """`await_database` for the sessions of an application, plain or asynchronous."""
    patience = _Waiting("database")
    while not stop.is_set():
        try:
            await _look_through(sessions)
        except (DBAPIError, OSError) as error:  # asyncpg's own network errors are not wrapped
            url = sessions.kw["bind"].url
            delay = patience.with_database(url, error) if isinstance(error, DBAPIError) else patience.fail(error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), delay)
        else:
            patience.over()
            return True
    return False


async def _look_through(sessions: Sessions) -> None:
    if isinstance(sessions, async_sessionmaker):
        async with sessions() as session:
            await (await session.connection()).run_sync(require_tables)
    else:
        await asyncio.to_thread(_look, sessions)


def _look(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        require_tables(session.connection())


def require_tables(connection: Connection) -> None:
    """Refuses a database whose tables are missing or belong to another version of outboxkit.

    Raises:
        ConfigurationError: says which, and what to run.
    """
    found = migrations.current(connection)
    if found == 0:
        raise ConfigurationError(_missing(connection))
    if found != tables.VERSION:
        raise ConfigurationError(
            f"the outbox tables have version {found}, this outboxkit needs {tables.VERSION}: "
            + ("run `outboxkit init` (or your migration)" if found < tables.VERSION else "update outboxkit"),
        )


def _missing(connection: Connection) -> str:
    """Says in which schema the tables were looked for, and in which they are instead."""
    schema, others = dialects.schema_of(connection), dialects.schemas(connection)
    if not schema:
        return tables.MISSING
    elsewhere = f"; they are in {' and '.join(others)}: set database_schema" if others else ""
    return tables.MISSING.replace("this database", f"the schema {schema} of this database") + elsewhere


def await_brokers(
    publishers: Publishers, destinations: Collection[str], stop: threading.Event, *, tell: Callable[[str], None]
) -> bool:
    """Returns True when a broker answers, False when `stop` was set first. Reports destinations in trouble.

    One broker that is away keeps nothing back from the others: its destinations wait, and say why.

    Args:
        publishers: to all of them.
        destinations: where messages go now.
        stop: ends the waiting.
        tell: gets a line for people on other machines as long as none answers.

    Raises:
        ConfigurationError: a login is refused.
    """
    waiting = {publisher.broker: _Waiting("broker", broker=publisher.broker) for publisher in publishers}
    while not stop.is_set():
        delays = []
        for publisher in publishers:
            mine = [name for name in destinations if publishers.broker_of(name) == publisher.broker]
            troubles = publisher.inner.check(mine or _NO_DESTINATION, _CHECK_TIMEOUT)
            away = [trouble for trouble in troubles.values() if trouble.failure is Failure.BROKER_DOWN]
            if away:
                delays.append(waiting[publisher.broker].fail(away[0].text))
            else:
                waiting[publisher.broker].over()
                _report(troubles if mine else {})
        if len(delays) < len(waiting):
            return True
        tell(f"it waits for its broker: {away[0].text}")
        stop.wait(min(delays))
    return False


def _report(troubles: Mapping[str, Refusal]) -> None:
    for name, trouble in troubles.items():
        fields = {"topic": name, "failure": trouble.failure.value, "reason": trouble.text}
        _log.warning("destination.missing", extra=fields)


class _Waiting:
    """With something that is away: says so once, and once when it is back; tells how long to wait."""

    def __init__(self, what: str, **fields: str) -> None:
        self._what, self._fields = what, fields
        self._outage, self._refusals = OutageLog(_DELAYS), 0
        self._rng = random.Random()  # noqa: S311  jitter, not cryptography

    def with_database(self, url: URL, error: DBAPIError) -> float:
        """Seconds to wait before the next try.

        Raises:
            ConfigurationError: the login is refused: waiting cannot help.
        """
        refusal = dialects.refusal(url, error)
        self._refusals = self._refusals + 1 if refusal else 0
        if self._refusals >= _REFUSALS_TO_BELIEVE:
            raise ConfigurationError(refusal) from None
        return 0.0 if refusal else self.fail(error.orig or error)

    def fail(self, why: BaseException | str) -> float:
        """Seconds to wait before the next try."""
        delay = self._outage.failed(self._rng)
        if self._outage.has_just_begun:
            _log.warning(
                _AWAY[self._what],
                extra={**self._fields, "error": why if isinstance(why, str) else redaction.cause(why)},
            )
        return delay.total_seconds()

    def over(self) -> None:
        """It is there."""
        if failures := self._outage.over():
            _log.info(_BACK[self._what], extra={**self._fields, "failures": failures})
