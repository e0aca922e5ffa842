"""The way in from RabbitMQ: one connection, one channel, one consumer per queue, in the caller's event loop.

Invariants: a queue has a single active consumer; what is given back goes back with everything behind it, so that it
comes again in order; an acknowledgement for a channel that is gone does nothing, for the message comes again.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aio_pika.exceptions import ChannelPreconditionFailed

from outboxkit.brokers import Assignment
from outboxkit.brokers._backoff import Reconnects
from outboxkit.brokers.rabbitmq.connection import TROUBLE, ChannelError, close, connect, is_open, trouble_of
from outboxkit.brokers.rabbitmq.session import Session, token_of
from outboxkit.brokers.rabbitmq.settings import FEATURES
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from outboxkit.brokers import Delivery, Subscription
    from outboxkit.brokers.rabbitmq.connection import Connection
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["RabbitSubscriber", "queue_of"]

_QUORUM: Final[dict[str, Any]] = {
    "x-queue-type": "quorum",
    "x-single-active-consumer": True,
    # RabbitMQ 4 drops a message after 20 deliveries by default; how often one is tried is counted by the inbox.
    "x-delivery-limit": 1_000_000_000,
}
_ANSWER_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_PROVEN_SECONDS: Final = 30.0  # a session that lived so long was good for something
_PREFETCH: Final = (100, 65_535)  # bounds; the upper one is the protocol's


def queue_of(topic: str, consumer: str) -> str:
    """Returns the name of the queue from which a consumer reads a topic: ``{topic}.{consumer}``.

    Dots in the consumer's name are escaped: no two pairs of topic and consumer have one name.
    """
    return f"{topic}.{consumer.replace('%', '%25').replace('.', '%2E')}"


class RabbitSubscriber:
    """See `outboxkit.brokers.Subscriber`.

    Unless the settings say it, the first `receive` sets the prefetch: twice its limit, at least 100. A consumer that
    holds that many messages unsettled, or so many bytes, gets no more.
    """

    features = FEATURES

    def __init__(self, settings: Settings, subscription: Subscription) -> None:
        self._settings = settings
        if subscription.start != "earliest":
            raise ConfigurationError(
                f"{subscription.consumer}: RabbitMQ has no start={subscription.start!r}: a queue holds what was "
                "published since it was declared; leave start out, and purge the queue if you want none of it"
            )
        # Queue -> topic as the handlers know it.
        self._queues = {queue_of(topic, subscription.consumer): topic for topic in subscription.topics}
        for queue in subscription.queues:
            if queue in self._queues:
                raise ConfigurationError(
                    f"the command queue {queue} is also where {subscription.consumer} reads the topic "
                    f"{self._queues[queue]}: rename one of them",
                )
            self._queues[queue] = queue
        self._connection: Connection | None = None
        self._session: Session | None = None
        self._watch: asyncio.Task[None] | None = None
        self._began = 0.0  # when the session did
        self._fitting = _PREFETCH[1]  # messages that were seen to fit into the bound of bytes
        self._has_consumed = False
        self._jitter = random.Random()  # noqa: S311  it spreads reconnects
        self._reconnects = Reconnects(self._jitter)
        self._why = f"RabbitMQ at {settings.address} is away"
        self._closed = False

    def __repr__(self) -> str:
        return f"RabbitSubscriber({self._settings.address}, {', '.join(self._queues)})"

    @property
    def assignment(self) -> Assignment:
        session = self._session
        return Assignment() if session is None or session.lost else Assignment(len(self._queues), session.lag)

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
        by_session: dict[Session, set[int]] = {}
        for delivery in deliveries:
            token = token_of(delivery)
            by_session.setdefault(token.session, set()).add(token.tag)
        for session, tags in by_session.items():
            if not session.lost:
                await self._acknowledge(session, tags)

    async def _acknowledge(self, session: Session, tags: set[int]) -> None:
        prefix, others = session.settle(tags)
        with suppress(*TROUBLE):  # the channel went meanwhile: they come again
            if prefix is not None:
                await prefix.message.ack(multiple=True)
            for token in others:
                await token.message.ack()
        if prefix is not None or others:
            self._reconnects.succeeded()
        if session.is_spent:
            session.changed.set()

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Closes the channel: the broker takes back everything that is unsettled, in order and at once.

        Giving back one by one would let later messages of the same key, already on their way, overtake.
        """
        if any(token_of(delivery).session is self._session for delivery in deliveries):
            await self._leave_channel()

    async def declare(self, subscription: Subscription) -> Sequence[str]:
        lines = []
        connection = await self._connected()
        for topic in subscription.topics:
            # Without a consumer a producer asks: where the messages go is not its business.
            queue = queue_of(topic, subscription.consumer) if subscription.consumer else ""
            await _create(connection, queue, exchange=topic)
            lines.append(f"exchange {topic} (topic, durable)")
            lines += [f"queue {queue} (quorum), bound to {topic} with #"] if queue else []
        for queue in subscription.queues:
            await _create(connection, queue, exchange="")
            lines.append(f"queue {queue} (quorum)")
        return lines

    async def close(self) -> None:
        self._closed = True
        await self._leave_channel()
        connection, self._connection = self._connection, None
        await close(connection)

    async def _leave_channel(self) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.lose()
        if self._watch is not None:
            self._watch.cancel()
        with suppress(*TROUBLE):
            await asyncio.wait_for(session.channel.close(), _CLOSE_SECONDS)

    async def _consuming(self, limit: int, deadline: float) -> Session:
        """The session, opened again when it was lost, or is full and settled."""
        if self._closed:
            raise TransientBrokerError("the subscriber is closed")
        await self._leave_what_is_over()
        if self._session is not None:
            return self._session
        await self._back_off(deadline)
        try:
            self._session = await self._subscribe(await self._connected(), limit)
        except (ConfigurationError, TransientBrokerError) as error:
            self._reconnects.failed(asyncio.get_running_loop().time())
            self._why = error.message
            raise
        self._began = asyncio.get_running_loop().time()
        self._watch = asyncio.create_task(self._session.watch(self._queues))
        return self._session

    async def _leave_what_is_over(self) -> None:
        session = self._session
        if session is None or not (session.lost or session.is_spent):
            return
        was_lost, now = session.lost, asyncio.get_running_loop().time()
        self._fitting = session.fitting or self._fitting
        await self._leave_channel()
        if not was_lost:
            return
        if now - self._began > _PROVEN_SECONDS:
            self._reconnects.succeeded()
        self._reconnects.failed(now)
        times = self._reconnects.failures
        often = f" {times} times before a message was settled" if times > 1 else ""
        self._why = f"RabbitMQ at {self._settings.address} ended the channel{often}"
        if often:
            raise TransientBrokerError(self._why)

    async def _back_off(self, deadline: float) -> None:
        """Waits after failures in a row; raises when the time is over before."""
        now = asyncio.get_running_loop().time()
        wait, room = self._reconnects.left(now), max(0.0, deadline - now)
        await asyncio.sleep(min(wait, room))
        if wait > room:
            raise TransientBrokerError(self._why)  # not: there is nothing to read

    async def _connected(self) -> Connection:
        if self._connection is None or not is_open(self._connection):
            lost, self._connection = self._connection, None
            await close(lost)
            try:
                self._connection = await connect(self._settings, self._jitter)
            except ChannelError as trouble:
                raise _raised(trouble) from trouble
        return self._connection

    async def _subscribe(self, connection: Connection, limit: int) -> Session:
        asked = f"RabbitMQ at {self._settings.address}"
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                channel = await connection.channel(publisher_confirms=False)
            session = Session(channel, self._settings.prefetch_bytes)
            channel.close_callbacks.add(session.lose)
            (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(session.lose)
            await channel.set_qos(prefetch_count=self._prefetch(limit), timeout=_ANSWER_SECONDS)
            for name, topic in self._queues.items():
                asked = f"the queue {name}"
                async with asyncio.timeout(_ANSWER_SECONDS):
                    queue = await channel.get_queue(name)
                await queue.consume(session.receiver(topic, name), timeout=_ANSWER_SECONDS)
        except TROUBLE as error:
            trouble = trouble_of(error, asked)
            if self._has_consumed and trouble.failure is Failure.UNKNOWN_TOPIC:  # a node that starts, or a repair
                raise TransientBrokerError(str(trouble)) from error
            raise _raised(trouble) from error
        self._has_consumed = True
        return session

    def _prefetch(self, limit: int) -> int:
        minimum, maximum = _PREFETCH
        # The next batch arrives while one is handled.
        wanted = self._settings.prefetch or max(minimum, min(2 * limit, maximum))
        return min(wanted, self._fitting)


async def _create(connection: Connection, queue: str, *, exchange: str) -> None:
    try:
        async with connection.channel(publisher_confirms=False) as channel:
            if exchange:
                await channel.declare_exchange(exchange, "topic", durable=True, timeout=_ANSWER_SECONDS)
            if queue:
                arguments = dict(_QUORUM)
                declared = await channel.declare_queue(
                    queue, durable=True, arguments=arguments, timeout=_ANSWER_SECONDS
                )
                if exchange:
                    await declared.bind(exchange, "#", timeout=_ANSWER_SECONDS)
    except ChannelPreconditionFailed as error:
        raise ConfigurationError(
            f"the exchange {exchange!r} or the queue {queue!r} exists with other properties than a durable topic "
            "exchange and a quorum queue with a single active consumer; delete or rename it",
        ) from error
    except TROUBLE as error:
        raise _raised(trouble_of(error, f"queue {queue}")) from error


def _raised(trouble: ChannelError) -> Exception:
    lasting = trouble.failure in (Failure.UNAUTHORIZED, Failure.UNKNOWN_TOPIC)
    return ConfigurationError(str(trouble)) if lasting else TransientBrokerError(str(trouble))
