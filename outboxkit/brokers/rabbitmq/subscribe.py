"""The way in from RabbitMQ: one connection, one channel, one consumer per queue, in the caller's event loop.

Invariants: a queue has a single active consumer; what is given back goes back with everything behind it, so that it
comes again in order; an acknowledgement for a channel that is gone does nothing, for the message comes again.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiormq.exceptions import ChannelPreconditionFailed

from outboxkit.brokers import Delivery
from outboxkit.brokers.rabbitmq.settings import FEATURES, TROUBLE, ChannelError, connect, trouble_of
from outboxkit.brokers.rabbitmq.wire import headers_of
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from aiormq.abc import AbstractChannel, DeliveredMessage
    from aiormq.connection import Connection
    from pamqp.common import FieldTable

    from outboxkit.brokers import Subscription
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["RabbitSubscriber"]

_QUORUM: Final[FieldTable] = {
    "x-queue-type": "quorum",
    "x-single-active-consumer": True,
    # RabbitMQ 4 drops a message after 20 deliveries by default; how often one is tried is counted by the inbox.
    "x-delivery-limit": 1_000_000_000,
}
_ANSWER_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_BACKOFF_BASE_SECONDS: Final = 0.1
_BACKOFF_CAP_SECONDS: Final = 5.0
_PREFETCH: Final = (100, 65_535)  # bounds; the upper one is the protocol's
_PARTITION_KEY: Final = "ce_partitionkey"


class _Token(NamedTuple):
    session: _Session
    tag: int


class _Session:
    """One channel's life: what it handed to us and is not settled."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.ready: deque[Delivery] = deque()  # bounded by the prefetch
        self.unsettled: dict[int, None] = {}  # delivery tags, ascending
        self.changed = asyncio.Event()
        self.lost = False

    def lose(self, *_: object) -> None:
        """The channel or a consumer on it is gone: the broker hands everything out again."""
        self.lost = True
        self.ready.clear()
        self.unsettled.clear()
        self.changed.set()

    def settle(self, tags: set[int]) -> tuple[int, list[int]]:
        """Notes settled tags; returns up to which tag all are settled (0: none new), and the others one by one."""
        tags &= self.unsettled.keys()
        prefix = 0
        for tag in self.unsettled:
            if tag not in tags:
                break
            prefix = tag
        for tag in tags:
            del self.unsettled[tag]
        return prefix, sorted(tag for tag in tags if tag > prefix)


