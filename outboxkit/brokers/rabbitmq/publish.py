"""The way out to RabbitMQ. A thread with an event loop of its own; one channel and one task per destination.

Invariants: every message is mandatory, persistent and confirmed; a returned message is found by its position, never by
its id; a channel that closes makes everything on it indeterminate; a batch never overtakes one that was refused.
After `Failure.INDETERMINATE` the caller calls `reset` before it sends again: what was written cannot be recalled.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from outboxkit.brokers import Refusal
from outboxkit.brokers._in_flight import InFlight, OwnThread, Pending
from outboxkit.brokers.rabbitmq.connection import ChannelError, close, connect, is_blocked, is_open, until_ready
from outboxkit.brokers.rabbitmq.destination import DestinationTask, trouble_with
from outboxkit.brokers.rabbitmq.settings import FEATURES
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Mapping
    from concurrent.futures import Future
    from datetime import timedelta
    from typing import Any

    from outboxkit.brokers import Batch, Receipts
    from outboxkit.brokers.rabbitmq.connection import Connection
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["RabbitPublisher"]

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_WATCH_SECONDS: Final = 0.25
_END_SECONDS: Final = 10.0
_AWAY_SECONDS: Final = 1.0
_BLINK_SECONDS: Final = 0.01  # a look at what is known; no time at all would never see it


class RabbitPublisher(OwnThread):
    """See `outboxkit.brokers.Publisher`."""

    features = FEATURES

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.book = InFlight()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        # What follows belongs to the thread's loop.
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self._connecting: asyncio.Lock
        self._connection: Connection | None = None
        self._is_over = False  # the connection is of a session that has ended
        self._away_until = 0.0  # it did not answer a moment ago: until then nobody asks again
        self._farewell: asyncio.Task[None] | None = None
        self._tasks: dict[str, DestinationTask] = {}
        self._jitter = random.Random()  # noqa: S311  it spreads connections over the nodes

    def __repr__(self) -> str:
        return f"RabbitPublisher({self.settings.address})"

    def publish(self, batch: Batch) -> Future[Receipts]:
        return self.book.take(batch, self._hand_over)

    def _hand_over(self, pending: Pending) -> None:
        self._start()
        self._loop.call_soon_threadsafe(self._enqueue, pending)

    def capacity(self, destination: str) -> int:
        return self.book.capacity(destination)

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        if self.book.is_closed:
            return {name: Refusal(-1, Failure.BROKER_DOWN, "the publisher is closed") for name in destinations}
        try:
            return self._ask(self._look_up(destinations), timeout.total_seconds())
        except FutureTimeoutError:
            failure, text = Failure.BROKER_DOWN, f"RabbitMQ at {self.settings.address} did not answer"
        except ChannelError as trouble:
            if trouble.failure is Failure.UNAUTHORIZED:
                raise ConfigurationError(str(trouble)) from trouble
            failure, text = trouble.failure, str(trouble)
        return {name: Refusal(-1, failure, text) for name in destinations}

    def reset(self) -> None:
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._ask(self._end_session(), _END_SECONDS)

    def close(self) -> None:
        self.book.close()
        with self._lock:
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(_END_SECONDS)

    def _ask(self, question: Coroutine[Any, Any, _Answer], timeout_seconds: float) -> _Answer:
        self._start()
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return answer.result(timeout_seconds)
        except FutureTimeoutError:
            answer.cancel()
            raise

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                # A daemon: an abandoned publisher must not keep the process from ending.
                self._thread = threading.Thread(target=self._run, name="outboxkit-rabbitmq", daemon=True)
                self._thread.start()
                self._ready.wait()

    # From here on everything runs in the thread's loop.

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:  # no future may stay open
            self.book.close()
            self.book.refuse_all("the publisher has ended")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._ready.set()
        while not self._end.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), _WATCH_SECONDS)
            for task in list(self._tasks.values()):
                await task.watch()
        await self._end_session()

    def _enqueue(self, pending: Pending) -> None:
        destination = pending.batch.destination
        if destination not in self._tasks:
            self._tasks[destination] = DestinationTask(self, destination)
        self._tasks[destination].queue.put_nowait(pending)

    async def _end_session(self) -> None:
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            await task.stop()
        self.book.refuse_all("given up")
        self._is_over = True
        # A new connection is not told of an alarm before it has written something, so this one is kept until that is
        # over; what it still holds goes out before anything new.
        if self._end.is_set() or not await is_blocked(self._connection, _BLINK_SECONDS):
            await self._hang_up()

    async def _hang_up(self) -> None:
        connection, self._connection, self._is_over = self._connection, None, False
        await close(connection)

    async def connection(self) -> Connection:
        """Returns the open connection; makes one when there is none.

        Raises:
            ChannelError: the broker is away, refused the login, or takes nothing.
        """
        if self._loop.time() < self._away_until:
            raise self._silent()
        if self._is_over:
            await until_ready(self._connection, self.settings.blocked_seconds)
        async with self._connecting:
            if self._is_over or not is_open(self._connection):
                await self._hang_up()
            if self._connection is None:
                self._connection = await connect(self.settings, self._jitter)
            return self._connection

    def give_up(self, connection: Connection) -> ChannelError:
        """Drops a connection on which nothing is answered; returns what that means."""
        self._away_until = self._loop.time() + _AWAY_SECONDS
        if connection is self._connection:
            self._connection = None
        self._farewell = asyncio.create_task(close(connection))
        return self._silent()

    def _silent(self) -> ChannelError:
        return ChannelError(Failure.BROKER_DOWN, f"RabbitMQ at {self.settings.address} does not answer")

    async def _look_up(self, names: Collection[str]) -> dict[str, Refusal]:
        connection = await self.connection()
        found = {name: await trouble_with(connection, name) for name in names}
        return {name: Refusal(-1, trouble.failure, str(trouble)) for name, trouble in found.items() if trouble}

    def failed(self, destination: str, defect: Exception) -> None:
        """Tells of a defect of ours and refuses what it left open; the other destinations go on."""
        _log.error(
            "broker.publisher_failed",
            exc_info=defect,
            extra={"broker": "rabbitmq", "address": self.settings.address, "topic": destination},
        )
        self.book.refuse_all(f"the publisher failed by a defect ({type(defect).__name__}); see the log", destination)
