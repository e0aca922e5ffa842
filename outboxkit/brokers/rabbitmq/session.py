"""One channel's life of a consumer: what it handed to us, in order, within a bound of bytes."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from outboxkit.brokers import Delivery
from outboxkit.brokers.rabbitmq.connection import TROUBLE
from outboxkit.brokers.rabbitmq.properties import RAW_PROPERTIES, read_properties

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

__all__ = ["Session", "token_of"]

_PARTITION_KEY = "ce_partitionkey"
_LAG_SECONDS: Final = 5.0  # between two looks at the queues


class _Token(NamedTuple):
    session: Session
    tag: int
    message: AbstractIncomingMessage
    size: int


class Session:
    """Keeps what one channel handed out and is not settled.

    What does not fit into the bound of bytes is not kept, nor anything behind it: the broker hands it out again when
    what was kept is settled and the channel is closed.

    Attributes:
        channel: aio-pika's.
        ready: deliveries that nobody has received yet.
        changed: set when something comes, or nothing ever will.
        lost: the channel, or a consumer on it, is gone.
        is_full: it keeps nothing more.
        fitting: how many messages it held when it became full.
    """

    def __init__(self, channel: AbstractChannel, max_bytes: int) -> None:
        self.channel = channel
        self.ready: deque[Delivery] = deque()  # bounded by the prefetch
        self.changed = asyncio.Event()
        self.lost = False
        self.is_full = False
        self.fitting = 0
        self._max_bytes = max_bytes
        self._bytes = 0
        self._queued: int | None = None
        self._unsettled: dict[int, _Token] = {}  # by delivery tag, ascending

    def lose(self, *_: object) -> None:
        """Forgets everything: the broker hands it out again."""
        self.lost = True
        self.ready.clear()
        self._unsettled.clear()
        self.changed.set()

    @property
    def lag(self) -> int | None:
        """Messages that are not settled: in the queues, as they were some seconds ago, and in hand."""
        return None if self._queued is None else self._queued + len(self._unsettled)

    async def watch(self, queues: Collection[str]) -> None:
        """Counts what the queues hold, until the channel is lost."""
        with suppress(*TROUBLE):
            while not self.lost:
                # Without a time limit: a question that is given up costs the channel, and all that it handed out comes
                # again. The answer stands behind every message that is on its way.
                found = [await self.channel.get_queue(name) for name in queues]
                self._queued = sum(queue.declaration_result.message_count or 0 for queue in found)
                await asyncio.sleep(_LAG_SECONDS)

    @property
    def is_spent(self) -> bool:
        """Whether it keeps nothing more, and all that it kept is settled."""
        return self.is_full and not self._unsettled

    def receiver(self, topic: str, queue: str) -> Callable[[AbstractIncomingMessage], Awaitable[None]]:
        """Returns what takes the messages of a queue in."""

        async def on_message(message: AbstractIncomingMessage) -> None:
            if self.lost or self.is_full or message.delivery_tag is None:
                return
            size = len(message.body)
            if self._unsettled and self._bytes + size > self._max_bytes:
                self.is_full, self.fitting = True, len(self._unsettled)
                return
            token = _Token(self, message.delivery_tag, message, size)
            self._bytes += size
            self._unsettled[token.tag] = token
            self.ready.append(_delivery(message, topic, queue, token))
            self.changed.set()

        return on_message

    def settle(self, tags: set[int]) -> tuple[_Token | None, list[_Token]]:
        """Notes settled tags; returns the last one up to which all are settled, and the others one by one."""
        tags &= self._unsettled.keys()
        prefix = None
        for tag, token in self._unsettled.items():
            if tag not in tags:
                break
            prefix = token
        settled = [self._unsettled.pop(tag) for tag in sorted(tags)]
        self._bytes -= sum(token.size for token in settled)
        return prefix, [token for token in settled if prefix is None or token.tag > prefix.tag]


def token_of(delivery: Delivery) -> _Token:
    """The handle that a session gave to its delivery."""
    token: _Token = delivery.token  # type: ignore[assignment]  # made in `Session.receiver`
    return token


def _delivery(message: AbstractIncomingMessage, topic: str, queue: str, token: _Token) -> Delivery:
    raw = message.headers[RAW_PROPERTIES]
    assert isinstance(raw, bytearray)  # noqa: S101  as `connection` shows them
    properties = read_properties(bytes(raw))
    return Delivery(
        topic=topic,
        key=next((value for name, value in properties.headers if name == _PARTITION_KEY), None),
        headers=properties.headers,
        payload=message.body,
        origin=f"queue {queue}",
        timestamp=properties.timestamp,
        routing_key=message.routing_key,
        reply_to=properties.reply_to,
        content_encoding=properties.content_encoding,
        redelivered=bool(message.redelivered),
        fault=properties.fault,
        token=token,
    )
