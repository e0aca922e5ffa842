"""``/livez``, ``/readyz`` and ``/metrics``: what a machine asks a running relay. Off unless a port is set.

``/livez`` knows the dispatcher only: a database or broker that is away must not restart the process. Nothing here has
a payload, a key or a message id. Listening anywhere but on this machine needs a setting that says so.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from outboxkit import tables
from outboxkit._sql import Instant, database_now
from outboxkit.errors import ConfigurationError
from outboxkit.guards.circuit_breaker import CircuitState
from outboxkit_relay.observe.stats import LIMITS, MAX_TOPICS, Distribution, RelayStats

if TYPE_CHECKING:
    from datetime import timedelta

    from prometheus_client import Metric
    from sqlalchemy import Connection, Engine

    from outboxkit_relay.settings import ProbeSettings

__all__ = ["Subject", "serving"]

_log: Final = logging.getLogger(__name__)

_STUCK_AFTER: Final = 60.0  # seconds without a turn of the dispatcher: longer than any wait it has by itself
_LEASES: Final = 2  # it waits for a statement of the database, which may take a part of a lease
_AT_ONCE: Final = 8  # requests; more are turned away, so that no client can exhaust the process
_LONGEST_REQUEST: Final = 10.0  # seconds, then the connection is cut
_FRESH_FOR: Final = 5.0  # seconds: however often it is asked, the database counts no more often than this

_CIRCUITS: Final = {CircuitState.CLOSED: 0, CircuitState.HALF_OPEN: 1, CircuitState.OPEN: 2}
_HOT: Final = tables.outbox_messages.c
_STOPPED: Final = tables.outbox_stopped_keys.c
_LETTERS: Final = tables.dead_letters.c


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is asked about.

    Attributes:
        look: what the relay's dispatcher has handed out; None before its first turn.
        engine: of the database, for what only it can count.
        lease: how long the relay may go without the database.
        transport: the broker's kind.
        version: of this software.
    """

    look: Callable[[], RelayStats | None]
    engine: Engine
    lease: timedelta
    transport: str
    version: str


@contextmanager
def serving(settings: ProbeSettings, subject: Subject) -> Iterator[int | None]:
    """Answers on a port while the block runs; gives the port, None when none is set.

    Raises:
        ConfigurationError: the host is not this machine and ``allow_remote`` is not set, or the port is taken.
    """
    if settings.port is None:
        yield None
        return
    server = _listening(settings.host, settings.port, subject, remote=settings.allow_remote)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="outboxkit-probes", daemon=True)
    thread.start()
    port = int(server.server_address[1])
    _log.info("probes.listening", extra={"host": settings.host, "port": port})
    try:
        yield port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _listening(host: str, port: int, subject: Subject, *, remote: bool) -> _Server:
    if not (remote or _is_this_machine(host)):
        raise ConfigurationError(
            f"probes.host is {host}: others could read the relay's state there, without a login; "
            "use 127.0.0.1, or set probes.allow_remote = true",
        )
    try:
        return _Server(host, port, _Answers(subject))
    except OSError as error:
        raise ConfigurationError(
            f"the probes cannot listen on {host} port {port}: {error.strerror or error}; set probes.port"
        ) from None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- answers -----------------------------------------------------------------------------------------------------


