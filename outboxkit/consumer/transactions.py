"""One unit of work for both kinds of session, what trouble with the database is, and patience with it.

A unit is a plain function of a `Session`. With an ``async_sessionmaker`` it runs in SQLAlchemy's greenlet and may
await; with a ``sessionmaker`` it runs in a thread. Either way begin, work and commit are the same lines.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from outboxkit import dialects
from outboxkit.dialects import DatabaseTrouble
from outboxkit.errors import RegistryUnavailable

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, sessionmaker

__all__ = [
    "RetryOnDatabaseTrouble",
    "Stopped",
    "TransactionScope",
    "Transactions",
    "backoff_delay",
    "trouble_of",
]

T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

_BASE: Final = timedelta(milliseconds=50)
_BUSY_AT_ONCE: Final = 3
_MAX_DOUBLINGS: Final = 10

_LOST: Final[dict[str, str]] = {"database": "consumer.database_away", "registry": "consumer.registry_away"}
_BACK: Final[dict[str, str]] = {"database": "consumer.database_back", "registry": "consumer.registry_back"}
_CAPS: Final = {DatabaseTrouble.BUSY: timedelta(milliseconds=250), DatabaseTrouble.DOWN: timedelta(seconds=5)}


class _Unreachable(Exception):
    """No connection could be made."""


@dataclass(frozen=True, slots=True)
class TransactionScope:
    """The sessions of one transaction: the asynchronous one is None in a thread."""

    session: Session
    asynchronous: AsyncSession | None


class Transactions:
    """Runs units of work on the user's sessions."""

    def __init__(self, sessions: sessionmaker[Session] | async_sessionmaker[AsyncSession], threads: int) -> None:
        self._sessions = sessions
        self._threads = None if self.is_async(sessions) else ThreadPoolExecutor(threads, "outboxkit-consumer")

    @staticmethod
    def is_async(sessions: sessionmaker[Session] | async_sessionmaker[AsyncSession]) -> bool:
        """Whether handlers may await."""
        return isinstance(sessions, async_sessionmaker)

    async def run(self, unit: Callable[[TransactionScope], T]) -> T:
        """Runs a unit in a transaction of its own and commits.

        Transaction: opens its own.
        Guarantee: when it raises or is cancelled, the unit had no effect, except when the commit's answer was lost.
        """
        if isinstance(self._sessions, async_sessionmaker):
            async with self._sessions() as session:
                return await session.run_sync(lambda plain: _transact(TransactionScope(plain, session), unit))
        sessions = self._sessions

        def in_thread() -> T:
            with sessions() as session:
                return _transact(TransactionScope(session, None), unit)

        inherited = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._threads, inherited.run, in_thread)

    def close(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False)


class Stopped(Exception):
    """Asked to stop while the database or the registry was away."""


class RetryOnDatabaseTrouble:
    """Runs units until the trouble is not the database's, nor that of a schema registry.

    Args:
        transactions: what runs them.
        consumer: whose name the log lines carry.
        stop: set when nobody wants to wait any longer.
    """

    def __init__(self, transactions: Transactions, consumer: str, stop: asyncio.Event) -> None:
        self._transactions, self._consumer, self._stop = transactions, consumer, stop
        self._rng = random.Random()  # noqa: S311  jitter needs no secrecy
        self._away = ""  # which of the two everybody was told of

    async def run(
        self,
        unit: Callable[[TransactionScope], T],
        gives_up: Callable[[DatabaseTrouble, int], bool] = lambda _trouble, _number: False,
    ) -> T:
        """Runs a unit; waits and runs it again while the trouble is the database's.

        Transaction: opens its own for each try.
        Guarantee: as `Transactions.run`; a unit that is run again must know its own traces.

        Args:
            unit: the work.
            gives_up: whether the n-th trouble in a row is the unit's own after all.

        Raises:
            Stopped: the database is away, and nobody wants to wait.
        """
        troubles = 0
        while True:
            try:
                result = await self._transactions.run(unit)
            except (DBAPIError, PoolTimeout, RegistryUnavailable, _Unreachable) as error:
                trouble, troubles = trouble_of(error), troubles + 1
                if trouble is None or gives_up(trouble, troubles):
                    raise
                await self._ride_out(trouble, troubles, error)
            else:
                if troubles and self._away:  # who had no trouble knows nothing of its end
                    _log.info(_BACK[self._away], extra={"consumer": self._consumer})
                    self._away = ""
                return result

    async def wait(self, delay: timedelta) -> None:
        """Waits, but not longer than until the stop."""
        try:
            await asyncio.wait_for(self._stop.wait(), delay.total_seconds())
        except TimeoutError:
            return

    async def _ride_out(self, trouble: DatabaseTrouble, troubles: int, error: Exception) -> None:
        if trouble is DatabaseTrouble.DOWN and not self._away:
            self._away, words = "database", type(error).__name__
            if isinstance(error, RegistryUnavailable):
                self._away, words = "registry", error.message
            _log.warning(_LOST[self._away], extra={"consumer": self._consumer, "error": words})
        if trouble is DatabaseTrouble.DOWN or troubles > _BUSY_AT_ONCE:
            await self.wait(backoff_delay(trouble, troubles, self._rng))
        if trouble is DatabaseTrouble.DOWN and self._stop.is_set():
            raise Stopped


def trouble_of(error: BaseException) -> DatabaseTrouble | None:
    """Tells what an error says about the database or a registry; None when it is about the work itself."""
    if isinstance(error, RegistryUnavailable | _Unreachable):
        return DatabaseTrouble.DOWN
    return dialects.trouble_of(error)


def backoff_delay(trouble: DatabaseTrouble, attempt: int, rng: random.Random) -> timedelta:
    """How long to wait after the n-th trouble in a row: full jitter, up to a cap that fits the trouble."""
    ceiling: timedelta = min(_CAPS[trouble], _BASE * 2 ** min(attempt - 1, _MAX_DOUBLINGS))
    return ceiling * rng.random()


def _transact(given: TransactionScope, unit: Callable[[TransactionScope], T]) -> T:
    with given.session.begin():
        try:
            given.session.connection()
        except OSError as error:  # asyncpg's own, which SQLAlchemy passes on as it is
            raise _Unreachable from error
        return unit(given)
