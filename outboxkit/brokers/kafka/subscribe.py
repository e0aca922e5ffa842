"""The way in from Kafka. One thread drives the consumer; the event loop never waits for it.

Invariants: no offset is committed past an unacknowledged delivery of its partition; what belonged to a partition that
was taken away commits nothing; while nobody receives, the partitions are paused and the consumer is polled: long
handlers do not cost the membership.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, TopicPartition

from outboxkit.brokers import CONTENT_ENCODING, REPLY_TO, Assignment, Delivery, text_of
from outboxkit.brokers.kafka.errors import Meaning, error_of, meaning_of
from outboxkit.brokers.kafka.lag import Lag
from outboxkit.brokers.kafka.login import SessionLogin, provable_settings
from outboxkit.brokers.kafka.progress import Progress, Token, place_of_delivery, token_of
from outboxkit.brokers.kafka.publish import FEATURES
from outboxkit.brokers.kafka.records import headers_of, place_of, timestamp_of
from outboxkit.brokers.kafka.start import begin
from outboxkit.brokers.kafka.topics import LookupFailed, Topics, open_client, prove, unknown
from outboxkit.errors import ConfigurationError, OutboxKitError, TransientBrokerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import timedelta

    from confluent_kafka import Message

    from outboxkit.brokers import Subscription
    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["KafkaSubscriber"]

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_PROOF_SECONDS: Final = 0.5  # an acknowledgement may wait behind it, once after the broker was away
_SLICE_SECONDS: Final = 0.05  # bounds how long an acknowledgement waits behind an idle receive
_KEEP_ALIVE_SECONDS: Final = 1.0
_LOOKUP_SECONDS: Final = 5.0
_RECREATION_SECONDS: Final = 30.0  # between two looks whether the topics are still the same


class KafkaSubscriber:
    """See `outboxkit.brokers.Subscriber`."""

    features = FEATURES

    def __init__(self, settings: Settings, subscription: Subscription) -> None:
        prove(Consumer, {**provable_settings(settings), **settings.subscriber, "group.id": "proof"})
        self._settings = settings
        self._subscription = subscription
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.assignment = Assignment()
        # What follows belongs to the thread.
        self._consumer: Consumer | None = None
        self._progress: dict[tuple[str, int], Progress] = {}
        self._paused: list[TopicPartition] = []
        self._trouble: OutboxKitError | None = None
        self._told: set[int] = set()  # codes that were logged because they are in no table
        self._away = False
        self._login = SessionLogin(settings)  # the consumer's
        self._topics = Topics(settings)
        self._ids: dict[str, str] = {}  # of the topics, as they were when we joined
        self._look_again_at = 0.0
        self._has_joined = self._joins_again = False
        self._lag, self._measure_at = Lag(self._topics), 0.0

    def __repr__(self) -> str:
        return f"KafkaSubscriber({self._settings.address}, {self._subscription.consumer})"

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        taken = self._submit(self._take, limit, timeout.total_seconds())
        try:
            return await asyncio.wrap_future(taken)
        except asyncio.CancelledError:
            # Nobody will ever acknowledge what this call brings. Not before it has ended: it does jobs while it waits.
            taken.add_done_callback(partial(self._submit, self._take_back))
            raise

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        await asyncio.wrap_future(self._submit(self._commit, deliveries))

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        await asyncio.wrap_future(self._submit(self._rewind, deliveries))

    async def declare(self, subscription: Subscription) -> Sequence[str]:
        names = (*subscription.topics, *subscription.queues)
        return await asyncio.to_thread(self._create, names)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        thread = self._thread
        if thread is not None:
            self._jobs.put(self._leave)
            await asyncio.to_thread(thread.join)

    def _create(self, names: Sequence[str]) -> Sequence[str]:
        topics = Topics(self._settings)
        try:
            return topics.create(names)
        except LookupFailed as error:
            raise error.seen_by_users() from error
        finally:
            topics.close()

    def _submit(self, job: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        outcome: Future[_Result] = Future()
        if self._closed:
            outcome.set_exception(TransientBrokerError("the subscriber is closed"))
            return outcome
        if self._thread is None:
            # A daemon: an abandoned subscriber must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="outboxkit-kafka-in", daemon=True)
            self._thread.start()
        self._jobs.put(partial(_resolve, outcome, partial(job, *arguments)))
        return outcome

    # From here on everything runs in the thread.

    def _run(self) -> None:
        while not self._closed or not self._jobs.empty():
            try:
                self._jobs.get(timeout=_KEEP_ALIVE_SECONDS)()
            except queue.Empty:
                self._keep_alive()
            self._measure()

    def _leave(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
            self._consumer = None
        self._topics.close()

    def _keep_alive(self) -> None:
        if self._consumer is None or not self._progress:
            return
        if not self._paused:
            self._paused = self._consumer.assignment()
            self._consumer.pause(self._paused)
        message = self._consumer.poll(0)
        if message is not None and message.error() is None:
            self._rewind([self._delivery(message)])  # fetched before the pause took effect

    def _measure(self) -> None:
        """Says now and then what is ours, and how far we are behind."""
        if self._consumer is None or not self._has_joined or time.monotonic() < self._measure_at:
            return
        self._measure_at = time.monotonic() + _KEEP_ALIVE_SECONDS
        places = {(partition.topic, partition.partition) for partition in self._consumer.assignment()}
        self.assignment = Assignment(len(places), self._lag.count(places, self._progress))

    def _take(self, limit: int, timeout_seconds: float) -> Sequence[Delivery]:
        consumer = self._joined()
        if self._paused:
            self._resume(consumer)
        deadline = time.monotonic() + timeout_seconds
        while True:
            self._login.renew(consumer)
            first = consumer.poll(max(0.0, min(_SLICE_SECONDS, deadline - time.monotonic())))
            if first is not None:  # before any trouble is raised: what was polled does not come again
                return self._handed_out(self._with_more(consumer, first, limit))
            self._look_whether_recreated(consumer)
            self._raise_trouble()
            if time.monotonic() >= deadline:
                self._prove_back(consumer)
                return ()
            self._run_waiting()

    def _with_more(self, consumer: Consumer, first: Message, limit: int) -> list[Message]:
        """Adds what the client has already, up to the bounds; chunks are as large as the mean size allows."""
        messages, size = [first], len(first.value() or b"")
        while len(messages) < limit and (room := self._settings.prefetch_bytes - size) > 0:
            fitting = room * len(messages) // (size + 1) + 1
            more = consumer.consume(min(limit - len(messages), fitting), timeout=0)
            if not more:
                break
            messages += more
            size += sum(len(message.value() or b"") for message in more)
        return messages

    def _prove_back(self, consumer: Consumer) -> None:
        """After the broker was away, silence may be emptiness or absence: only an answer tells."""
        if self._away:
            try:
                consumer.list_topics(timeout=_PROOF_SECONDS)
            except KafkaException as error:
                raise TransientBrokerError(f"Kafka at {self._settings.address} is away") from error
            self._away = False

    def _run_waiting(self) -> None:
        """Does what came in while this receive waits (no other receive: a subscriber has one reader)."""
        while True:
            try:
                self._jobs.get_nowait()()
            except queue.Empty:
                return

    def _resume(self, consumer: Consumer) -> None:
        mine = {(partition.topic, partition.partition) for partition in consumer.assignment()}
        still = [partition for partition in self._paused if (partition.topic, partition.partition) in mine]
        consumer.resume(still)
        self._paused = []

    def _handed_out(self, messages: Iterable[Message]) -> Sequence[Delivery]:
        deliveries = []
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_error(error)
                continue
            deliveries.append(self._delivery(message))
        if not deliveries:
            self._raise_trouble()
        return deliveries

    def _delivery(self, message: Message) -> Delivery:
        topic, partition, offset = place_of(message)
        progress = self._progress.setdefault((topic, partition), Progress())
        headers, fault = headers_of(message)
        return Delivery(
            topic=topic,
            key=message.key(),
            headers=headers,
            payload=message.value(),
            partition=partition,
            offset=offset,
            timestamp=timestamp_of(message),
            reply_to=text_of(headers, REPLY_TO),
            content_encoding=text_of(headers, CONTENT_ENCODING),
            fault=fault,
            origin=f"{topic}[{partition}]@{offset}",
            token=Token(progress, progress.hand_out(offset)),
        )

    def _take_back(self, taken: Future[Sequence[Delivery]]) -> None:
        if not taken.cancelled() and taken.exception() is None:
            self._rewind(taken.result())

    def _commit(self, deliveries: Sequence[Delivery]) -> None:
        touched = {}
        for delivery in deliveries:
            progress, lap = token_of(delivery)
            place, offset = place_of_delivery(delivery)
            if self._progress.get(place) is progress and progress.settle(offset, lap):
                touched[place] = progress
        offsets = [TopicPartition(topic, number, progress.position) for (topic, number), progress in touched.items()]
        if not offsets or self._consumer is None:
            return
        try:
            # Not in blocking mode: that may wait for a rebalance, which waits for this thread to poll, for ever.
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._committed(error.args[0], ())

    def _committed(self, error: KafkaError | None, offsets: Sequence[TopicPartition]) -> None:
        """Hears at a poll what came of a commit. What was not taken comes again, and the inbox knows it."""
        for failed in filter(None, (error, *(one.error for one in offsets))):
            if meaning_of(failed) is Meaning.MOVED:
                _log.info("consumer.commit_after_rebalance", extra={"consumer": self._subscription.consumer})
            else:
                trouble = error_of(failed, self._settings.address, self._subscription.consumer)
                words = f"Kafka did not take the offsets: {failed.str()} ({failed.name()})"
                self._trouble = trouble or TransientBrokerError(words)

    def _rewind(self, deliveries: Sequence[Delivery]) -> None:
        lowest: dict[tuple[str, int], int] = {}
        for delivery in deliveries:
            place, offset = place_of_delivery(delivery)
            if self._progress.get(place) is token_of(delivery).progress:
                lowest[place] = min(offset, lowest.get(place, offset))
        for (topic, partition), offset in lowest.items():
            self._progress[topic, partition].rewind(offset)
            self._seek(topic, partition, offset)

    def _seek(self, topic: str, partition: int, offset: int) -> None:
        if self._consumer is None:
            return
        try:
            self._consumer.seek(TopicPartition(topic, partition, offset))
        except KafkaException:  # no longer ours: the new owner reads from the committed offset
            self._progress.pop((topic, partition), None)

    def _joined(self) -> Consumer:
        if self._consumer is not None and self._joins_again:
            self._consumer.close()
            self._consumer = None
        if self._consumer is None:
            self._joins_again = False
            names = [*self._subscription.topics, *self._subscription.queues]
            self._require(names)
            consumer = open_client(Consumer, self._configuration())
            consumer.subscribe(names, on_assign=self._assigned, on_revoke=self._forget, on_lost=self._forget)
            self._consumer = consumer
        return self._consumer

    def _look_whether_recreated(self, consumer: Consumer) -> None:
        """Reads a topic from its beginning when it was deleted and created again: the old position is of no use."""
        if time.monotonic() < self._look_again_at:
            return
        self._look_again_at = time.monotonic() + _RECREATION_SECONDS
        found = self._topics.ids(list(self._ids))
        again = {name for name, found_id in found.items() if found_id != self._ids[name]}
        self._ids.update(found)
        if not again:
            return
        facts = {"consumer": self._subscription.consumer, "topics": sorted(again)}
        _log.warning("consumer.topic_created_again", extra=facts)
        for partition in consumer.assignment():
            if partition.topic in again:
                self._progress.pop((partition.topic, partition.partition), None)
                self._seek(partition.topic, partition.partition, OFFSET_BEGINNING)

    def _require(self, names: Sequence[str]) -> None:
        try:
            missing = self._topics.look_up(names, _LOOKUP_SECONDS)
            self._ids = self._topics.ids(sorted(set(names) - missing))
        except LookupFailed as error:
            raise error.seen_by_users() from error
        self._look_again_at = time.monotonic() + _RECREATION_SECONDS
        if missing:
            raise ConfigurationError("; ".join(map(unknown, sorted(missing))))

    def _configuration(self) -> Mapping[str, object]:
        return {
            "queued.max.messages.kbytes": max(1, self._settings.prefetch_bytes // 1024),
            **self._login.begin(),
            "auto.offset.reset": "earliest",
            "partition.assignment.strategy": "cooperative-sticky",
            **self._settings.subscriber,
            "group.id": self._subscription.consumer,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "allow.auto.create.topics": False,
            "error_cb": self._on_error,
            "on_commit": self._committed,
        }

    def _assigned(self, consumer: Consumer, partitions: Sequence[TopicPartition]) -> None:
        try:
            begin(consumer, partitions, self._subscription.start)
        except KafkaException as error:
            consumer.incremental_assign([])  # not these: they would be read from their beginning
            self._trouble = TransientBrokerError(f"Kafka did not say where to begin: {error.args[0].str()}")
            self._joins_again = True
        else:
            self._has_joined, self._measure_at = True, 0.0  # also when there are fewer partitions than members

    def _forget(self, _: Consumer, partitions: Sequence[TopicPartition]) -> None:
        for partition in partitions:
            self._progress.pop((partition.topic, partition.partition), None)

    def _on_error(self, error: KafkaError) -> None:
        meaning = meaning_of(error)
        if meaning is Meaning.LOGIN and self._login.is_renewable():
            self._trouble = TransientBrokerError(f"Kafka at {self._settings.address} wants the new password")
            return
        if meaning is Meaning.MISSING:
            self._look_again_at = 0.0
        trouble = error_of(error, self._settings.address, self._subscription.consumer)
        if trouble is not None:
            self._trouble = trouble
        elif meaning is Meaning.UNKNOWN and error.code() not in self._told:
            self._told.add(error.code())
            facts = {"consumer": self._subscription.consumer, "code": error.code(), "code_name": error.name()}
            _log.warning("consumer.broker_error", extra={**facts, "error": error.str()})

    def _raise_trouble(self) -> None:
        trouble, self._trouble = self._trouble, None
        if trouble is not None:
            self._away = self._away or isinstance(trouble, TransientBrokerError)
            raise trouble


def _resolve(outcome: Future[_Result], job: Callable[[], _Result]) -> None:
    if not outcome.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except BaseException as error:  # noqa: BLE001  it belongs to the caller, who waits in another thread
        outcome.set_exception(error)
    else:
        outcome.set_result(result)
