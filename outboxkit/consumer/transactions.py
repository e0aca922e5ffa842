"""Transactions of a consumer: one unit of work for both kinds of session, and patience with a database in trouble.

A unit is a plain function of a `Session`. With an ``async_sessionmaker`` it runs in SQLAlchemy's greenlet and may
await; with a ``sessionmaker`` it runs in a thread. Either way begin, work and commit are the same lines. While a
handler has the session, the transaction is the consumer's: to end it is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import dialects
from outboxkit.consumer.observe.stats import Tally
from outboxkit.dialects import DatabaseTrouble
from outboxkit.errors import OutboxKitError, RegistryUnavailable
from outboxkit.rows import Dependency

__all__ = [
    "ConnectionBroken",
    "RetryOnDatabaseTrouble",
    "Sessions",
    "Stopped",
    "Threads",
    "TransactionScope",
    "Transactions",
    "backoff_delay",
    "trouble_of",
]

T = TypeVar("T")
Sessions = sessionmaker[Session] | async_sessionmaker[AsyncSession]

_log: Final = logging.getLogger(__name__)

_BASE: Final = timedelta(milliseconds=50)
_BUSY_AT_ONCE: Final = 3
_MAX_DOUBLINGS: Final = 10
_LOST: Final[dict[str, str]] = {"database": "consumer.database_away", "registry": "consumer.registry_away"}
_BACK: Final[dict[str, str]] = {"database": "consumer.database_back", "registry": "consumer.registry_back"}
_CAPS: Final = {DatabaseTrouble.BUSY: timedelta(milliseconds=250), DatabaseTrouble.DOWN: timedelta(seconds=5)}


class _Unreachable(Exception):
    """No connection could be made."""


class ConnectionBroken(Exception):
    """The connection of the attempt broke: whatever was raised says nothing about the message."""


class TransactionEnded(OutboxKitError):
    """The handler tried to begin or end the transaction."""


@dataclass(frozen=True, slots=True)
class TransactionScope:
    """The sessions of one transaction: the asynchronous one is None in a thread."""

    session: Session
    asynchronous: AsyncSession | None


class _Guarded(Session):
    """A session whose transaction belongs to the consumer while a handler has it."""

    in_handler = False

    def begin(self, nested: bool = False) -> Any:  # noqa: FBT001, FBT002  as the base class has it
        if not nested:
            self._refuse("begin()")
        return super().begin(nested=nested)

    def commit(self) -> None:
        self._refuse("commit()")
        super().commit()

    def prepare(self) -> None:
        self._refuse("prepare()")
        super().prepare()

    def close(self) -> None:
        self._refuse("close()")
        super().close()

    def reset(self) -> None:
        self._refuse("reset()")
        super().reset()

    def invalidate(self) -> None:
        self._refuse("invalidate()")
        super().invalidate()

    def _refuse(self, verb: str) -> None:
        if self.in_handler:
            raise TransactionEnded(
                f"{verb} inside a handler: the handler must not commit, begin or close, because its effect commits "
                "together with the inbox row; use session.begin_nested() for what may fail"
            )


class Transactions:
    """Runs units of work on the user's sessions."""

    def __init__(self, sessions: Sessions, threads: int) -> None:
        self._sessions = _guarded(sessions)
        self._threads = Threads(threads, "outboxkit-consumer")  # none starts for sessions that await

    @staticmethod
    def is_async(sessions: Sessions) -> bool:
        """Whether handlers may await."""
        return isinstance(sessions, async_sessionmaker)

    async def run(self, unit: Callable[[TransactionScope], T]) -> T:
        """Runs a unit in a transaction of its own and commits.

        Transaction: opens its own.
        Guarantee: when it raises, the unit had no effect, except when the commit's answer was lost. Cancelled, a unit
            that awaits has none either; one in a thread goes on to its end.
        """
        if isinstance(self._sessions, async_sessionmaker):
            async with self._sessions() as session:
                return await session.run_sync(lambda plain: _transact(TransactionScope(plain, session), unit))
        sessions = self._sessions

        def in_thread() -> T:
            with sessions() as session:
                return _transact(TransactionScope(session, None), unit)

        inherited = contextvars.copy_context()
        found: T = await self._threads.run(lambda: inherited.run(in_thread))
        return found

    def close(self) -> None:
        """Ends the threads."""
        self._threads.close()


class _Work(NamedTuple):
    outcome: asyncio.Future[Any]
    function: Callable[[], Any]


class _Done(NamedTuple):
    outcome: asyncio.Future[Any]
    value: Any
    error: BaseException | None


