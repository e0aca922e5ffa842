"""What tests of the consumer share: a world of database and broker, and a consumer that runs until a fact is true."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, create_engine, func, make_url, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import migrations, tables
from outboxkit.brokers import Assignment, Delivery, Subscriber
from outboxkit.brokers.memory import Exchange, MemorySubscriber, exchange
from outboxkit.consumer import Consumer, MessageContext
from outboxkit.dead_letters import DeadLetter, Filter, find
from outboxkit.events import event
from outboxkit.headers import pack_headers, wire_headers
from outboxkit.message import Message
from outboxkit.policy import RetryPolicy, full_jitter
from outboxkit.rows import Row

__all__ = [
    "Base",
    "ConsumerFixture",
    "Effect",
    "OrderPlaced",
    "Until",
    "consumer",
    "create_tables",
    "handles",
    "impatient",
    "letters",
    "order",
    "raises_at",
    "row_of",
]


class Base(DeclarativeBase):
    """The application's tables."""


class Effect(Base):
    """One row per effect: what a handler does is counted here."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    message_id: Mapped[str]
    number: Mapped[int]


@event("order.placed", version=1)
@dataclass(frozen=True)
class OrderPlaced:
    number: int


def impatient(immediate: int = 0, delayed: int = 3, **options: Any) -> RetryPolicy:
    """Retries without noticeable delays."""
    return RetryPolicy(immediate=immediate, delayed=full_jitter("1ms", cap="1ms", attempts=delayed), **options)


def order(number: int, *, key: str | None = "k", message_id: str = "", topic: str = "orders", **others: Any) -> Message:
    values: dict[str, Any] = {
        "type": "order.placed",
        "payload": json.dumps({"number": number}).encode(),
        "content_type": "application/json",
        "source": "shop",
    }
    return Message(
        id=message_id or str(uuid4()), topic=topic, key=None if key is None else key.encode(), **values | others
    )


def row_of(message: Message, position: int = 1) -> Row:
    try:
        row_id = UUID(message.id)
    except ValueError:
        row_id = uuid4()
    return Row.of(
        position=position,
        id=row_id,
        topic=message.topic,
        key=message.key,
        type=message.type,
        kind=message.kind,
        payload=message.payload,
        headers=pack_headers(wire_headers(message)),
        recorded_at=datetime.now(UTC),
        expires_at=None,
    )


def create_tables(connection: Connection) -> None:
    Base.metadata.create_all(connection)
    migrations.upgrade(connection)


@dataclass
class Until:
    """A subscriber that sets `stop` when nothing more arrives and a fact is true."""

    inner: Subscriber
    stop: asyncio.Event
    fact: Callable[[], bool]
    idle: timedelta = timedelta(milliseconds=5)
    received: list[Delivery] = field(default_factory=list)
    acknowledged: list[Delivery] = field(default_factory=list)
    released: list[Delivery] = field(default_factory=list)
    in_hand: set[int] = field(default_factory=set)

    @property
    def features(self) -> Any:
        return self.inner.features

    @property
    def assignment(self) -> Assignment:
        return self.inner.assignment

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        found = await self.inner.receive(limit, min(timeout, self.idle))
        self.received += found
        self.in_hand.update(id(delivery) for delivery in found)
        # In a thread: a fact asks the database, and a handler that holds SQLite's lock needs this loop to go on.
        if not found and not self.in_hand and await asyncio.to_thread(self.fact):
            self.stop.set()
        return found

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await self.inner.acknowledge(deliveries)
        self.acknowledged += deliveries
        self.in_hand.difference_update(id(delivery) for delivery in deliveries)

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        await self.inner.release(deliveries)
        self.released += deliveries
        self.in_hand.difference_update(id(delivery) for delivery in deliveries)

    async def declare(self, subscription: Any) -> Sequence[str]:
        return await self.inner.declare(subscription)

    async def close(self) -> None:
        await self.inner.close()


class ConsumerFixture:
    """One database with our tables and the application's, and one broker in memory."""

    def __init__(self, url: str, *, has_tables: bool = False) -> None:
        self.url = url
        self.engine: Engine = create_engine(url, pool_pre_ping=True)
        self.exchange_name = f"test-{uuid4().hex}"
        if not has_tables:
            with self.engine.begin() as connection:
                create_tables(connection)
        self._async: AsyncEngine | None = None
        self.between: list[Any] = []  #: statements to execute when no delivery is in hand

    @property
    def exchange(self) -> Exchange:
        return exchange(self.exchange_name)

    @property
    def plain(self) -> sessionmaker[Session]:
        return sessionmaker(self.engine)

    @property
    def asynchronous(self) -> async_sessionmaker[AsyncSession]:
        if self._async is None:
            url = make_url(self.url)
            driver = "sqlite+aiosqlite" if url.get_backend_name() == "sqlite" else url.drivername
            self._async = create_async_engine(url.set(drivername=driver))
        return async_sessionmaker(self._async)

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.exchange.append(message.topic, row_of(message))

    async def run(self, consumer: Consumer, *, until: Callable[[], bool] = lambda: True, rests: bool = False) -> Until:
        """Runs until nothing arrives, nothing waits, and the fact is true.

        Args:
            consumer: whose handlers.
            until: the fact.
            rests: what waits without a due time may go on waiting.
        """
        stop = asyncio.Event()
        room = tables.inbox_waiting

        def is_calm() -> bool:
            with contextlib.suppress(OperationalError), self.engine.begin() as connection:
                while self.between:  # SQLite may be locked: then another time
                    connection.execute(self.between[-1])
                    self.between.pop()
                rows = select(func.count()).select_from(room)
                return not connection.scalar(rows.where(room.c.due_at.is_not(None)) if rests else rows) and until()
            return False

        inner = MemorySubscriber(self.exchange, consumer.subscription)
        subscriber = Until(inner, stop, is_calm)
        await consumer.run(subscriber, stop)
        return subscriber

    def relay(self) -> int:
        """Publishes what the outbox holds, as a relay would; returns how many."""
        outbox = tables.outbox_messages
        with self.engine.begin() as connection:
            rows = connection.execute(select(outbox).order_by(outbox.c.position)).all()
            for found in rows:
                row = Row.of(
                    position=found.position,
                    id=found.message_id,
                    topic=found.topic,
                    key=found.key,
                    type=found.type,
                    kind=found.kind,
                    payload=found.payload,
                    headers=found.headers,
                    recorded_at=found.recorded_at,
                    expires_at=None,
                )
                self.exchange.append(row.topic, row)
            connection.execute(outbox.delete())
        return len(rows)

    def count(self, table: Any) -> int:
        with self.engine.connect() as connection:
            return connection.execute(select(func.count()).select_from(table)).scalar_one()

    def rows(self, table: Any) -> Sequence[Any]:
        with self.engine.connect() as connection:
            return connection.execute(select(table)).all()

    def effects(self) -> list[int]:
        with self.engine.connect() as connection:
            return list(connection.scalars(select(Effect.number).order_by(Effect.id)))

    async def close(self) -> None:
        if self._async is not None:
            await self._async.dispose()
        self.engine.dispose()


def consumer(world: ConsumerFixture, name: str = "billing", **options: Any) -> Consumer:
    return Consumer(name, sessions=world.asynchronous, **{"retry": impatient(), **options})


def handles(
    billing: Consumer, fails: Any = lambda _number, _ctx: None, *, topic: str = "orders"
) -> list[tuple[int, int]]:
    """A handler that makes an effect and then asks `fails`; returns (number, attempt) of each call."""
    calls: list[tuple[int, int]] = []

    @billing.on(OrderPlaced, topic=topic)
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        calls.append((placed.number, ctx.attempt))
        session.add(Effect(message_id=ctx.id, number=placed.number))
        await session.flush()
        result = fails(placed.number, ctx)
        if result is not None:
            await result

    return calls


def letters(world: ConsumerFixture, **which: Any) -> list[DeadLetter]:
    with world.engine.connect() as connection:
        return find(connection, Filter(**which))


def raises_at(*calls: tuple[int, int]) -> Any:
    def fail(number: int, ctx: MessageContext) -> None:
        if (number, ctx.attempt) in calls:
            raise KeyError("secret-4711")

    return fail