class RabbitSubscriber:
    """See `outboxkit.brokers.Subscriber`.

    The first `receive` sets the prefetch: twice its limit, at least 100. Who holds that many unsettled gets no more.
    """

    features = FEATURES

    def __init__(self, settings: Settings, subscription: Subscription) -> None:
        self._settings = settings
        # Queue -> topic as the handlers know it.
        self._queues = {f"{topic}.{subscription.consumer}": topic for topic in subscription.topics}
        self._queues.update({queue: queue for queue in subscription.queues})
        self._connection: Connection | None = None
        self._session: _Session | None = None
        self._has_consumed = False
        self._failures = 0  # of connecting, in a row
        self._jitter = random.Random()  # noqa: S311  it spreads reconnects
        self._closed = False

    def __repr__(self) -> str:
        return f"RabbitSubscriber({self._settings.address}, {', '.join(self._queues)})"

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout.total_seconds()
        while True:
            session = await self._consuming(limit, deadline)
            if session.ready:
                return [session.ready.popleft() for _ in range(min(limit, len(session.ready)))]
            session.changed.clear()
            try:
                await asyncio.wait_for(session.changed.wait(), max(0.0, deadline - loop.time()))
            except TimeoutError:
                return ()

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        by_session: dict[_Session, set[int]] = {}
        for delivery in deliveries:
            session, tag = _token(delivery)
            by_session.setdefault(session, set()).add(tag)
        for session, tags in by_session.items():
            if not session.lost:
                await self._acknowledge(session, tags)

    async def _acknowledge(self, session: _Session, tags: set[int]) -> None:
        prefix, others = session.settle(tags)
        with suppress(*TROUBLE):  # the channel went meanwhile: they come again
            if prefix:
                await session.channel.basic_ack(prefix, multiple=True, wait=not others)
            for tag in others:
                await session.channel.basic_ack(tag, wait=tag == others[-1])

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Closes the channel: the broker takes back everything that is unsettled, in order and at once.

        Giving back one by one would let later messages of the same key, already on their way, overtake.
        """
        if any(_token(delivery).session is self._session for delivery in deliveries):
            await self._leave_channel()

    async def declare(self, subscription: Subscription) -> Sequence[str]:
        lines = []
        connection = await self._connected()
        for topic in subscription.topics:
            # Without a consumer a producer asks: where the messages go is not its business.
            queue = f"{topic}.{subscription.consumer}" if subscription.consumer else ""
            await self._create(connection, queue, exchange=topic)
            lines.append(f"exchange {topic} (topic, durable)")
            lines += [f"queue {queue} (quorum), bound to {topic} with #"] if queue else []
        for queue in subscription.queues:
            await self._create(connection, queue, exchange="")
            lines.append(f"queue {queue} (quorum)")
        return lines

    async def _create(self, connection: Connection, queue: str, *, exchange: str) -> None:
        try:
            channel = await connection.channel(publisher_confirms=False)
            if exchange:
                await channel.exchange_declare(exchange, exchange_type="topic", durable=True, timeout=_ANSWER_SECONDS)
            if queue:
                await channel.queue_declare(queue, durable=True, arguments=dict(_QUORUM), timeout=_ANSWER_SECONDS)
            if exchange and queue:
                await channel.queue_bind(queue, exchange, "#", timeout=_ANSWER_SECONDS)
            await asyncio.wait_for(channel.close(), _CLOSE_SECONDS)
        except ChannelPreconditionFailed as error:
            raise ConfigurationError(
                f"the exchange {exchange!r} or the queue {queue!r} exists with other properties than a durable topic "
                "exchange and a quorum queue with a single active consumer; delete or rename it",
            ) from error
        except TROUBLE as error:
            raise _raised(trouble_of(error, f"queue {queue}")) from error

    async def close(self) -> None:
        self._closed = True
        await self._leave_channel()
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*TROUBLE):
                await asyncio.wait_for(connection.close(), _CLOSE_SECONDS)

    async def _leave_channel(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.lose()
        with suppress(*TROUBLE):
            await asyncio.wait_for(session.channel.close(), _CLOSE_SECONDS)

    async def _consuming(self, limit: int, deadline: float) -> _Session:
        """The session, opened again when it was lost."""
        if self._closed:
            raise TransientBrokerError("the subscriber is closed")
        if self._session is not None and not self._session.lost:
            return self._session
        if not await self._backed_off(deadline):
            raise TransientBrokerError(f"RabbitMQ at {self._settings.address} is away")  # not: there is nothing to read
        try:
            connection = await self._connected()
            self._session = await self._subscribe(connection, limit)
        except (ConfigurationError, TransientBrokerError):
            self._failures += 1
            raise
        self._failures = 0
        return self._session

    async def _backed_off(self, deadline: float) -> bool:
        """Waits with full jitter after failures in a row; False when the time is over before."""
        ceiling = min(_BACKOFF_CAP_SECONDS, _BACKOFF_BASE_SECONDS * 2 ** min(self._failures, 10))
        delay = ceiling * self._jitter.random() if self._failures else 0.0
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.sleep(min(delay, max(0.0, left)))
        return delay <= max(0.0, left)

    async def _connected(self) -> Connection:
        if self._connection is None or self._connection.is_closed:
            try:
                self._connection = await connect(self._settings)
            except ChannelError as trouble:
                raise _raised(trouble) from trouble
        return self._connection

    async def _subscribe(self, connection: Connection, limit: int) -> _Session:
        await self._leave_channel()
        asked = f"RabbitMQ at {self._settings.address}"
        try:
            channel = await asyncio.wait_for(connection.channel(publisher_confirms=False), _ANSWER_SECONDS)
            session = _Session(channel)
            channel.closing.add_done_callback(session.lose)
            channel.on_consumer_cancel_callbacks.add(session.lose)
            await channel.basic_qos(prefetch_count=_prefetch(limit), timeout=_ANSWER_SECONDS)
            for queue in self._queues:
                asked = f"the queue {queue}"
                await channel.queue_declare(queue, passive=True, timeout=_ANSWER_SECONDS)
            for queue, topic in self._queues.items():
                await channel.basic_consume(queue, _receiver(session, topic, queue), timeout=_ANSWER_SECONDS)
        except TROUBLE as error:
            trouble = trouble_of(error, asked)
            if self._has_consumed and trouble.failure is Failure.UNKNOWN_TOPIC:  # a node that starts, or a repair
                raise TransientBrokerError(str(trouble)) from error
            raise _raised(trouble) from error
        self._has_consumed = True
        return session


def _prefetch(limit: int) -> int:
    minimum, maximum = _PREFETCH
    return max(minimum, min(2 * limit, maximum))  # the next batch arrives while one is handled


def _token(delivery: Delivery) -> _Token:
    token: _Token = delivery.token  # type: ignore[assignment]  # made in _receiver
    return token


def _receiver(session: _Session, topic: str, queue: str) -> Any:
    async def on_message(message: DeliveredMessage) -> None:
        tag = message.delivery.delivery_tag  # type: ignore[union-attr]  # it is a Basic.Deliver
        if session.lost or tag is None:
            return
        properties = message.header.properties
        headers = headers_of(properties)
        delivery = Delivery(
            topic=topic,
            key=next((value for name, value in headers if name == _PARTITION_KEY), None),
            headers=headers,
            payload=message.body,
            origin=f"queue {queue}",
            timestamp=properties.timestamp,
            routing_key=message.delivery.routing_key,  # type: ignore[union-attr]  # it is a Basic.Deliver
            reply_to=properties.reply_to,
            content_encoding=properties.content_encoding,
            redelivered=bool(message.delivery.redelivered),  # type: ignore[union-attr]
            token=_Token(session, tag),
        )
        session.unsettled[tag] = None
        session.ready.append(delivery)
        session.changed.set()

    return on_message


def _raised(trouble: ChannelError) -> Exception:
    lasting = trouble.failure in (Failure.UNAUTHORIZED, Failure.UNKNOWN_TOPIC)
    return ConfigurationError(str(trouble)) if lasting else TransientBrokerError(str(trouble))
