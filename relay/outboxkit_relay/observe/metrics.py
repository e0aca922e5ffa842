"""Metrics: every number of ``/metrics``, in the form that Prometheus reads.

What only the database can count is counted in the background, at most every few seconds: a scrape gets the latest
numbers, also when the database is slow.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from outboxkit import tables
from outboxkit._legible import legible
from outboxkit._sql import database_now, microseconds_of
from outboxkit.guards.circuit_breaker import CircuitState
from outboxkit.policy import Failure
from outboxkit.rows import UNREADABLE, microseconds
from outboxkit_relay.observe.families import build_info, counter, gauge, histogram
from outboxkit_relay.observe.sentences import sentence
from outboxkit_relay.observe.stats import MAX_TOPICS, NOTHING_YET, RelayStats, why_not_alive, why_not_ready

if TYPE_CHECKING:
    from datetime import timedelta

    from prometheus_client import Metric
    from sqlalchemy import Connection, Engine

__all__ = ["RelayMetrics", "Subject"]

_FRESH_FOR: Final = 5.0  # seconds: however often it is asked, the database counts no more often than this
_OF_MESSAGES: Final = (Failure.INDETERMINATE, Failure.TOO_LARGE, Failure.INVALID, Failure.REJECTED)
_SLOW: Final = 1.0  # seconds that a scrape waits for new numbers

_REASONS: Final = tuple(failure for failure in Failure if failure.of_destination or failure in _OF_MESSAGES)
_CIRCUITS: Final = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}
_HOT: Final = tables.outbox_messages.c
_STOPPED: Final = tables.outbox_stopped_keys.c
_LETTERS: Final = tables.dead_letters.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Subjects of the health endpoints: relay, database and broker.

    Attributes:
        look: gives the relay's latest statistics; None before its first turn.
        engine: of the database, for what only it can count.
        lease: how long the relay may go without the database.
        transport: tells the kind of broker that a destination is on.
        version: of this software.
    """

    look: Callable[[], RelayStats | None]
    engine: Engine
    lease: timedelta
    transport: Callable[[str], str]
    version: str

    def why_not_alive(self) -> str:
        """The reason to restart the process, empty when there is none."""
        return why_not_alive(self.look(), self.lease)

    def readiness(self) -> tuple[str, Mapping[str, object]]:
        """The reason why the relay cannot publish, empty when it can; and the destinations that take nothing."""
        found, now = self.look(), datetime.now(UTC)
        unavailable = [asdict(one) | {"sentence": sentence(one, now)} for one in found.unavailable] if found else []
        return why_not_ready(found, self.lease), {"paused": unavailable}

    def metrics(self) -> RelayMetrics:
        """Returns what collects its numbers."""
        return RelayMetrics(self)


class RelayMetrics(Collector):
    """Every number, made when it is asked for.

    Args:
        subject: what to report on.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._counter = ThreadPoolExecutor(1, "outboxkit-metrics")
        self._lock = threading.Lock()
        self._count: Future[list[Metric]] | None = None  # guarded by the lock
        self._counted: list[Metric] = [_database_up(False)]
        self._counted_at = -_FRESH_FOR

    def close(self) -> None:
        """Counts no more."""
        self._counter.shutdown(wait=False, cancel_futures=True)

    def collect(self) -> Iterable[Metric]:
        """For one scrape."""
        found = self._subject.look()
        yield build_info(self._subject.version)
        ready = not why_not_ready(found, self._subject.lease)
        yield gauge("relay_ready", "Whether the relay can publish.", (), {(): ready})
        yield from _of_relay(found or NOTHING_YET, self._subject.transport)
        yield from self._of_database()

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not ask the database."""
        return ()

    def _of_database(self) -> list[Metric]:
        """The latest numbers; new ones if they come in time."""
        with self._lock:
            if self._count is None and time.monotonic() - self._counted_at >= _FRESH_FOR:
                self._count = self._counter.submit(self._ask)
            count = self._count
        if count is None:
            return self._counted
        try:
            self._counted = count.result(_SLOW)
        except TimeoutError:
            return [family for family in self._counted if family.name != _UP] + [_database_up(False)]
        with self._lock:
            if self._count is count:
                self._count, self._counted_at = None, time.monotonic()
        return self._counted

    def _ask(self) -> list[Metric]:
        try:
            with self._subject.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                found = self._subject.look()
                known = found.destinations if found else ()
                return [*_backlog(connection, known), _database_up(True)]
        except SQLAlchemyError:
            return [_database_up(False)]


