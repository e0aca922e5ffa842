"""The way out to Kafka. One thread owns the producer: it looks topics up, produces, and resolves one future per batch.

Invariants: nothing is produced to a topic that was not seen; no message is produced that its topic refuses by size;
librdkafka never gives up a message by itself, so what a partition takes is a gapless prefix of what was produced.
After `Failure.INDETERMINATE` the caller calls `reset` before it sends again: what was produced cannot be recalled.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from confluent_kafka import KafkaError, KafkaException, Producer

from outboxkit.brokers import Features, Receipts, Refusal
from outboxkit.brokers.kafka.topics import LookupFailed, Topics, open_client, prove
from outboxkit.errors import ConfigurationError
from outboxkit.headers import outgoing_headers
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from datetime import timedelta

    from confluent_kafka import Message

    from outboxkit.brokers import Batch
    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["FEATURES", "KafkaPublisher", "failure_of"]

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

_PAYLOAD: Final = attrgetter("payload")
_POLL_SECONDS: Final = 0.005  # bounds how long a new batch waits while reports are awaited
_LINGER_MS: Final = "2"  # 0.5 costs a sixth of throughput
_TRICKLE: Final = 100  # messages under way, at most: they do not linger
_IDLE_SECONDS: Final = 0.5  # serves librdkafka's log and error events while nothing is in flight
_DRAIN_SECONDS: Final = 10.0  # after a purge every outcome is there within milliseconds
_LOOKUP_SECONDS: Final = 5.0
_SESSION_SECONDS: Final = 2.0  # for the first metadata of a session; not having it only costs latency
_MESSAGES_PER_DESTINATION: Final = 10_000  # a window of 8 batches of 1,000, and some
_BYTES_IN_FLIGHT: Final = 64 << 20  # bounds memory, whatever the size of the messages
_BATCH_BYTES: Final = 1_000_000  # librdkafka's default for batch.size
_BATCH_MARGIN: Final = 512  # batch.size counts a little less than the broker does
_ANY_SIZE: Final = 1_000_000_000  # the most that librdkafka takes for message.max.bytes
_TEXT_LIMIT: Final = 300


def failure_of(error: KafkaError) -> Failure:
    """What an error in a delivery report says about its message."""
    code = error.code()
    return _FAILURES.get(code, Failure.REJECTED if code > 0 else Failure.INDETERMINATE)


class _Pending:
    """A batch under way: collects one outcome per row, then resolves the future."""

    __slots__ = ("batch", "future", "left", "offsets", "partitions", "refusals", "size")

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.future: Future[Receipts] = Future()
        self.future.set_running_or_notify_cancel()  # from here on nobody can cancel it: the outcome is a fact
        self.left = len(batch.rows)
        self.partitions = [-1] * self.left
        self.offsets = [-1] * self.left
        self.refusals: list[Refusal] = []
        self.size = sum(map(len, map(_PAYLOAD, batch.rows)))

    def refuse(self, index: int, failure: Failure, text: str) -> None:
        self.refusals.append(Refusal(index, failure, text[:_TEXT_LIMIT]))
        self.left -= 1

    def refuse_rest(self, failure: Failure, text: str) -> None:
        """Ends every row that has no outcome yet."""
        refused = {refusal.index for refusal in self.refusals}
        for index, offset in enumerate(self.offsets):
            if offset < 0 and index not in refused:
                self.refuse(index, failure, text)

    def resolve(self) -> None:
        refusals = tuple(sorted(self.refusals, key=lambda refusal: refusal.index))
        self.future.set_result(Receipts(self.partitions, self.offsets, refusals))


class _Barrier:
    """Asks the thread for a new session, or for the end."""

    __slots__ = ("done", "last")

    def __init__(self, *, last: bool) -> None:
        self.done = threading.Event()
        self.last = last


class KafkaPublisher:
    """See `outboxkit.brokers.Publisher`."""

    features = FEATURES

    def __init__(self, settings: Settings) -> None:
        prove(Producer, {**settings.common, **settings.publisher})
        self._settings = settings
        self._topics = Topics(settings)
        self._jobs: queue.SimpleQueue[_Pending | _Barrier] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[str, list[_Pending]] = {}  # by destination, in order; guarded by the lock
        self._barriers = 0  # asked for and not reached: until then nothing more is produced; guarded by the lock
        self._closed = False  # guarded by the lock
        self._thread: threading.Thread | None = None
        # What follows belongs to the thread.
        self._producer: Producer | None = None
        self._produced: set[_Pending] = set()
        self._batch_bytes = 0
        self._fatal = ""

    def __repr__(self) -> str:
        return f"KafkaPublisher({self._settings.address})"

    def publish(self, batch: Batch) -> Future[Receipts]:
        pending = _Pending(batch)
        with self._lock:
            if not self._closed and batch.rows:
                self._open.setdefault(batch.destination, []).append(pending)
                self._start()
                self._jobs.put(pending)
                return pending.future
        pending.refuse_rest(Failure.BROKER_DOWN, "the publisher is closed")
        pending.resolve()
        return pending.future

    def capacity(self, destination: str) -> int:
        with self._lock:
            mine = sum(pending.left for pending in self._open.get(destination, ()))
            size = sum(pending.size for batches in self._open.values() for pending in batches)
        return 0 if size >= _BYTES_IN_FLIGHT else max(0, _MESSAGES_PER_DESTINATION - mine)

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        try:
            missing = self._topics.look_up(destinations, timeout.total_seconds())
        except LookupFailed as error:
            if error.failure is Failure.UNAUTHORIZED:
                raise ConfigurationError(str(error)) from error
            return {name: Refusal(-1, error.failure, str(error)) for name in destinations}
        return {name: Refusal(-1, Failure.UNKNOWN_TOPIC, _unknown(name)) for name in missing}

    def reset(self) -> None:
        self._await_barrier(_Barrier(last=False))

    def close(self) -> None:
        self._await_barrier(_Barrier(last=True))
        self._topics.close()

    def _await_barrier(self, barrier: _Barrier) -> None:
        with self._lock:
            self._closed = self._closed or barrier.last
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
            while self._step():
                pass
        finally:  # also after a defect of ours: no future may stay open
            with self._lock:
                self._closed = True
                left = [pending for batches in self._open.values() for pending in batches]
            for pending in left:
                self._refuse(pending, Failure.INDETERMINATE, "the publisher has ended")

    def _step(self) -> bool:
        """One job, or one poll; False at the end."""
        try:
            job = self._jobs.get_nowait() if self._produced else self._jobs.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            self._serve()
            return True
        if isinstance(job, _Barrier):
            self._end_session()
            with self._lock:
                self._barriers -= 1
            job.done.set()
            return not job.last
        if job.left == 0:
            return True  # refused while it waited
        if self._barriers:
            self._refuse(job, Failure.BROKER_DOWN, "given up before it was sent")
        else:
            self._send(job)
        return True

    def _serve(self) -> None:
        """Serves reports. A few messages go out at once: they need not linger for company that does not come."""
        if self._producer is not None:
            under_way = sum(pending.left for pending in self._produced)
            hurries = 0 < under_way <= _TRICKLE and "linger.ms" not in self._settings.publisher
            wait = self._producer.flush if hurries else self._producer.poll
            wait(_POLL_SECONDS if self._produced else 0)

    def _send(self, pending: _Pending) -> None:
        destination = pending.batch.destination
        try:
            producer = self._session_for(destination)
        except LookupFailed as error:
            self._refuse_waiting(destination, error.failure, str(error))
            return
        except ConfigurationError as error:
            self._refuse_waiting(destination, Failure.UNAUTHORIZED, str(error))
            return
        if self._fatal:
            self._refuse(pending, Failure.INDETERMINATE, self._fatal)
            return
        self._produced.add(pending)
        limit = self._topics.limit(destination) or 0
        report, produce = self._delivered, producer.produce
        for index, row in enumerate(pending.batch.rows):
            # A lower bound of the record's size; what passes and is too large after all, the broker refuses alone,
            # because a record of about batch.size gets a batch of its own.
            if len(row.payload) + len(row.key or b"") > limit:
                pending.refuse(index, Failure.TOO_LARGE, f"{destination} takes at most {limit:,} bytes")
                continue
            headers: Any = outgoing_headers(row)  # the stub asks for a wider list
            try:
                produce(destination, row.payload, row.key, on_delivery=partial(report, pending, index), headers=headers)
            except (BufferError, KafkaException):
                again = partial(produce, destination, row.payload, row.key, on_delivery=partial(report, pending, index))
                if not self._insist(partial(again, headers=headers), pending, index):
                    break
        producer.poll(0)
        self._finish_if_complete(pending)

    def _insist(self, record: Callable[[], None], pending: _Pending, index: int) -> bool:
        """Produces a record that was not taken; False when it and all later ones of the batch were given up."""
        while True:
            try:
                record()
            except BufferError:  # back-pressure that `capacity` should have prevented: wait for reports
                self._serve()
                if self._barriers:
                    for unsent in range(index, len(pending.batch.rows)):
                        pending.refuse(unsent, Failure.BROKER_DOWN, "given up before it was sent")
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
        if self._topics.limit(destination) is None and self._topics.look_up((destination,), _LOOKUP_SECONDS):
            raise LookupFailed(Failure.UNKNOWN_TOPIC, _unknown(destination))
        wanted = min(_BATCH_BYTES, max(1, self._topics.smallest_limit - _BATCH_MARGIN))
        if self._producer is not None and wanted < self._batch_bytes:
            while self._produced and not self._barriers:
                self._serve()
            self._end_session()
        if self._producer is None:
            self._batch_bytes = wanted
            self._producer = self._open_producer()
        return self._producer

    def _open_producer(self) -> Producer:
        producer = open_client(
            Producer,
            {
                **self._settings.common,
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
        with suppress(KafkaException):
            producer.list_topics(timeout=_SESSION_SECONDS)  # else the first acknowledgement takes half a second more
        return producer

    def _end_session(self) -> None:
        """Everything produced gets its outcome, then the producer is dropped.

        What is purged from the queue counts as indeterminate too: it may have been sent and be waiting for a retry.
        """
        producer, self._producer, self._fatal = self._producer, None, ""
        if producer is not None:
            producer.purge()
            deadline = time.monotonic() + _DRAIN_SECONDS
            while self._produced and time.monotonic() < deadline:
                producer.poll(_POLL_SECONDS)
        for pending in list(self._produced):
            self._refuse(pending, Failure.INDETERMINATE, "given up while it was under way")

    def _delivered(self, pending: _Pending, index: int, error: KafkaError | None, message: Message) -> None:
        if pending.left <= 0:
            return  # its future has ended without it
        if error is None:
            pending.partitions[index] = message.partition()  # type: ignore[assignment]  # a delivered message has both
            pending.offsets[index] = message.offset()  # type: ignore[assignment]
            pending.left -= 1
        else:
            self._note(pending, error)
            pending.refuse(index, failure_of(error), error.str())
        if not pending.left:
            self._finish_if_complete(pending)

    def _note(self, pending: _Pending, error: KafkaError) -> None:
        if error.fatal():
            self._on_error(error)
        if failure_of(error) is Failure.UNKNOWN_TOPIC:
            self._topics.forget(pending.batch.destination)

    def _on_error(self, error: KafkaError) -> None:
        if error.fatal() or error.code() == KafkaError._FATAL:
            self._fatal = f"the producer session is broken: {error.str()}"

    def _refuse_waiting(self, destination: str, failure: Failure, text: str) -> None:
        """Refuses all that waits for the destination: a later batch must not overtake the one that was refused."""
        with self._lock:
            waiting = [pending for pending in self._open.get(destination, ()) if pending not in self._produced]
        for pending in waiting:
            self._refuse(pending, failure, text)

    def _refuse(self, pending: _Pending, failure: Failure, text: str) -> None:
        pending.refuse_rest(failure, text)
        self._finish_if_complete(pending)

    def _finish_if_complete(self, pending: _Pending) -> None:
        if pending.left or pending.future.done():
            return
        self._produced.discard(pending)
        with self._lock:
            batches = self._open[pending.batch.destination]
            batches.remove(pending)
            if not batches:
                del self._open[pending.batch.destination]
        pending.resolve()


def _unknown(topic: str) -> str:
    return f"Kafka has no topic {topic}; create it: outboxkit init --topology"
