"""Delivers events to a consumer in a test: the real inbox, the real handler, a broker in memory, no waiting.

The consumer is run as it is, with three differences: its sessions lead to the test's database, one key is handled at
a time, and delays between retries are skipped.
"""

from __future__ import annotations

import itertools
from asyncio import Event, sleep, to_thread
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from sqlalchemy import Engine, NullPool, func, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from outboxkit import dead_letters, outbox, tables
from outboxkit._sql import database_now
from outboxkit.brokers.memory import Exchange, MemorySubscriber
from outboxkit.codecs import codec_named
from outboxkit.consumer.observe.stats import Tally
from outboxkit.consumer.process import Result
from outboxkit.consumer.run import Run
from outboxkit.dead_letters import DeadLetter
from outboxkit.errors import ConfigurationError
from outboxkit.events import event_type
from outboxkit.headers import pack_headers, wire_headers
from outboxkit.message import Kind, Message
from outboxkit.rows import Row
from outboxkit.testing import crashes
from outboxkit.testing.emitted import is_unfinished

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

    from outboxkit.brokers import Delivery, Subscription
    from outboxkit.consumer import Consumer, ConsumerConfig

__all__ = ["ConsumerHarness", "asynchronous"]

_SOURCE: Final = "urn:test"
_AT_ONCE: Final = timedelta(0)
_BREATH: Final = 0.001  # seconds
_LONG_DUE: Final = timedelta(seconds=-1)
_MAX_ROUNDS: Final = 200  # of retries in one delivery: a policy without an end must not hang the test
_ASYNC_DRIVERS: Final = {"sqlite": "sqlite+aiosqlite"}


