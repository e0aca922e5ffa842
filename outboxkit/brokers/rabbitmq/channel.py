"""A channel with confirms, beneath aio-pika: batches go out in one write, outcomes come back by delivery tag.

The client's own channel sends and awaits message by message and finds a returned message by its id; two of the same id
then get each other's outcome.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from aiormq.abc import ChannelFrame
from aiormq.channel import Channel
from pamqp import commands

from outboxkit.brokers import text_of
from outboxkit.brokers._in_flight import unsendable
from outboxkit.brokers.rabbitmq.connection import TROUBLE
from outboxkit.brokers.rabbitmq.properties import RAW_PROPERTIES, read_properties
from outboxkit.brokers.rabbitmq.wire import SEQUENCE, Unsendable, publish_frames
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from aiormq.connection import Connection
    from pamqp.header import ContentHeader

    from outboxkit.brokers._in_flight import Pending

__all__ = ["ChannelOwner", "ConfirmChannel"]

_CLOSE_SECONDS: Final = 2.0


class ChannelOwner(Protocol):
    """Hears of outcomes."""

    def complete(self, pending: Pending) -> None:
        """Hears that every row of the batch has its outcome."""
        ...

    def lost(self, text: str) -> None:
        """Hears that what is unconfirmed is about to become indeterminate."""
        ...


class ConfirmChannel(Channel):
    """One destination's channel. Use `opened` to make one."""

    def __init__(self, connection: Connection, number: int, owner: ChannelOwner) -> None:
        super().__init__(connection, number, publisher_confirms=True)
        self._owner = owner
        self._tag = 0
        self._unconfirmed: dict[int, tuple[Pending, int]] = {}  # by delivery tag, ascending
        self._by_position: dict[int, tuple[Pending, int]] = {}
        self._last_progress = 0.0  # loop time of the last write into silence, or of the last confirm
        self._closing.add_done_callback(lambda _: self.lose("the channel was closed"))

    @classmethod
    async def opened(cls, connection: Connection, owner: ChannelOwner) -> Self:
        """A new channel, in confirm mode."""
        async with connection.last_channel_lock:
            number = next(number for number in range(1, 1 << 16) if number not in connection.channels)
            channel = cls(connection, number, owner)
            connection.channels[number] = channel
        await channel.open()
        return channel

    async def send(self, pending: Pending, max_bytes: int) -> None:
        """Writes a batch at once and returns when the socket has taken it; the outcomes come later."""
        frames = self._frames(pending, max_bytes)
        pending.sent = True
        if not frames:
            self._owner.complete(pending)
            return
        taken = self.create_future()
        with suppress(*TROUBLE):  # the channel is closing: its callback has the last word
            await self.write_queue.put(ChannelFrame(payload=b"".join(frames), should_close=False, drain_future=taken))
            await taken
        if self.is_closed:
            self.lose("the channel was closed")

    def silent_since(self) -> float | None:
        """The loop time since when confirms are owed and none came; None when none is owed."""
        return self._last_progress if self._unconfirmed else None

    async def abandon(self, text: str) -> None:
        """Closes it; what is unconfirmed is indeterminate."""
        self.lose(text)
        with suppress(*TROUBLE, asyncio.CancelledError):
            await self.close(timeout=_CLOSE_SECONDS)

    def _frames(self, pending: Pending, max_bytes: int) -> list[bytes]:
        if not self._unconfirmed:
            self._last_progress = self.loop.time()
        frames = []
        frame_max = self.connection.connection_tune.frame_max
        for index, row in enumerate(pending.batch.rows):
            if len(row.payload) > max_bytes:
                pending.refuse(index, Failure.TOO_LARGE, f"at most {max_bytes:,} bytes")
                continue
            try:
                frames.append(publish_frames(row, self.number, frame_max))
            except Unsendable as error:
                pending.refuse(index, error.failure, str(error))
                continue
            except Exception as error:  # noqa: BLE001  whatever one row holds, it must not stop the others
                pending.refuse(index, Failure.INVALID, unsendable(error))
                continue
            self._tag += 1
            self._unconfirmed[self._tag] = self._by_position[row.position] = (pending, index)
        return frames

    async def _on_confirm_frame(self, frame: commands.Basic.Ack | commands.Basic.Nack) -> None:  # type: ignore[override]
        self._last_progress = self.loop.time()
        for tag in self._confirmed(frame.delivery_tag, multiple=frame.multiple):
            pending, index = self._unconfirmed.pop(tag)
            self._by_position.pop(pending.batch.rows[index].position, None)
            if isinstance(frame, commands.Basic.Ack):
                pending.accept(index)
            else:
                pending.refuse(index, Failure.REFUSING, "the queue refused it (nack)")
            if pending.left == 0:
                self._owner.complete(pending)

    def _confirmed(self, last: int, *, multiple: bool) -> list[int]:
        if not multiple:
            return [last] if last in self._unconfirmed else []
        tags = []
        for tag in self._unconfirmed:
            if tag > last:
                break
            tags.append(tag)
        return tags

    async def _on_return_frame(self, frame: commands.Basic.Return) -> None:
        header: ContentHeader = await self._get_frame()  # type: ignore[assignment]  # a return is followed by its header
        await self._read_content(frame, header)
        raw: Any = (header.properties.headers or {}).get(RAW_PROPERTIES)
        position = text_of(read_properties(bytes(raw)).headers, SEQUENCE)
        found = self._by_position.get(int(position)) if position else None
        if found is not None:  # its ack, which follows, changes nothing any more
            pending, index = found
            where = frame.exchange or "the default exchange"
            pending.refuse(index, Failure.UNROUTABLE, f"no queue takes {frame.routing_key} from {where}")

    def lose(self, text: str) -> None:
        """Ends everything that is unconfirmed: it is indeterminate."""
        lost, self._unconfirmed, self._by_position = self._unconfirmed, {}, {}
        if lost:
            self._owner.lost(text)
        for pending, index in lost.values():
            pending.refuse(index, Failure.INDETERMINATE, text)
            if pending.left == 0:
                self._owner.complete(pending)