class Threads:
    """Runs functions for one event loop, side by side, on daemon threads. Many results wake the loop once.

    Not the standard library's executor: its threads keep the process from ending while a handler hangs, and a stop has
    its bound. What it does for each call (a second future, a lock, a byte through a socket) is a tenth to a fifth of
    the processor time of a single message (`scripts/bench consumer --only b-sync`, two pairs of runs).

    Args:
        limit: how many run at once; threads start when they are needed.
        name: of the threads.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit, self._name = limit, name
        self._waiting: Final[SimpleQueue[_Work | None]] = SimpleQueue()
        self._done: Final[deque[_Done]] = deque()
        self._started = self._busy = 0  # of the loop's thread alone
        self._is_woken = False

    def run(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """Runs a function in a thread; cancelling the future does not interrupt it."""
        loop = asyncio.get_running_loop()
        outcome = loop.create_future()
        self._busy += 1
        if self._busy > self._started < self._limit:
            self._started += 1
            name = f"{self._name}-{self._started}"
            # A daemon: a function that never ends must not keep the process from ending.
            threading.Thread(target=self._work, args=(loop,), name=name, daemon=True).start()
        self._waiting.put(_Work(outcome, function))
        return outcome

    def close(self) -> None:
        """Lets each thread end after what it does now."""
        for _ in range(self._started):
            self._waiting.put(None)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (work := self._waiting.get()) is not None:
            self._done.append(_done(work))
            del work  # a thread that waits holds nothing
            if not self._is_woken:
                self._is_woken = True
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                    loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # first: what is put from now on wakes the loop again
        while self._done:
            outcome, value, error = self._done.popleft()
            self._busy -= 1
            if outcome.done():  # cancelled
                continue
            if error is None:
                outcome.set_result(value)
            else:
                outcome.set_exception(error)


def _done(work: _Work) -> _Done:
    try:
        return _Done(work.outcome, work.function(), None)
    except (StopIteration, asyncio.CancelledError) as error:  # a future takes neither as what it is: an error
        told = RuntimeError(f"{type(error).__name__} was raised, which means something else to an event loop")
        told.__cause__ = error
        return _Done(work.outcome, None, told)
    except BaseException as error:  # noqa: BLE001  it belongs to the caller, who waits in the event loop
        return _Done(work.outcome, None, error)


class Stopped(Exception):
    """Asked to stop while the database or the registry was away."""


class RetryOnDatabaseTrouble:
    """Runs units until the trouble is not the database's, nor that of a schema registry.

    Args:
        transactions: what runs them.
        consumer: whose name the log lines carry.
        stop: set when nobody wants to wait any longer.
        tally: is told what is away.
    """

    def __init__(self, transactions: Transactions, consumer: str, stop: asyncio.Event, tally: Tally) -> None:
        self._transactions, self._consumer, self._stop, self._tally = transactions, consumer, stop, tally
        self._rng = random.Random()  # noqa: S311  jitter needs no secrecy
        self.away = ""  #: which of the two is away, as everybody was told

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
            except Exception as error:
                trouble, troubles = trouble_of(error), troubles + 1
                if trouble is None or gives_up(trouble, troubles):
                    raise
                await self._ride_out(trouble, troubles, error)
            else:
                if troubles and self.away:  # who had no trouble knows nothing of its end
                    _log.info(_BACK[self.away], extra={"consumer": self._consumer})
                    self._tally.found(Dependency(self.away))
                    self.away = ""
                return result

    async def wait(self, delay: timedelta) -> None:
        """Waits, but not longer than until the stop."""
        try:
            await asyncio.wait_for(self._stop.wait(), delay.total_seconds())
        except TimeoutError:
            return

    async def _ride_out(self, trouble: DatabaseTrouble, troubles: int, error: Exception) -> None:
        if trouble is DatabaseTrouble.DOWN and not self.away:
            self.away, words = "database", type(error).__name__
            if isinstance(error, RegistryUnavailable):
                self.away, words = "registry", error.message
            about = {"consumer": self._consumer, "error": words, "sqlstate": dialects.sqlstate_of(error)}
            _log.warning(_LOST[self.away], extra=about)
            self._tally.lost(Dependency(self.away), words)
        if trouble is DatabaseTrouble.DOWN or troubles > _BUSY_AT_ONCE:
            await self.wait(backoff_delay(trouble, troubles, self._rng))
        if trouble is DatabaseTrouble.DOWN and self._stop.is_set():
            raise Stopped


def trouble_of(error: BaseException) -> DatabaseTrouble | None:
    """Returns what an error says about the database or the registry; None when it is about the work itself."""
    if isinstance(error, RegistryUnavailable | _Unreachable | ConnectionBroken):
        return DatabaseTrouble.DOWN
    return dialects.trouble_of(error)


def backoff_delay(trouble: DatabaseTrouble, attempt: int, rng: random.Random) -> timedelta:
    """Returns how long to wait after the n-th trouble in a row: full jitter, up to a cap that fits the trouble."""
    ceiling: timedelta = min(_CAPS[trouble], _BASE * 2 ** min(attempt - 1, _MAX_DOUBLINGS))
    return ceiling * rng.random()


def _transact(given: TransactionScope, unit: Callable[[TransactionScope], T]) -> T:
    with given.session.begin():
        try:
            given.session.connection()
        except OSError as error:  # asyncpg's own, which SQLAlchemy passes on as it is
            raise _Unreachable from error
        return unit(given)


def _guarded(sessions: Sessions) -> Sessions:
    """The user's sessions, guarded, and closed for good after their one transaction."""
    options = {**sessions.kw, "close_resets_only": False}
    if isinstance(sessions, async_sessionmaker):
        base = options.pop("sync_session_class", None) or sessions.class_.sync_session_class
        return async_sessionmaker(class_=sessions.class_, sync_session_class=_subclass(base), **options)
    return sessionmaker(class_=_subclass(sessions.class_), **options)


def _subclass(base: type[Session]) -> type[Session]:
    return type(base.__name__, (_Guarded, base), {}) if base is not Session else _Guarded
