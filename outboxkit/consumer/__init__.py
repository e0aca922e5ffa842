"""The consumer: receives deliveries, handles each once in a transaction of its own, and gives up on none silently.

A batch goes this way: marker → lanes by key → per message one transaction (`outboxkit.consumer.process`) → what
failed waits (`outboxkit.consumer.retries`) or is buried (`outboxkit.dead_letters`) → acknowledge → marker away.
Nothing is acknowledged before the database has committed what became of it. Trouble with the database spends no
attempt: the same step is tried again.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar
from uuid import uuid4

from outboxkit import brokers, dead_letters, outbox, policy, schema_store
from outboxkit._failpoints import failpoint
from outboxkit.brokers import Delivery, Subscriber, Subscription
from outboxkit.consumer import retries
from outboxkit.consumer.handlers import Handlers, MessageContext, Want
from outboxkit.consumer.order_check import OrderCheck
from outboxkit.consumer.process import Failed, HandleOnce, HandlerLookup, Job, Result, Try, failure_of, job_of
from outboxkit.consumer.retries import FailedAttempt, Marker, OrderingKey, WaitingDelivery
from outboxkit.consumer.transactions import (
    RetryOnDatabaseTrouble,
    Stopped,
    Transactions,
    TransactionScope,
    backoff_delay,
)
from outboxkit.dead_letters import DeadLetter, Stage, topic_copy
from outboxkit.dead_letters.topic_copy import DeadLetterTopic
from outboxkit.dialects import DatabaseTrouble
from outboxkit.errors import ConfigurationError, OutboxKitError, TransientBrokerError
from outboxkit.events import EventType, event_type
from outboxkit.message import Kind, Message
from outboxkit.policy import Failure, RetryPolicy, duration
from outboxkit.schema_store import Reader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

__all__ = ["Consumer", "MessageContext"]

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_log: Final = logging.getLogger(__name__)

MAX_DEATHS: Final = 3  #: processes that a message may take with it before it is buried
BATCH: Final = 500  #: deliveries under one marker
IDLE: Final = timedelta(milliseconds=200)  #: how long to wait for deliveries before looking at stop and due retries
LEASE: Final = timedelta(seconds=5)  #: of the marker; below every broker's session time-out
_AWAY: Final = 5  # a broker that is away is asked about once a second
_ROUNDS: Final = 20  # of due retries between two looks at the broker


class Consumer:
    """Handlers under one name, with one inbox.

    Args:
        name: who handles: part of the inbox key, Kafka group id, part of the RabbitMQ queue's name.
        sessions: an ``async_sessionmaker`` for coroutine handlers, a ``sessionmaker`` for plain ones.
        retry: how patient to be with a message that fails.
        timeout: for one call of a handler; a plain function cannot be interrupted, but is rolled back afterwards.
        concurrency: how many keys are handled at the same time.
        ordering: ``key`` keeps the order of each key; ``none`` handles every message by itself.
        resolve: schema text for a fingerprint that the database does not know.
        message_id: finds the id of a foreign message without one.
        check_order: log and count (``out of order``) each message that takes effect after a later one of its key.
        copy_to: also copy dead letters to this topic, through the outbox: a topic, or a `DeadLetterTopic` with a header
            style.
    """

    def __init__(
        self,
        name: str,
        *,
        sessions: sessionmaker[Session] | async_sessionmaker[AsyncSession],
        retry: RetryPolicy | None = None,
        timeout: timedelta | str = "30s",
        concurrency: int = 16,
        ordering: Literal["key", "none"] = "key",
        resolve: Callable[[str], str] | None = None,
        message_id: Callable[[Message], str] | None = None,
        check_order: bool = False,
        copy_to: DeadLetterTopic | str | None = None,
    ) -> None:
        if not name or concurrency < 1:
            raise ConfigurationError(
                f"a consumer needs a name and a concurrency from 1, got {name!r} and {concurrency}"
            )
        self.name, self.sessions, self.retry = name, sessions, retry or RetryPolicy()
        self.concurrency, self.ordering, self.message_id = concurrency, ordering, message_id
        self.copy_to = DeadLetterTopic(copy_to) if isinstance(copy_to, str) else copy_to
        self.handling = HandleOnce(consumer=name, timeout=duration(timeout), resolve=resolve, schemas={})
        self.sequences = OrderCheck() if check_order else None
        self.handlers = Handlers()
        self.dead_letter_hooks: dict[str, Callable[[DeadLetter], Any]] = {}
        self.counts: Counter[str] = Counter()
        self.queues: tuple[str, ...] = ()
        self.topics: tuple[str, ...] = ()

    def on(self, what: type | EventType | str, *, topic: str = "", queue: str = "") -> Callable[[F], F]:
        """Registers a handler for an event class, or for a pattern of type names (``order.*``, it gets the `Message`).

        Args:
            what: the event class or the pattern.
            topic: where its events come from.
            queue: or where its commands come from.

        Raises:
            ConfigurationError: not exactly one source, a second handler for a type, or parameters nobody can give.
        """
        if bool(topic) == bool(queue):
            raise ConfigurationError("a handler listens to one topic or to one queue: give topic=… or queue=…")

        def register(function: F) -> F:
            contract = event_type(what) if isinstance(what, type) else what
            handler = self.handlers.add(function, topic or queue, contract)
            wants = {want for _, want in handler.wants}
            if not Transactions.is_async(self.sessions) and (
                inspect.iscoroutinefunction(function) or Want.ASYNC_SESSION in wants
            ):
                raise ConfigurationError(
                    f"{function.__qualname__} is a coroutine or wants an AsyncSession: give an async_sessionmaker"
                )
            self.topics = tuple(dict.fromkeys((*self.topics, topic))) if topic else self.topics
            self.queues = tuple(dict.fromkeys((*self.queues, queue))) if queue else self.queues
            return function

        return register

    def on_dead_letter(self, what: type | EventType) -> Callable[[F], F]:
        """Registers what to do when a message of this type has died: called once, after the commit, best effort."""

        def register(function: F) -> F:
            self.dead_letter_hooks[(event_type(what) if isinstance(what, type) else what).name] = function
            return function

        return register

    @property
    def subscription(self) -> Subscription:
        """Who reads what."""
        return Subscription(consumer=self.name, topics=self.topics, queues=self.queues)

    async def run(
        self,
        broker: str | Subscriber,
        stop: asyncio.Event | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Handles messages until ``stop`` is set; the batch at hand is finished first.

        Guarantee: what was not acknowledged comes again; what was has its effect, waits or is a dead letter.

        Raises:
            ConfigurationError: the tables are missing, the login was refused, or a topic or queue is missing.
        """
        subscriber = brokers.open_subscriber(broker, self.subscription, options) if isinstance(broker, str) else broker
        try:
            await _Run(self, subscriber, stop or asyncio.Event()).work()
        except BaseExceptionGroup as group:
            _, others = group.split(Stopped)
            if others is not None:
                raise _first(others) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


