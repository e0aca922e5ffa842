"""The way out to Kafka. One thread owns the producer: it looks topics up, produces, and resolves one future per batch.

Invariants: nothing is produced to a topic that was not seen; no message is produced that its topic refuses by size;
librdkafka never gives up a message by itself, so what a partition takes is a gapless prefix of what was produced.
After `Failure.INDETERMINATE` the caller calls `reset` before it sends again: what was produced cannot be recalled.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException, Producer

from outboxkit.brokers import Features, Refusal
from outboxkit.brokers._in_flight import InFlight, OwnThread, Pending, unsendable
from outboxkit.brokers.kafka.errors import login_trouble
from outboxkit.brokers.kafka.login import SessionLogin, provable_settings
from outboxkit.brokers.kafka.topics import LookupFailed, Topics, open_client, prove, unknown
from outboxkit.errors import ConfigurationError
from outboxkit.headers import outgoing_columns
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from concurrent.futures import Future
    from datetime import timedelta

    from confluent_kafka import Message

    from outboxkit.brokers import Batch, Receipts
    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["FEATURES", "KafkaPublisher", "failure_of"]

_log = logging.getLogger(__name__)

FEATURES: Final = Features(name="kafka", order=Order.PIPELINED, evidence=True, max_message_bytes=1_048_588)

# What a delivery report means. Codes that are not here: the broker's own (positive) reject the message, librdkafka's
# (negative) leave it open whether it was stored.
_FAILURES: Final[Mapping[int, Failure]] = {
    KafkaError.MSG_SIZE_TOO_LARGE: Failure.TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE: Failure.TOO_LARGE,
    KafkaError.INVALID_RECORD: Failure.INVALID,
    KafkaError.INVALID_TIMESTAMP: Failure.INVALID,
    KafkaError._INVALID_ARG: Failure.INVALID,
    KafkaError.UNKNOWN_TOPIC_OR_PART: Failure.UNKNOWN_TOPIC,
    KafkaError.TOPIC_EXCEPTION: Failure.UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_TOPIC: Failure.UNKNOWN_TOPIC,
    KafkaError._UNKNOWN_PARTITION: Failure.UNKNOWN_TOPIC,
    KafkaError.TOPIC_AUTHORIZATION_FAILED: Failure.UNAUTHORIZED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: Failure.UNAUTHORIZED,
    KafkaError.SASL_AUTHENTICATION_FAILED: Failure.UNAUTHORIZED,
    KafkaError._AUTHENTICATION: Failure.UNAUTHORIZED,
    KafkaError.THROTTLING_QUOTA_EXCEEDED: Failure.REFUSING,
    KafkaError.KAFKA_STORAGE_ERROR: Failure.REFUSING,
    KafkaError.NOT_ENOUGH_REPLICAS: Failure.REFUSING,
    KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND: Failure.INDETERMINATE,
    KafkaError.REQUEST_TIMED_OUT: Failure.INDETERMINATE,
    KafkaError.NETWORK_EXCEPTION: Failure.INDETERMINATE,
    KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER: Failure.INDETERMINATE,
    KafkaError.UNKNOWN_PRODUCER_ID: Failure.INDETERMINATE,
    KafkaError.INVALID_PRODUCER_EPOCH: Failure.FENCED,
    KafkaError._FENCED: Failure.FENCED,
}

_PURGED: Final = frozenset({KafkaError._PURGE_INFLIGHT, KafkaError._PURGE_QUEUE})
_POLL_SECONDS: Final = 0.005  # bounds how long a new batch waits while reports are awaited
_LINGER_MS: Final = "2"  # 0.5 costs a sixth of throughput
_TRICKLE: Final = 100  # messages under way, at most: they do not linger
_IDLE_SECONDS: Final = 0.5  # serves librdkafka's events while nothing is in flight
_DRAIN_SECONDS: Final = 10.0  # after a purge every outcome is there within milliseconds
_LOOKUP_SECONDS: Final = 5.0
_SESSION_SECONDS: Final = 2.0  # for the first metadata of a session: without it nothing is produced
_SILENCE_SECONDS: Final = 2.5  # without a report while some are owed: then the cluster is asked whether it is there
_ANSWER_SECONDS: Final = 2.0
_AWAY_SECONDS: Final = 1.0
_GIVEN_UP: Final = "given up before it was sent"
_BATCH_BYTES: Final = 1_000_000  # librdkafka's default for batch.size
_BATCH_MARGIN: Final = 512  # batch.size counts a little less than the broker does
_ANY_SIZE: Final = 1_000_000_000  # the most that librdkafka takes for message.max.bytes


@functools.lru_cache(maxsize=1024)
def _are_unique(names: tuple[str, ...]) -> bool:
    return len(set(names)) == len(names)


def failure_of(error: KafkaError) -> Failure:
    """Returns what an error in a delivery report means for its message."""
    code = error.code()
    return _FAILURES.get(code, Failure.REJECTED if code > 0 else Failure.INDETERMINATE)


@dataclass(frozen=True, slots=True)
class _Barrier:
    """Asks the thread for a new session, or for the end."""

    last: bool
    done: threading.Event = field(default_factory=threading.Event)


class KafkaPublisher(OwnThread):
    """See `outboxkit.brokers.Publisher`."""

    features = FEATURES

    def __init__(self, settings: Settings) -> None:
        prove(Producer, {**provable_settings(settings), **settings.publisher})
        self._settings = settings
        self._topics = Topics(settings)
        self._book = InFlight()
        self._jobs: queue.SimpleQueue[Pending | _Barrier] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._barriers = 0  # asked for and not reached: until then nothing more is produced; guarded by the lock
        self._thread: threading.Thread | None = None
        # What follows belongs to the thread.
        self._producer: Producer | None = None
        self._produced: set[Pending] = set()
        self._under_way = 0
        self._heard = 0.0  # when the number under way last changed
        self._away_until = 0.0  # it did not answer a moment ago: until then nobody asks again
        self._login = SessionLogin(settings)
        self._batch_bytes = 0
        self._fatal = self._farewell = ""  # why the session is broken; why the latest one was ended

    def __repr__(self) -> str:
        return f"KafkaPublisher({self._settings.address})"

    def publish(self, batch: Batch) -> Future[Receipts]:
        return self._book.take(batch, self._enqueue)

    def _enqueue(self, pending: Pending) -> None:
        self._start()
        self._jobs.put(pending)

    def capacity(self, destination: str) -> int:
        return self._book.capacity(destination)

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        try:
            missing = self._topics.look_up(destinations, timeout.total_seconds())
        except LookupFailed as error:
            if error.failure is Failure.UNAUTHORIZED:
                raise ConfigurationError(str(error)) from error
            return {name: Refusal(-1, error.failure, str(error)) for name in destinations}
        return {name: Refusal(-1, Failure.UNKNOWN_TOPIC, unknown(name)) for name in missing}

    def reset(self) -> None:
        self._await_barrier(_Barrier(last=False))

    def close(self) -> None:
        self._await_barrier(_Barrier(last=True))
        self._topics.close()

    def _await_barrier(self, barrier: _Barrier) -> None:
        if barrier.last:
            self._book.close()
        with self._lock:
            thread = self._thread
            if thread is None or not thread.is_alive():
                return
            self._barriers += 1
            self._jobs.put(barrier)
        barrier.done.wait(_LOOKUP_SECONDS + 2 * _DRAIN_SECONDS)
        if barrier.last:
            thread.join(_DRAIN_SECONDS)

    def _start(self) -> None:
        if self._thread is None:
            # A daemon: an abandoned publisher must not keep the process from ending.
            self._thread = threading.Thread(target=self._run, name="outboxkit-kafka", daemon=True)
            self._thread.start()

    # From here on everything runs in the thread.

    def _run(self) -> None:
        try:
            while self._survives():
                pass
        finally:  # no future may stay open
            self._book.close()
            self._book.refuse_all("the publisher has ended")

    def _survives(self) -> bool:
        """Works until the end, or until a defect of ours: then all in flight is given up, and the work goes on."""
        try:
            while self._step():
                pass
        except Exception as defect:  # noqa: BLE001  a dead thread would stop every topic
            _log.exception("broker.publisher_failed", extra={"broker": "kafka", "address": self._settings.address})
            self._end_session(f"the publisher failed: {type(defect).__name__}")
            self._book.refuse_all(f"the publisher failed by a defect ({type(defect).__name__}); it is in the log")
            return True
        return False

    def _step(self) -> bool:
        """One job, or one poll; False at the end."""
        try:
            job = self._jobs.get_nowait() if self._produced else self._jobs.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            self._serve()
            self._watch()
            return True
        if isinstance(job, _Barrier):
            return self._reach(job)
        if job.left == 0:
            return True  # refused while it waited
        if self._barriers:
            self._book.refuse(job, Failure.BROKER_DOWN, _GIVEN_UP)
        else:
            self._send(job)
        return True

    def _reach(self, barrier: _Barrier) -> bool:
        try:
            self._end_session("given up while it was under way")
        finally:
            with self._lock:
                self._barriers -= 1
            barrier.done.set()
        return not barrier.last

    def _watch(self) -> None:
        """Gives up on a cluster that is silent and does not answer a question either: it is named as away at once."""
        if self._produced and time.monotonic() - self._heard > _SILENCE_SECONDS and self._producer is not None:
            try:
                self._producer.list_topics(timeout=_ANSWER_SECONDS)
            except KafkaException:
                self._end_session(f"Kafka at {self._settings.address} stopped answering while it was under way")
                self._away_until = time.monotonic() + _AWAY_SECONDS
            self._heard = time.monotonic()

    def _serve(self) -> None:
        """Serves reports. A few messages go out at once: they need not linger for company that does not come."""
        if self._producer is not None:
            under_way = sum(pending.left for pending in self._produced)
            if under_way != self._under_way:
                self._under_way, self._heard = under_way, time.monotonic()
            hurries = 0 < under_way <= _TRICKLE and "linger.ms" not in self._settings.publisher
            wait = self._producer.flush if hurries else self._producer.poll
            wait(_POLL_SECONDS if self._produced else 0)
            self._login.renew(self._producer)

    def _send(self, pending: Pending) -> None:
        destination = pending.batch.destination
        try:
            producer = self._session_for(destination)
        except LookupFailed as error:
            self._book.refuse_unsent(destination, error.failure, str(error))
            return
        except ConfigurationError as error:
            self._book.refuse_unsent(destination, Failure.UNAUTHORIZED, str(error))
            return
        if self._fatal:
            self._book.refuse(pending, Failure.INDETERMINATE, self._fatal)
            return
        pending.sent = True
        self._produced.add(pending)
        self._produce(producer, pending)
        producer.poll(0)
        self._finish_if_complete(pending)

    def _produce(self, producer: Producer, pending: Pending) -> None:
        destination = pending.batch.destination
        limit = self._topics.limit(destination) or 0
        report, produce = self._delivered, producer.produce
        for index, row in enumerate(pending.batch.rows):
            # A lower bound of the record's size; what passes and is too large after all, the broker refuses alone,
            # because a record of about batch.size gets a batch of its own.
            if len(row.payload) + len(row.key or b"") > limit:
                pending.refuse(index, Failure.TOO_LARGE, f"{destination} takes at most {limit:,} bytes")
                continue
            told = functools.partial(report, pending, index)
            try:
                names, values = outgoing_columns(row)
                pairs = zip(names, values, strict=True)
                headers: Any = dict(pairs) if _are_unique(names) else list(pairs)  # a tuple each costs twice as much
                produce(destination, row.payload, row.key, on_delivery=told, headers=headers)
            except (BufferError, KafkaException):
                again = functools.partial(produce, destination, row.payload, row.key, on_delivery=told, headers=headers)
                if not self._insist(again, pending, index):
                    break
            except Exception as error:  # noqa: BLE001  whatever one row holds, it must not stop the others
                pending.refuse(index, Failure.INVALID, unsendable(error))

    def _insist(self, record: Callable[[], None], pending: Pending, index: int) -> bool:
        """Produces a record that was not taken; False when it and all later ones of the batch were given up."""
        while True:
            try:
                record()
            except BufferError:  # back-pressure that `capacity` should have prevented: wait for reports
                self._serve()
                if self._barriers:
                    for unsent in range(index, len(pending.batch.rows)):
                        pending.refuse(unsent, Failure.BROKER_DOWN, _GIVEN_UP)
                    return False
            except KafkaException as error:
                self._note(pending, error.args[0])
                pending.refuse(index, failure_of(error.args[0]), error.args[0].str())
                return True
            else:
                return True

    def _session_for(self, destination: str) -> Producer:
        """A producer that may produce to the destination; waits for what is in flight when it needs another one.

        Raises:
            LookupFailed: the topic is unknown, or the cluster does not answer.
        """
        if time.monotonic() < self._away_until:
            raise self._silent()
        if self._topics.limit(destination) is None and self._topics.look_up((destination,), _LOOKUP_SECONDS):
            raise LookupFailed(Failure.UNKNOWN_TOPIC, unknown(destination))
        wanted = min(_BATCH_BYTES, max(1, self._topics.smallest_limit - _BATCH_MARGIN))
        if self._producer is not None and wanted < self._batch_bytes:
            while self._produced and not self._barriers:
                self._serve()
            self._end_session(_GIVEN_UP)
        if self._producer is None:
            self._batch_bytes = wanted
            self._producer = self._open_producer()
        return self._producer

    def _open_producer(self) -> Producer:
        producer = open_client(
            Producer,
            {
                **self._login.begin(),
                "linger.ms": _LINGER_MS,
                **self._settings.publisher,
                "acks": "all",
                "enable.idempotence": True,
                "max.in.flight.requests.per.connection": 5,
                "partitioner": "murmur2_random",  # as Java clients place keys; changing it would move them
                "message.timeout.ms": 0,
                "batch.size": self._batch_bytes,
                "message.max.bytes": _ANY_SIZE,  # the limit is the topic's and is checked before
                "error_cb": self._on_error,
            },
        )
        try:
            producer.list_topics(timeout=_SESSION_SECONDS)  # else the first acknowledgement takes half a second more
        except KafkaException as error:
            raise self._silent() from error
        return producer

    def _silent(self) -> LookupFailed:
        return LookupFailed(Failure.BROKER_DOWN, f"Kafka at {self._settings.address} does not answer")

    def _end_session(self, text: str) -> None:
        """Everything produced gets its outcome, then the producer is dropped.

        What is purged from the queue counts as indeterminate too: it may have been sent and be waiting for a retry.
        """
        self._farewell = text
        producer, self._producer, self._fatal = self._producer, None, ""
        if producer is not None:
            producer.purge()
            deadline = time.monotonic() + _DRAIN_SECONDS
            while self._produced and time.monotonic() < deadline:
                producer.poll(_POLL_SECONDS)
        for pending in list(self._produced):
            pending.refuse_rest(Failure.INDETERMINATE, text)
            self._finish_if_complete(pending)

    def _delivered(self, pending: Pending, index: int, error: KafkaError | None, message: Message) -> None:
        if error is None:
            pending.accept(index, message.partition(), message.offset())  # type: ignore[arg-type]
        else:
            self._note(pending, error)
            text = self._farewell if error.code() in _PURGED else error.str()
            pending.refuse(index, failure_of(error), text)
        if not pending.left:
            self._finish_if_complete(pending)

    def _note(self, pending: Pending, error: KafkaError) -> None:
        if error.fatal():
            self._on_error(error)
        if failure_of(error) is Failure.UNKNOWN_TOPIC:
            self._topics.forget(pending.batch.destination)

    def _on_error(self, error: KafkaError) -> None:
        if login_trouble(error, self._settings.address):
            self._login.is_renewable()
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = f"the producer session is broken: {error.str()}"

    def _finish_if_complete(self, pending: Pending) -> None:
        if not pending.left:
            self._produced.discard(pending)
            self._book.finish(pending)
