"""One destination of a publisher: its batches in order, its channel, its task."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

from outboxkit.brokers.rabbitmq.channel import ConfirmChannel
from outboxkit.brokers.rabbitmq.connection import TROUBLE, ChannelError, beneath, is_blocked, trouble_of, until_ready
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.brokers._in_flight import InFlight, Pending
    from outboxkit.brokers.rabbitmq.connection import Connection
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["DestinationTask", "trouble_with"]

_PROBE_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 2.5  # without a confirm while some are owed: then the broker is asked whether it is there
_ANSWER_SECONDS: Final = 2.0
_CANCEL_SECONDS: Final = 0.1
_BLINK_SECONDS: Final = 0.01  # a look at what is known; no time at all would never see it
#: Kind of a message -> words for one whose name is only of the other kind.
_MISTAKEN: Final = {
    Kind.COMMAND: "a command needs a queue of this name, and there is only an exchange, which takes events",
    Kind.EVENT: "an event needs an exchange of this name, and there is only a queue, which takes commands",
}
_OTHER: Final = {Kind.COMMAND: Kind.EVENT, Kind.EVENT: Kind.COMMAND}


class Owner(Protocol):
    """The publisher, as far as a destination knows it."""

    settings: Settings
    book: InFlight

    async def connection(self) -> Connection:
        """Returns the open connection; makes one when there is none."""
        ...

    def give_up(self, connection: Connection) -> ChannelError:
        """Drops a connection on which nothing is answered; returns what that means."""
        ...

    def failed(self, destination: str, defect: Exception) -> None:
        """Tells of a defect of ours and refuses what it left open."""
        ...


class DestinationTask:
    """One destination: its batches in order, its channel, its task."""

    def __init__(self, owner: Owner, destination: str) -> None:
        self.queue: asyncio.Queue[Pending] = asyncio.Queue()  # bounded by `capacity`
        self._owner = owner
        self._destination = destination
        self._connection: Connection | None = None
        self._channel: ConfirmChannel | None = None
        self._kinds: set[Kind] = set()  # that were asked for since the channel was opened, and found
        self._telling: set[asyncio.Task[None]] = set()
        self._asked_at = 0.0
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            pending = await self.queue.get()
            if pending.left == 0:
                continue  # refused while it waited
            try:
                channel = await self._open_channel(_kind_of(pending))
                await channel.send(pending, self._owner.settings.max_message_bytes)
            except ChannelError as trouble:
                await self._refuse(pending, trouble)
            except Exception as defect:  # noqa: BLE001  a dead task would stop the destination in silence
                self._owner.failed(self._destination, defect)

    async def _open_channel(self, kind: Kind) -> ConfirmChannel:
        connection = await self._owner.connection()
        await until_ready(connection, self._owner.settings.blocked_seconds)
        channel = None if self._channel is None or self._channel.is_closed else self._channel
        if channel is None or kind not in self._kinds:
            trouble = await _trouble_with_kind(connection, self._destination, kind)
            if trouble:
                raise trouble
        if channel is None:
            try:
                self._channel = channel = await ConfirmChannel.opened(beneath(connection), self)
            except TROUBLE as error:
                raise trouble_of(error, "the channel") from error
            self._connection, self._kinds = connection, set()
        self._kinds.add(kind)
        return channel

    async def _refuse(self, pending: Pending, trouble: ChannelError) -> None:
        """Refuses a batch and what waits behind it; only the batch when the name is right for the other kind."""
        kind = _kind_of(pending)
        if trouble.failure is Failure.UNKNOWN_TOPIC and await self._takes(_OTHER[kind]):
            self._owner.book.refuse(pending, Failure.REJECTED, _MISTAKEN[kind])
        else:
            self._refuse_unsent(trouble)

    async def _takes(self, kind: Kind) -> bool:
        """Whether it takes messages of a kind, as far as the broker answers."""
        try:
            connection = await self._owner.connection()
        except ChannelError:
            return False
        return await _trouble_with_kind(connection, self._destination, kind) is None

    def complete(self, pending: Pending) -> None:
        if pending.has(Failure.UNROUTABLE) and _kind_of(pending) is Kind.COMMAND:
            telling = asyncio.create_task(self._tell_mistaken(pending))
            self._telling.add(telling)  # the loop itself does not hold it
            telling.add_done_callback(self._telling.discard)
        else:
            self._owner.book.finish(pending)

    async def _tell_mistaken(self, pending: Pending) -> None:
        """Ends a batch of commands of which no queue has taken all: that hinders no events of the same name."""
        try:
            self._kinds.discard(Kind.COMMAND)  # the next command asks first
            if await self._takes(Kind.EVENT):
                pending.restate(Failure.UNROUTABLE, Failure.REJECTED, _MISTAKEN[Kind.COMMAND])
        finally:
            self._owner.book.finish(pending)

    def lost(self, text: str) -> None:
        self._refuse_unsent(ChannelError(Failure.BROKER_DOWN, text))

    def _refuse_unsent(self, trouble: ChannelError) -> None:
        self._owner.book.refuse_unsent(self._destination, trouble.failure, str(trouble))

    async def watch(self) -> None:
        """Gives up on confirms that do not come, and on a broker that answers nothing at all."""
        try:
            await self._watch()
        except Exception as defect:  # noqa: BLE001  it must not end the thread that serves all destinations
            self._owner.failed(self._destination, defect)

    async def _watch(self) -> None:
        channel, now = self._channel, asyncio.get_running_loop().time()
        since = channel.silent_since() if channel else None
        if channel is None or since is None:
            return
        limit = self._owner.settings.confirm_seconds
        if now - since > limit:
            self._channel = None
            await channel.abandon(f"not confirmed within {limit:g} s")
        elif now - max(since, self._asked_at) > _SILENCE_SECONDS:
            await self._ask_whether_it_is_there(channel)
            self._asked_at = asyncio.get_running_loop().time()

    async def _ask_whether_it_is_there(self, channel: ConfirmChannel) -> None:
        connection = self._connection
        if connection is None or await is_blocked(connection, _BLINK_SECONDS):
            return  # under an alarm it answers nothing, and is there
        try:
            async with asyncio.timeout(_ANSWER_SECONDS), connection.channel(publisher_confirms=False):
                return
        except TROUBLE:
            if not self._task.done():
                self._channel = None
                trouble = self._owner.give_up(connection)
                channel.lose(f"{trouble}; whether it was stored is not known")

    async def stop(self) -> None:
        """Ends the task, whatever it is doing."""
        # Again until it ends: in Python 3.11 `wait_for` swallows a cancellation that meets what it waited for.
        while not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_CANCEL_SECONDS)
        with suppress(asyncio.CancelledError):
            self._task.result()


def _kind_of(pending: Pending) -> Kind:
    """The kind of the first row: the relay makes a batch of one kind. Whatever is no command goes to the exchange."""
    return Kind.COMMAND if pending.batch.rows[0].kind == Kind.COMMAND else Kind.EVENT


async def trouble_with(connection: Connection, name: str) -> ChannelError | None:
    """Returns what is wrong with a destination: an exchange, or a queue when it takes commands."""
    return await _trouble_with_kind(connection, name, Kind.EVENT) and await _trouble_with_kind(
        connection, name, Kind.COMMAND
    )


async def _trouble_with_kind(connection: Connection, name: str, kind: Kind) -> ChannelError | None:
    # On a channel of its own: a missing exchange closes the channel, with everything that is in flight on it.
    try:
        async with asyncio.timeout(_PROBE_SECONDS), connection.channel(publisher_confirms=False) as probe:
            await (probe.get_queue(name) if kind is Kind.COMMAND else probe.get_exchange(name))
    except TROUBLE as error:
        return trouble_of(error, f"the {'queue' if kind is Kind.COMMAND else 'exchange'} {name}")
    return None