class _Run:
    """One run of a consumer."""

    def __init__(self, consumer: Consumer, subscriber: Subscriber, stop: asyncio.Event) -> None:
        self.consumer, self.subscriber, self.stop = consumer, subscriber, stop
        self.recipient = HandlerLookup(name=consumer.name, handlers=consumer.handlers, message_id=consumer.message_id)
        self.transactions = Transactions(consumer.sessions, consumer.concurrency + 2)
        self.patience = RetryOnDatabaseTrouble(self.transactions, consumer.name, stop)
        self.marker = Marker(uuid4(), consumer.name, LEASE)
        self.slots = asyncio.Semaphore(consumer.concurrency)
        self.rng = random.Random()  # noqa: S311  jitter needs no secrecy
        self.suspects: dict[str, int] = {}
        self.keys_waiting: set[OrderingKey] = set()
        self.readers: dict[str, Reader] = {}
        self.is_cut_off = False

    # --- the loop ------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Runs until stopped."""
        try:
            await self._start()
            while not self.stop.is_set():
                more = await self._retry_due()
                if deliveries := await self._receive(timedelta(0) if more else IDLE):
                    await self._fresh(deliveries)
        finally:
            await self.subscriber.close()
            self.transactions.close()

    async def _start(self) -> None:
        def start(given: TransactionScope) -> dict[str, Reader]:
            outbox.shards_of(given.session.connection())
            retries.suspects(given.session, self.marker, starting=True)
            retries.sweep(given.session, self.consumer.name)
            return schema_store.record(given.session.connection(), self.consumer.name, self.consumer.handlers.contracts)

        self.readers = await self.patience.run(start)
        _log.info("consumer.started", extra={"consumer": self.consumer.name, "topics": self.consumer.topics})

    async def _receive(self, timeout: timedelta) -> Sequence[Delivery]:
        try:
            deliveries = await self.subscriber.receive(BATCH, timeout)
        except TransientBrokerError as error:
            self._cut_off(error)
            await self.patience.wait(backoff_delay(DatabaseTrouble.DOWN, _AWAY, self.rng))
            return ()
        if self.is_cut_off:
            self.is_cut_off = False
            _log.info("consumer.broker_back", extra={"consumer": self.consumer.name})
        return deliveries

    def _cut_off(self, error: TransientBrokerError) -> None:
        if not self.is_cut_off:
            _log.warning("consumer.broker_away", extra={"consumer": self.consumer.name, "error": error.message})
        self.is_cut_off = True

    async def _acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Tells the broker; one that is away hands them out again, and the inbox knows them."""
        failpoint("ack.before")
        try:
            await self.subscriber.acknowledge(deliveries)
        except TransientBrokerError as error:
            self._cut_off(error)
        failpoint("ack.after")

    async def _retry_due(self) -> bool:
        """Works off what is due; whether there may be more."""
        for _ in range(_ROUNDS):
            due = await self.patience.run(lambda given: retries.due(given.session, self.consumer.name, BATCH))
            if not due or self.stop.is_set():
                return False
            await self._batch([[self._job(waiting.delivery, waiting)] for waiting in due])
        return True

    async def _fresh(self, deliveries: Sequence[Delivery]) -> None:
        failpoint("recv")
        lanes: dict[object, list[Job]] = {}
        for delivery in deliveries:
            alone = delivery.key is None or self.consumer.ordering == "none"
            lanes.setdefault(object() if alone else (delivery.topic, delivery.key), []).append(self._job(delivery))
        await self._batch(list(lanes.values()))
        await self._acknowledge(deliveries)

    def _job(self, delivery: Delivery, waiting: WaitingDelivery | None = None) -> Job:
        return job_of(delivery, waiting, self.recipient)

    # --- a batch -------------------------------------------------------------------------------------------------

    async def _batch(self, lanes: list[list[Job]]) -> None:
        """Settles every job: handled, waiting or buried, and committed."""
        jobs = [job for lane in lanes for job in lane]
        await self._open(jobs)
        failpoint("attempt.recorded")
        if any(job.identity in self.suspects or job.delivery.redelivered for job in jobs):
            await self._one_by_one(jobs)
        else:
            async with self._renewing(), asyncio.TaskGroup() as group:
                for lane in lanes:
                    group.create_task(self._in_slot(lane))
        await self.patience.run(lambda given: retries.unmark(given.session, self.marker))

    async def _open(self, jobs: Sequence[Job]) -> None:
        lanes = {_lane(job.delivery) for job in jobs if job.waiting is None and self.consumer.ordering == "key"}

        def open_batch(given: TransactionScope) -> tuple[dict[str, int], set[OrderingKey]]:
            suspects = retries.suspects(given.session, self.marker)
            # Suspects get markers of their own: a death must not count against the others of the batch.
            if not any(job.identity in suspects or job.delivery.redelivered for job in jobs):
                retries.mark(given.session, self.marker, [job.identity for job in jobs])
            return suspects, retries.keys_waiting(given.session, self.consumer.name, lanes)

        self.suspects, self.keys_waiting = await self.patience.run(open_batch)

    async def _one_by_one(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            deaths = self.suspects.get(job.identity, 0)
            if deaths >= MAX_DEATHS:
                error = OutboxKitError(f"the process died {deaths} times while handling it")
                await self._bury(job, Failed(Failure.CRASH, Stage.HANDLER, error), deaths)
            else:
                await self.patience.run(_for(job, lambda given, name: retries.mark(given.session, self.marker, [name])))
                async with self._renewing():
                    await self._in_slot([job])
            if deaths:
                await self.patience.run(
                    _for(job, lambda given, name: retries.clear(given.session, self.marker, [name]))
                )

    async def _in_slot(self, lane: list[Job]) -> None:
        async with self.slots:
            await self._in_order(lane)

    async def _in_order(self, lane: list[Job]) -> None:
        """Handles jobs of one key, in order, until one must wait: then the later ones wait behind it."""
        if lane[0].waiting is None and _lane(lane[0].delivery) in self.keys_waiting:
            await self._append(lane)
            return
        for index, job in enumerate(lane):
            held = await self._settle(job)
            if held is not None:
                await self._hold(job, held, lane[index + 1 :])
                return

    async def _append(self, lane: Sequence[Job]) -> None:
        name, key = self.consumer.name, _lane(lane[0].delivery)
        await self.patience.run(lambda given: retries.append(given.session, name, [job.delivery for job in lane]))
        await self.patience.run(lambda given: retries.promote(given.session, name, key))
        self.consumer.counts["followed"] += len(lane)

    async def _hold(self, job: Job, held: FailedAttempt, followers: Sequence[Job]) -> None:
        name = self.consumer.name

        def hold(given: TransactionScope) -> None:
            if job.waiting is not None:
                retries.postpone(given.session, job.waiting, held)
            else:
                retries.defer(given.session, name, job.delivery, held)
                retries.append(given.session, name, [follower.delivery for follower in followers])

        await self.patience.run(hold)
        failpoint("retry.scheduled")
        if job.delivery.key is not None and self.consumer.ordering == "key":
            self.keys_waiting.add(_lane(job.delivery))
        self.consumer.counts["retried"] += 1
        self._say("message.waits", job, attempts=held.attempts, error=held.error, delay=held.delay.total_seconds())

    # --- one message ---------------------------------------------------------------------------------------------

    async def _settle(self, job: Job) -> FailedAttempt | None:
        """Handles or buries a job, with its immediate retries; or says that it must wait."""
        retry = self.consumer.retry
        number = job.waiting.attempts + 1 if job.waiting else 1
        while (failed := await self._attempt(job, number)) is not None:
            # A consumer's message is never refused for another one's sake: what is final is final at once.
            spent = max(number, 2) if failed.failure.is_final else number
            now = datetime.now(UTC)
            match policy.verdict(failed.failure, spent, retry, now, self.rng):
                case policy.Retry(at):
                    if number > retry.immediate or failed.delay is not None:
                        delay = failed.delay or max(at - now, retry.delayed.delay(1, self.rng))
                        return FailedAttempt(delay, number, dead_letters.words_of(failed.error))
                case _:
                    await self._bury(job, failed, number)
                    return None
            number += 1
        return None

    async def _attempt(self, job: Job, number: int) -> Failed | None:
        tried = Try(job, number)
        if job.handler is None and job.unreadable is None and job.waiting is None:
            self.consumer.counts[Result.IGNORED] += 1
            return None
        try:
            result = await self.patience.run(lambda given: self.consumer.handling.attempt(given, tried), tried.gives_up)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  the boundary around the user's handler
            return failure_of(error, tried.stage, self.consumer.retry.poison_classes)
        failpoint("commit.after")
        self.consumer.counts[result] += 1
        if result is Result.HANDLED and job.message is not None:
            self._check_order(job.message)
        return None

    def _check_order(self, message: Message) -> None:
        check = self.consumer.sequences
        if check is not None and (later := check.handled(message)) is not None:
            self.consumer.counts["out of order"] += 1
            fields = {"message_id": message.id, "topic": message.topic, "sequence": message.sequence, "after": later}
            _log.warning("message.out_of_order", extra={"consumer": self.consumer.name, **fields})

    async def _bury(self, job: Job, failed: Failed, number: int) -> None:
        letter = self._letter(job, failed, number)
        failpoint("dlq.before")

        def bury(given: TransactionScope) -> DeadLetter | None:
            connection = given.session.connection()
            if job.waiting is not None and not retries.remove(given.session, self.consumer.name, job.waiting):
                return None
            writer = self.consumer.handling.schemas.get(letter.writer_schema)
            if writer is not None:  # so that a replay can judge without a registry
                schema_store.remember_writer(
                    connection, self.consumer.name, letter.type, (letter.writer_schema, writer)
                )
            stored = dead_letters.bury(connection, letter)
            if stored is not None and self.consumer.copy_to is not None:
                topic_copy.write(connection, stored, job.delivery, self.consumer.copy_to, writer=writer or "")
            return stored

        buried = await self.patience.run(bury)
        failpoint("dlq.after")
        if buried is not None:
            self.consumer.counts["buried"] += 1
            self._say("message.dead", job, attempts=number, failure=failed.failure.value, error=letter.error)
            await self._run_hook(buried)

    def _letter(self, job: Job, failed: Failed, number: int) -> DeadLetter:
        letter = dead_letters.of_delivery(
            job.delivery,
            job.message,
            consumer=self.consumer.name,
            kind=(Kind.COMMAND if job.delivery.topic in self.consumer.queues else Kind.EVENT).value,
            failure=failed.failure,
            stage=failed.stage,
            error=failed.error,
            attempts=number,
        )
        first, (reader, text) = (
            job.waiting.first_failed_at if job.waiting else None,
            self.readers.get(letter.type, ("", "")),
        )
        schemas = self.consumer.handling.schemas  # known if decoding came so far, maybe under a registry's id
        writer = schemas.get(letter.writer_schema, "")
        name = schema_store.fingerprint_of(writer) if writer else letter.writer_schema
        schemas |= {name: writer} if writer else {}
        problems = schema_store.problems(text, writer) if text and writer and failed.stage is Stage.DECODE else None
        return replace(letter, first_failed_at=first, writer_schema=name, reader_schema=reader, problems=problems)

    async def _run_hook(self, letter: DeadLetter) -> None:
        mourner = self.consumer.dead_letter_hooks.get(letter.type)
        if mourner is None:
            return
        try:
            result = mourner(letter)
            if inspect.isawaitable(result):
                await asyncio.wait_for(result, self.consumer.handling.timeout.total_seconds())
        except Exception as error:  # noqa: BLE001  the user's function: the letter is stored, whatever it does
            _log.warning(
                "consumer.dead_letter_hook_failed",
                extra={"letter": str(letter.id), "error": dead_letters.words_of(error)},
            )

    # --- alive and telling ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _renewing(self) -> AsyncIterator[None]:
        """Keeps the marker alive while handlers run."""
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(self._renew())
            try:
                yield
            finally:
                renewal.cancel()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            await self.patience.run(lambda given: retries.renew(given.session, self.marker))

    def _say(self, event: str, job: Job, **facts: object) -> None:
        message = job.message
        about = {"consumer": self.consumer.name, "topic": job.delivery.topic, "origin": job.delivery.origin}
        _log.warning(event, extra=about | {"message_id": message.id if message else "", **facts})


def _lane(delivery: Delivery) -> OrderingKey:
    return delivery.topic, delivery.key


def _for(job: Job, step: Callable[[TransactionScope, str], None]) -> Callable[[TransactionScope], None]:
    return lambda given: step(given, job.identity)