class _Answers:
    """What is answered on each path."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._registry = CollectorRegistry()
        self._registry.register(_Metrics(subject))
        self.paths: Final[dict[str, Callable[[], tuple[HTTPStatus, str, bytes]]]] = {
            "/livez": lambda: _verdict(_why_not_alive(subject.look(), subject.lease)),
            "/readyz": self._readiness,
            "/metrics": lambda: (HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(self._registry)),
        }

    def _readiness(self) -> tuple[HTTPStatus, str, bytes]:
        found = self._subject.look()
        paused = [asdict(one) for one in found.paused] if found else []
        return _verdict(_why_not_ready(found, self._subject.lease), paused=paused)


def _verdict(why_not: str, **facts: object) -> tuple[HTTPStatus, str, bytes]:
    status = HTTPStatus.SERVICE_UNAVAILABLE if why_not else HTTPStatus.OK
    answer = {"ok": not why_not, **({"reason": why_not} if why_not else {}), **facts}
    return status, "application/json", json.dumps(answer).encode() + b"\n"


def _why_not_alive(found: RelayStats | None, lease: timedelta) -> str:
    """Before its first turn a relay waits for its database and broker, and that is no reason to restart it."""
    silence = time.monotonic() - found.at if found else 0.0
    return (
        f"the dispatcher has not moved for {silence:.0f} s"
        if silence > max(_STUCK_AFTER, _LEASES * lease.total_seconds())
        else ""
    )


def _why_not_ready(found: RelayStats | None, lease: timedelta) -> str:
    if found is None:
        return "starting: waiting for the database and the broker"
    if found.stopping:
        return "stopping"
    if found.away:
        return "the database cannot be reached"
    if not found.joined:
        return "joining: the relay has no lease yet"
    silence = time.monotonic() - found.heard
    return f"the database has not answered for {silence:.0f} s" if silence > lease.total_seconds() else ""


# --- metrics -----------------------------------------------------------------------------------------------------


class _Metrics(Collector):
    """Every number, made when it is asked for."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._lock = threading.Lock()
        self._counted: list[Metric] = []
        self._counted_at = -_FRESH_FOR

    def collect(self) -> Iterable[Metric]:
        """For one scrape."""
        found = self._subject.look()
        lease = self._subject.lease
        yield _gauge(
            "build_info", "What runs.", ("version", "python"), {(self._subject.version, sys.version.split()[0]): 1}
        )
        yield _gauge("relay_ready", "Whether the relay can publish.", (), {(): not _why_not_ready(found, lease)})
        if found is not None:
            yield from _of_relay(found, self._subject.transport)
        yield from self._of_database()

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not ask the database."""
        return ()

    def _of_database(self) -> list[Metric]:
        with self._lock:
            if time.monotonic() - self._counted_at >= _FRESH_FOR:
                self._counted = self._count()
                self._counted_at = time.monotonic()
            return self._counted

    def _count(self) -> list[Metric]:
        try:
            with self._subject.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                return [*_backlog(connection), _gauge("database_up", "Whether the database answers.", (), {(): 1})]
        except SQLAlchemyError:
            return [_gauge("database_up", "Whether the database answers.", (), {(): 0})]


def _of_relay(found: RelayStats, transport: str) -> Iterator[Metric]:
    paused = {one.topic for one in found.paused}
    yield _gauge("relay_shards_owned", "Shards that this relay owns.", (), {(): found.shards})
    yield _gauge("relay_queued_messages", "Messages in the relay's memory.", (), {(): found.queued})
    yield _gauge("relay_in_flight_messages", "Messages at the broker.", (), {(): found.in_flight})
    yield _gauge(
        "destination_paused",
        "Whether nothing goes out to it: the broker takes nothing, or an operator has paused it.",
        ("destination",),
        {(topic,): topic in paused or topic in found.held for topic in {*found.destinations, *found.held}},
    )
    yield _gauge(
        "circuit_state",
        "Whether the relay uses it: 0 closed (as usual), 1 half-open (a few messages probe), 2 open (not at all).",
        ("destination",),
        {(topic,): _CIRCUITS[state] for topic, state in found.circuits.items()},
    )
    yield _counter(
        "relay_published",
        "Messages that the broker has acknowledged.",
        ("topic", "transport"),
        {(topic, transport): number for topic, number in found.published.items()},
    )
    yield _counter("relay_publish_failures", "Messages that it has not.", ("topic", "reason"), found.failures)
    text = "From the hand-over of a batch to its receipts."
    yield _histogram("relay_publish_duration_seconds", text, found.publishing)
    text = "From the commit of the oldest message of a batch until the broker has acknowledged it."
    yield _histogram("delivery_latency_seconds", text, found.latency)
    text = "Messages that were missed at first: anything but 0 is a defect to report."
    yield _counter("relay_found_by_rescan", text, (), {(): found.found_by_rescan})
    yield _counter("relay_fenced", "Steps refused because the lease had ended.", (), {(): found.fenced})


def _backlog(connection: Connection) -> Iterator[Metric]:
    """The whole database's numbers, the same from every relay.

    Transaction: reads only. Index used: none, the waiting messages are counted.
    """
    now = connection.execute(select(database_now())).scalar_one()
    oldest = func.min(_HOT.recorded_at, type_=Instant())
    count = func.count().label("count")
    by_topic = select(_HOT.topic, count, oldest).group_by(_HOT.topic).order_by(count.desc()).limit(MAX_TOPICS)
    rows = connection.execute(by_topic).all()
    ages = {(topic,): max(0.0, (now - since).total_seconds()) for topic, _, since in rows}
    pending = {(topic,): number for topic, number, _ in rows}
    yield _gauge("outbox_pending_messages", "Messages not published yet.", ("topic",), pending)
    yield _gauge("outbox_oldest_pending_age_seconds", "Age of the oldest of them.", ("topic",), ages)
    stopped = _counts(connection, _STOPPED.topic, _STOPPED.reason)
    yield _gauge("outbox_stopped_keys", "Keys whose order is held.", ("topic", "reason"), stopped)
    dead = _counts(connection, _LETTERS.consumer, _LETTERS.type, where=[_LETTERS.state == "dead"])
    yield _gauge("dead_letters", "Open dead letters; the relay's own have no consumer.", ("consumer", "type"), dead)


def _counts(connection: Connection, *columns: Any, where: Iterable[Any] = ()) -> dict[tuple[str, ...], int]:
    count = func.count().label("count")
    statement = select(*columns, count).where(*where).group_by(*columns).order_by(count.desc()).limit(MAX_TOPICS)
    return {tuple(row[:-1]): row[-1] for row in connection.execute(statement)}


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = GaugeMetricFamily(f"outboxkit_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


def _histogram(name: str, text: str, found: Distribution) -> Metric:
    family = HistogramMetricFamily(f"outboxkit_{name}", text)
    upper = [*map(str, LIMITS), "+Inf"]
    family.add_metric((), list(zip(upper, accumulate(found.counts), strict=True)), found.total)
    return family


def _counter(name: str, text: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    family = CounterMetricFamily(f"outboxkit_{name}", text, labels=labels)
    for key, value in values.items():
        family.add_metric(key, float(value))
    return family


# --- HTTP --------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "outboxkit"
    sys_version = ""
    timeout = 5.0  # seconds for one read

    def do_GET(self) -> None:
        """Answers one question; the connection is closed after it."""
        answer = self.server.answers.paths.get(self.path.partition("?")[0])
        if answer is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        status, kind, body = answer()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Probes come every few seconds: they are no news."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 16

    def __init__(self, host: str, port: int, answers: _Answers) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.answers = answers
        self._room = threading.BoundedSemaphore(_AT_ONCE)
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """Without the look-up of the host's full name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, if there is room."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Within its time."""
        cut = threading.Timer(_LONGEST_REQUEST, _cut, args=(request,))
        cut.daemon = True
        cut.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            cut.cancel()
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is."""
        del request, client_address
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.warning("probes.failed", extra={"error": type(error).__name__})


def _cut(request: socket.socket) -> None:
    try:
        request.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has ended in this moment
