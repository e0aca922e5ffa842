"""The way out to RabbitMQ. A thread with an event loop of its own; one channel and one task per destination.

Invariants: every message is mandatory, persistent and confirmed; a returned message is found by its position, never by
its id; a channel that closes makes everything on it indeterminate; a batch never overtakes one that was refused.
After `Failure.INDETERMINATE` the caller calls `reset` before it sends again: what was written cannot be recalled.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TypeVar

from outboxkit.brokers import Refusal
from outboxkit.brokers.rabbitmq.channel import ConfirmChannel, Pending
from outboxkit.brokers.rabbitmq.settings import FEATURES, TROUBLE, ChannelError, connect, trouble_of
from outboxkit.errors import ConfigurationError
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Collection, Coroutine, Mapping
    from concurrent.futures import Future
    from datetime import timedelta
    from typing import Any

    from aiormq.connection import Connection

    from outboxkit.brokers import Batch, Receipts
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["RabbitPublisher"]

_Answer = TypeVar("_Answer")

_MESSAGES_PER_DESTINATION: Final = 10_000
_BYTES_IN_FLIGHT: Final = 64 << 20  # bounds memory, whatever the size of the messages
_WATCH_SECONDS: Final = 0.25
_END_SECONDS: Final = 10.0
_PROBE_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_CANCEL_SECONDS: Final = 0.1
_BLINK_SECONDS: Final = 0.01  # a look at what is known; no time at all would never see it


class RabbitPublisher:
    """See `outboxkit.brokers.Publisher`."""

    features = FEATURES

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._open: dict[str, list[Pending]] = {}  # by destination, in order; guarded by the lock
        self._closed = False  # guarded by the lock
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        # What follows belongs to the thread's loop.
        self._loop: asyncio.AbstractEventLoop
        self._end: asyncio.Event
        self._connecting: asyncio.Lock
        self._connection: Connection | None = None
        self._is_over = False  # the connection is of a session that has ended
        self._lanes: dict[str, _Lane] = {}

    def __repr__(self) -> str:
        return f"RabbitPublisher({self.settings.address})"

    def publish(self, batch: Batch) -> Future[Receipts]:
        pending = Pending(batch)
        with self._lock:
            if not self._closed and batch.rows:
                self._open.setdefault(batch.destination, []).append(pending)
                self._start()
                self._loop.call_soon_threadsafe(self._enqueue, pending)
                return pending.future
        pending.refuse_rest(Failure.BROKER_DOWN, "the publisher is closed")
        pending.resolve()
        return pending.future

    def capacity(self, destination: str) -> int:
        with self._lock:
            mine = sum(pending.left for pending in self._open.get(destination, ()))
            size = sum(pending.size for batches in self._open.values() for pending in batches)
        return 0 if size >= _BYTES_IN_FLIGHT else max(0, _MESSAGES_PER_DESTINATION - mine)

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        if self._closed:
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
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(_END_SECONDS)

    def _ask(self, question: Coroutine[Any, Any, _Answer], timeout_seconds: float) -> _Answer:
        with self._lock:
            self._start()
        answer = asyncio.run_coroutine_threadsafe(question, self._loop)
        try:
            return answer.result(timeout_seconds)
        except FutureTimeoutError:
            answer.cancel()
            raise

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: an abandoned publisher must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="outboxkit-rabbitmq", daemon=True)
            self._thread.start()
            self._ready.wait()

    # From here on everything runs in the thread's loop.

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        finally:  # also after a defect of ours: no future may stay open
            with self._lock:
                self._closed = True
            self._refuse_open("the publisher has ended")

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._connecting = asyncio.Lock()
        self._ready.set()
        while not self._end.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), _WATCH_SECONDS)
            for lane in list(self._lanes.values()):
                await lane.watch()
        await self._end_session()

    def _enqueue(self, pending: Pending) -> None:
        destination = pending.batch.destination
        if destination not in self._lanes:
            self._lanes[destination] = _Lane(self, destination)
        self._lanes[destination].queue.put_nowait(pending)

    async def _end_session(self) -> None:
        lanes, self._lanes = list(self._lanes.values()), {}
        for lane in lanes:
            await lane.stop()
        self._refuse_open("given up")
        self._is_over = True
        # A new connection is not told of an alarm before it has written something, so this one is kept until that is
        # over; what it still holds goes out before anything new.
        if self._end.is_set() or not await _is_blocked(self._connection, _BLINK_SECONDS):
            await self._hang_up()

    async def _hang_up(self) -> None:
        connection, self._connection, self._is_over = self._connection, None, False
        await _close(connection)

    async def connection(self) -> Connection:
        """The open connection; made when there is none.

        Raises:
            ChannelError: the broker is away, refused the login, or takes nothing.
        """
        if self._is_over:
            await _until_ready(self._connection, self.settings.blocked_seconds)
        async with self._connecting:
            if self._is_over:
                await self._hang_up()
            if self._connection is None or self._connection.is_closed:
                self._connection = await connect(self.settings)
            return self._connection

    async def _look_up(self, names: Collection[str]) -> dict[str, Refusal]:
        connection = await self.connection()
        found = {name: await _trouble_with(connection, name) for name in names}
        return {name: Refusal(-1, trouble.failure, str(trouble)) for name, trouble in found.items() if trouble}

    def refuse_waiting(self, destination: str, trouble: ChannelError) -> None:
        """Refuses all that waits for the destination: a later batch must not overtake the one that was refused."""
        with self._lock:
            waiting = [pending for pending in self._open.get(destination, ()) if not pending.written]
        for pending in waiting:
            self._refuse(pending, trouble.failure, str(trouble))

    def _refuse_open(self, text: str) -> None:
        with self._lock:
            left = [pending for batches in self._open.values() for pending in batches]
        for pending in left:
            self._refuse(pending, Failure.INDETERMINATE if pending.written else Failure.BROKER_DOWN, text)

    def _refuse(self, pending: Pending, failure: Failure, text: str) -> None:
        pending.refuse_rest(failure, text)
        self.complete(pending)

    def complete(self, pending: Pending) -> None:
        """Every row of the batch has its outcome."""
        if pending.future.done():
            return
        with self._lock:
            batches = self._open[pending.batch.destination]
            batches.remove(pending)
            if not batches:
                del self._open[pending.batch.destination]
        pending.resolve()


class _Lane:
    """One destination: its batches in order, its channel, its task."""

    def __init__(self, owner: RabbitPublisher, destination: str) -> None:
        self.queue: asyncio.Queue[Pending] = asyncio.Queue()  # bounded by `capacity`
        self._owner = owner
        self._destination = destination
        self._channel: ConfirmChannel | None = None
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            pending = await self.queue.get()
            if pending.left == 0:
                continue  # refused while it waited
            try:
                channel = await self._open_channel(command=pending.batch.rows[0].kind == Kind.COMMAND)
            except ChannelError as trouble:
                self._owner.refuse_waiting(self._destination, trouble)
            else:
                await channel.send(pending, self._owner.settings.max_message_bytes)

    async def _open_channel(self, *, command: bool) -> ConfirmChannel:
        connection = await self._owner.connection()
        await _until_ready(connection, self._owner.settings.blocked_seconds)
        if self._channel is None or self._channel.is_closed:
            trouble = await _trouble_with_kind(connection, self._destination, command=command)
            if trouble:
                raise trouble
            try:
                self._channel = await ConfirmChannel.opened(connection, self)
            except TROUBLE as error:
                raise trouble_of(error, "the channel") from error
        return self._channel

    def complete(self, pending: Pending) -> None:
        self._owner.complete(pending)

    def lost(self, text: str) -> None:
        self._owner.refuse_waiting(self._destination, ChannelError(Failure.BROKER_DOWN, text))

    async def watch(self) -> None:
        """Gives up on confirms that do not come; surfaces a defect of the task."""
        if self._task.done():
            self._task.result()
        since = self._channel.silent_since() if self._channel else None
        limit = self._owner.settings.confirm_seconds
        if self._channel and since is not None and asyncio.get_running_loop().time() - since > limit:
            channel, self._channel = self._channel, None
            await channel.abandon(f"not confirmed within {limit:g} s")

    async def stop(self) -> None:
        # Again until it ends: in Python 3.11 `wait_for` swallows a cancellation that meets what it waited for.
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CANCEL_SECONDS)
        with suppress(asyncio.CancelledError):
            self._task.result()


async def _trouble_with(connection: Connection, name: str) -> ChannelError | None:
    """A destination is an exchange, or a queue when it takes commands."""
    return await _trouble_with_kind(connection, name, command=False) and await _trouble_with_kind(
        connection,
        name,
        command=True,
    )


async def _trouble_with_kind(connection: Connection, name: str, *, command: bool) -> ChannelError | None:
    # On a channel of its own: a missing exchange closes the channel, with everything that is in flight on it.
    try:
        probe = await asyncio.wait_for(connection.channel(publisher_confirms=False), _PROBE_SECONDS)
        asked = probe.queue_declare(name, passive=True) if command else probe.exchange_declare(name, passive=True)
        await asyncio.wait_for(asked, _PROBE_SECONDS)
        await asyncio.wait_for(probe.close(), _PROBE_SECONDS)
    except TROUBLE as error:
        return trouble_of(error, f"the {'queue' if command else 'exchange'} {name}")
    return None


async def _until_ready(connection: Connection | None, limit: float) -> None:
    """Returns when the broker takes messages on this connection.

    Raises:
        ChannelError: it did not within so many seconds.
    """
    if await _is_blocked(connection, limit):
        raise ChannelError(Failure.BLOCKED, f"RabbitMQ takes nothing since {limit:g} s (memory or disk alarm)")


async def _is_blocked(connection: Connection | None, seconds: float) -> bool:
    """Whether the broker takes nothing because of an alarm, and goes on so for so long."""
    if connection is None or connection.is_closed:
        return False
    try:
        await asyncio.wait_for(connection.ready(), seconds)
    except TimeoutError:
        return True
    return False


async def _close(connection: Connection | None) -> None:
    if connection is not None:
        with suppress(*TROUBLE, asyncio.CancelledError):
            await asyncio.wait_for(connection.close(), _CLOSE_SECONDS)