class ConsumerHarness:
    """Delivers events to consumers and counts what became of them.

    Args:
        engine: of the test's database, with the outbox tables and the application's.
        session: the test's own session: what it has not committed would be in the consumer's way.
    """

    def __init__(self, engine: Engine, session: Session | None = None) -> None:
        self._engine, self._session = engine, session
        self._counts: Counter[str] = Counter()
        self._schemas: dict[str, str] = {}
        self._positions = itertools.count(1)

    @property
    def handled(self) -> int:
        """Deliveries that had their effect."""
        return self._counts[Result.HANDLED]

    @property
    def duplicates(self) -> int:
        """Deliveries that the inbox knew already."""
        return self._counts[Result.DUPLICATE]

    @property
    def retried(self) -> int:
        """Failed attempts that were put off; immediate retries are not counted."""
        return self._counts["retried"]

    @property
    def dead(self) -> list[DeadLetter]:
        """The dead letters, the newest first.

        Transaction: opens its own; only reads.
        """
        with self._engine.connect() as connection:
            return list(dead_letters.find(connection, dead_letters.Filter()))

    async def deliver(
        self,
        event: object,
        *,
        consumer: Consumer,
        times: int = 1,
        key: str | bytes | None = None,
        topic: str = "",
        headers: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Delivers one message, ``times`` times under the same id, and returns when it is handled or dead.

        Transaction: the consumer opens its own, in the test's database.

        Args:
            event: an event, or a `Message` (one of ``outbox.messages``, or a broken one).
            consumer: who gets it.
            times: how often.
            key: the ordering key; a `Message` has its own.
            topic: where from; may be left out when the consumer handles the type from one topic or queue only.
            headers: added to the message.

        Raises:
            ConfigurationError: nobody handles it, or the test's session holds changes that are not committed.
            AssertionError: retries do not end.
        """
        if self._session is not None and is_unfinished(self._session):
            raise ConfigurationError("the outbox_session has changes that are not committed: commit() before deliver()")
        message = event if isinstance(event, Message) else self._message(event, key, headers or {})
        message = _addressed(message, consumer, topic)
        exchange = Exchange()  # a new one: another consumer would get what was delivered to the first
        for _ in range(times):
            exchange.append(message.topic, self._row(message))
        twin, stop = self._twin(consumer.config), Event()
        await Run(twin, _Draining(exchange, twin.subscription, self._engine, stop), stop, _AT_ONCE).work()

    async def assert_one_effect(
        self,
        event: object,
        *,
        consumer: Consumer,
        effects: Callable[[], int],
        key: str | bytes | None = None,
        topic: str = "",
    ) -> None:
        """Asserts that a message has its effect once, though it comes twice, and though the consumer crashes.

        The event is delivered as several messages: once; twice; and, for each place of `crashes.CRASH_POINTS`, again
        after a crash there. Each must add as many effects, and as many messages to the outbox, as the first one.

        Transaction: the consumer opens its own, in the test's database.

        Args:
            event: an event.
            consumer: who gets it.
            effects: counts the effects so far: rows of a table, calls that a fake has noted.
            key: the ordering key.
            topic: where from; see `deliver`.

        Raises:
            AssertionError: names each place after which the counts differ.
            ConfigurationError: as `deliver`.
        """
        messages = [self._message(event, key, {}) for _ in range(2 + len(crashes.CRASH_POINTS))]
        messages = [_addressed(message, consumer, topic) for message in messages]
        await crashes.assert_one_effect(self, self._engine, messages, consumer=consumer, effects=effects)

    def _twin(self, config: ConsumerConfig) -> ConsumerConfig:
        policy = replace(config.policy, concurrency=1)
        sessions = self._sessions(config.sessions)
        return replace(
            config, sessions=sessions, policy=policy, tally=Tally(counts=self._counts), schemas=self._schemas
        )

    def _sessions(
        self, theirs: sessionmaker[Session] | async_sessionmaker[AsyncSession]
    ) -> sessionmaker[Session] | async_sessionmaker[AsyncSession]:
        """The consumer's kind of sessions, with its options, on the test's database."""
        options = {name: value for name, value in theirs.kw.items() if name not in ("bind", "binds")}
        if not isinstance(theirs, async_sessionmaker):
            return sessionmaker(self._engine, class_=theirs.class_, **options)
        return async_sessionmaker(asynchronous(self._engine), class_=theirs.class_, **options)

    def _message(self, event: object, key: str | bytes | None, headers: Mapping[str, str | bytes]) -> Message:
        contract = event_type(event)
        codec = codec_named(contract.codec)
        encoded = codec.encode(event, contract)
        if encoded.schema:
            self._schemas[encoded.schema] = codec.schema_text(contract) or ""
        return Message(
            id=str(uuid4()),
            type=contract.name,
            topic="",
            key=key.encode() if isinstance(key, str) else key,
            payload=encoded.payload,
            content_type=encoded.content_type,
            schema=encoded.schema,
            dataschema=contract.dataschema,
            source=_SOURCE,
            occurred_at=datetime.now(UTC),
            headers=tuple((name, _bytes(value)) for name, value in headers.items()),
        )

    def _row(self, message: Message) -> Row:
        return Row.of(
            position=next(self._positions),
            id=outbox.stored_id(message.id),
            topic=message.topic,
            key=message.key,
            type=message.type,
            kind=message.kind,
            payload=message.payload,
            headers=pack_headers(wire_headers(replace(message, recorded_at=None))),
            recorded_at=message.recorded_at or datetime.now(UTC),
            expires_at=None,
        )


def asynchronous(engine: Engine) -> AsyncEngine:
    """An engine for coroutines on the same database. It keeps no connections, so that nobody has to dispose of it.

    Raises:
        ConfigurationError: the driver is not installed.
    """
    driver = _ASYNC_DRIVERS.get(engine.url.get_backend_name(), engine.url.drivername)
    try:
        return create_async_engine(engine.url.set(drivername=driver), poolclass=NullPool)
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{driver} needs {error.name}: pip install 'outboxkit[sqlite]'") from error


class _Draining(MemorySubscriber):
    """Stops the consumer when nothing is left; what waits for its next try is due at once."""

    def __init__(self, source: Exchange, subscription: Subscription, engine: Engine, stop: Event) -> None:
        super().__init__(source, subscription)
        self._engine, self._stop, self._rounds, self._in_hand = engine, stop, 0, 0

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        del timeout  # whatever will come is there already
        found = await super().receive(limit, _AT_ONCE)
        self._in_hand += len(found)
        # In a thread: an open transaction of a handler may need this loop to end, and SQLite has one writer.
        if not found and not self._in_hand and not await to_thread(self._make_due):
            self._stop.set()
        await sleep(_BREATH)  # so that what is in hand is handled meanwhile
        return found

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await super().acknowledge(deliveries)
        self._in_hand -= len(deliveries)

    def _make_due(self) -> int:
        """Ends all delays; how many deliveries wait."""
        waiting = tables.inbox_waiting
        mine = waiting.c.consumer == self._consumer
        with self._engine.begin() as connection:
            count = connection.execute(select(func.count()).select_from(waiting).where(mine)).scalar_one()
            if count:
                due = {"due_at": database_now(_LONG_DUE)}
                later = waiting.c.due_at > database_now()
                self._rounds += connection.execute(update(waiting).where(mine, later).values(due)).rowcount > 0
        if self._rounds > _MAX_ROUNDS:
            raise AssertionError(f"{self._consumer}: {count} deliveries still wait after {_MAX_ROUNDS} retries")
        return count


def _addressed(message: Message, consumer: Consumer, topic: str) -> Message:
    places = list(dict.fromkeys(h.topic for h in consumer.config.handlers if fnmatchcase(message.type, h.pattern)))
    topic = topic or (message.topic if message.topic in places else "")
    if not topic and len(places) > 1:
        raise ConfigurationError(f"{consumer.name} handles {message.type} from {', '.join(places)}: give topic=…")
    if not places or (topic and topic not in places):
        known = ", ".join(f"{handler.pattern} from {handler.topic}" for handler in consumer.config.handlers)
        raise ConfigurationError(
            f"{consumer.name} does not handle {message.type}{f' from {topic}' if topic else ''}; it handles "
            f"{known or 'nothing'}"
        )
    found = topic or places[0]
    return replace(message, topic=found, kind=Kind.COMMAND if found in consumer.subscription.queues else Kind.EVENT)


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