def _of_relay(found: RelayStats, transport: Callable[[str], str]) -> Iterator[Metric]:
    unavailable = {one.topic for one in found.unavailable}
    yield gauge("relay_shards_owned", "Shards that this relay owns.", (), {(): found.shards})
    yield gauge("relay_queued_messages", "Messages in the relay's memory.", (), {(): found.queued})
    yield gauge("relay_in_flight_messages", "Messages at the broker.", (), {(): found.in_flight})
    yield gauge(
        "destination_paused",
        "Whether nothing goes out to it: the broker takes nothing, or an operator has paused it.",
        ("destination",),
        {(topic,): topic in unavailable or topic in found.paused for topic in {*found.destinations, *found.paused}},
    )
    yield gauge(
        "circuit_state",
        "Whether the relay uses it: 0 closed (as usual), 1 half-open (a few messages probe), 2 open (not at all).",
        ("destination",),
        {(topic,): _CIRCUITS[state] for topic, state in found.circuits.items()},
    )
    published = dict.fromkeys(found.destinations, 0) | dict(found.published)
    yield counter(
        "relay_published",
        "Messages that the broker has acknowledged.",
        ("topic", "transport"),
        {(topic, transport(topic)): number for topic, number in published.items()},
    )
    none = {(topic, reason.value): 0 for topic in found.destinations for reason in _REASONS}
    refused = none | dict(found.failures)
    yield counter("relay_publish_failures", "Messages that it has not.", ("topic", "reason"), refused)
    text = "From the hand-over of a batch to its receipts."
    yield histogram("relay_publish_duration_seconds", text, (), {(): found.publishing})
    text = "From the commit of the oldest message of a batch until the broker has acknowledged it."
    yield histogram("delivery_latency_seconds", text, (), {(): found.latency})
    text = "Messages that were missed at first: anything but 0 is a defect to report."
    yield counter("relay_found_by_rescan", text, (), {(): found.found_by_rescan})
    yield counter("relay_fenced", "Steps refused because the lease had ended.", (), {(): found.fenced})


def _backlog(connection: Connection, known: Iterable[str]) -> Iterator[Metric]:
    """The whole database's numbers, the same from every relay.

    Transaction: reads only. Index used: none, the waiting messages are counted.
    """
    now = microseconds(connection.execute(select(database_now())).scalar_one())
    recorded = microseconds_of(_HOT.recorded_at)
    oldest = func.min(func.nullif(recorded, UNREADABLE), type_=recorded.type)
    count = func.count().label("count")
    by_topic = select(legible(_HOT.topic), count, oldest).group_by(_HOT.topic).order_by(count.desc()).limit(MAX_TOPICS)
    rows = connection.execute(by_topic).all()
    none = {(topic,): 0.0 for topic in known}  # a series that is there from the start can be told from a missing one
    ages = none | {(topic,): max(0.0, (now - since) / 1e6) for topic, _, since in rows if since is not None}
    pending = none | {(topic,): float(number) for topic, number, _ in rows}
    yield gauge("outbox_pending_messages", "Messages not published yet.", ("topic",), pending)
    yield gauge("outbox_oldest_pending_age_seconds", "Age of the oldest of them.", ("topic",), ages)
    stopped = _counts(connection, _STOPPED.topic, _STOPPED.reason)
    yield gauge("outbox_stopped_keys", "Keys whose order is held.", ("topic", "reason"), stopped)
    dead = _counts(connection, _LETTERS.consumer, _LETTERS.type, where=[_LETTERS.state == "dead"])
    yield gauge("dead_letters", "Open dead letters; the relay's own have no consumer.", ("consumer", "type"), dead)


def _counts(connection: Connection, *columns: Any, where: Iterable[Any] = ()) -> dict[tuple[str, ...], int]:
    count = func.count().label("count")
    statement = select(*columns, count).where(*where).group_by(*columns).order_by(count.desc()).limit(MAX_TOPICS)
    return {tuple(row[:-1]): row[-1] for row in connection.execute(statement)}


_UP: Final = "outboxkit_database_up"


def _database_up(up: bool) -> Metric:  # noqa: FBT001  the value of the metric
    return gauge("database_up", "Whether the database answers.", (), {(): up})
