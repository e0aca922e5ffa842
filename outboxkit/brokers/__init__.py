"""Brokers: the two ports to the outside world, and how an adapter is found.

**Writing a broker.** One module with ``publisher(url, options) -> Publisher`` and
``subscriber(url, subscription, options) -> Subscriber`` (and ``credentials=None`` where it can log in), one entry point
in the group ``outboxkit.brokers`` named after the URL scheme, and the conformance suite of
``outboxkit.testing.broker_conformance`` passed. An adapter knows the message and nothing of databases. It maps its
client's errors to `Failure` in one table, by code, never by text. It never logs payloads or secrets.

`Publisher` is called from one dispatcher thread and never blocks it: ``publish`` returns a future at once. `Subscriber`
belongs to one asyncio event loop. A module may also have ``examine(url, expected, options) -> Iterable[Finding]``, for
`outboxkit doctor`: what a broker is set up for, compared with what is expected of it.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final, Literal, Protocol

from outboxkit.brokers._credentials import Credentials, Login, Token, logins_of
from outboxkit.brokers._urls import redacted
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from concurrent.futures import Future
    from datetime import timedelta

    from outboxkit.findings import Finding
    from outboxkit.message import Headers
    from outboxkit.rows import Row

__all__ = [
    "CONTENT_ENCODING",
    "NO_PLACE",
    "REPLY_TO",
    "Assignment",
    "Batch",
    "Credentials",
    "Delivery",
    "Expected",
    "Features",
    "Login",
    "Publisher",
    "Receipts",
    "Refusal",
    "Start",
    "Subscriber",
    "Subscription",
    "Token",
    "examine",
    "logins_of",
    "open_publisher",
    "open_subscriber",
    "redacted",
    "refuse_unknown",
    "text_of",
]

_GROUP: Final = "outboxkit.brokers"

NO_PLACE: Final = -1  #: in `Receipts`: the broker tells no partition and no offset

# Headers that say what an AMQP property says.
CONTENT_ENCODING: Final = "content-encoding"
REPLY_TO: Final = "reply-to"


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Abilities of a broker: the only place where such a question is asked.

    Attributes:
        name: ``kafka``, ``rabbitmq``, ``memory``.
        order: the default for `Order` that keeps keys in order on this broker.
        evidence: whether an acknowledgement tells partition and offset.
        max_message_bytes: the largest message the broker takes by default, None when unbounded.
    """

    name: str
    order: Order
    evidence: bool
    max_message_bytes: int | None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one kind for one destination, in the order in which they must arrive per key.

    Attributes:
        destination: the topic; the queue when the rows are commands.
        rows: what to send; `outboxkit.headers.outgoing_headers` gives the wire headers of each.
    """

    destination: str
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One message of a batch that was not acknowledged."""

    index: int
    failure: Failure
    text: str


@dataclass(frozen=True, slots=True)
class Receipts:
    """Outcome of a batch: evidence for each index (`NO_PLACE` where there is none) and the refusals, by index."""

    partitions: Sequence[int]
    offsets: Sequence[int]
    refusals: tuple[Refusal, ...] = ()


class Publisher(Protocol):
    """The way out."""

    @property
    def features(self) -> Features: ...

    @property
    def has_ended(self) -> bool:
        """Whether the adapter's own thread has ended, by a defect: the owner closes it and opens another one."""
        ...

    def publish(self, batch: Batch) -> Future[Receipts]:
        """Hands a batch over and returns at once.

        Guarantee: a row without a refusal in the receipts is stored by the broker. The future always ends, also after
        `reset` and `close`; it never raises for trouble with the broker, but reports each row as refused. Batches that
        already wait behind a refused one of their destination are refused with it; what is already on its way cannot be
        recalled, so after ``indeterminate`` the caller calls `reset` before it sends again. And it looks at the futures
        of a destination before it publishes more there: else the next batch overtakes one that was just refused.
        """
        ...

    def capacity(self, destination: str) -> int:
        """Returns the number of messages that this destination may take on top now; 0 is back-pressure."""
        ...

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        """Asks the broker about destinations; returns those in trouble (index -1). Blocks at most ``timeout``.

        Raises:
            ConfigurationError: the login was refused.
        """
        ...

    def reset(self) -> None:
        """Gives up all that is in flight: every future ends (``indeterminate`` where unknown); a new session begins."""
        ...

    def close(self) -> None:
        """Ends the session; everything in flight ends as in `reset`. Idempotent."""
        ...


#: Where a consumer begins that the broker does not know: with what is kept, with what comes, or at an instant.
Start = Literal["earliest", "latest"] | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """Sources that one consumer reads.

    Attributes:
        consumer: the consumer's name: Kafka group id, and part of the RabbitMQ queue name ``{topic}.{consumer}``.
        topics: event topics to read.
        queues: command destinations to read (``send(…, to=…)``).
        start: where a consumer begins that the broker does not know; it says nothing to others.
    """

    consumer: str
    topics: tuple[str, ...]
    queues: tuple[str, ...] = ()
    start: Start = "earliest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message as the broker handed it out: bytes, untouched.

    Attributes:
        topic: the event topic or command queue it came from.
        key: the record key (Kafka), or the ``partitionkey`` header (RabbitMQ).
        headers: in order, duplicates kept, Kafka spelling for CloudEvents attributes.
        payload: the body; None is a Kafka tombstone, ``b""`` an empty body.
        origin: where it stood, for people: ``orders[3]@1881`` or ``queue orders.billing``.
        partition: of the log, None where there is none (RabbitMQ).
        offset: in that partition, None where there is none.
        timestamp: when the producer or the broker stamped it, aware; None when nobody did or it is no time.
        routing_key: the name under which it was routed (RabbitMQ), None elsewhere.
        reply_to: where an answer is expected, None when nowhere.
        content_encoding: how the payload is compressed (``gzip``), None when it is not said.
        redelivered: the broker knows that it was handed out before.
        fault: why its envelope cannot be read, None when it can; the headers then hold it in raw bytes.
        token: the adapter's own handle, opaque to others.
    """

    topic: str
    key: bytes | None
    headers: Headers
    payload: bytes | None
    origin: str
    partition: int | None = None
    offset: int | None = None
    timestamp: datetime | None = None
    routing_key: str | None = None
    reply_to: str | None = None
    content_encoding: str | None = None
    redelivered: bool = False
    fault: str | None = None
    token: object = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The part of its subscription that a subscriber reads now.

    Attributes:
        sources: how many partitions or queues; 0 is a standby's, None until the broker has given any.
        lag: messages in them that are not settled, as the broker told within the last seconds; None when it did not.
    """

    sources: int | None = None
    lag: int | None = None


class Subscriber(Protocol):
    """The way in. At-least-once: what was not acknowledged comes again."""

    @property
    def features(self) -> Features: ...

    @property
    def assignment(self) -> Assignment:
        """Partitions or queues that it reads now, and how far it is behind; asks nobody."""
        ...

    async def receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        """Returns the next deliveries, at most ``limit``, in order per key; none after ``timeout``.

        Raises:
            TransientBrokerError: the broker is away; calling again is right.
            ConfigurationError: the login was refused, or a topic or queue is missing at the start.
        """
        ...

    async def acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        """Tells the broker that these are settled. Kafka commits no offset past an unacknowledged delivery.

        Guarantee: called only after the database commit; a crash before it brings the deliveries again.
        """
        ...

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Gives deliveries back unhandled: they come again, in order."""
        ...

    async def declare(self, subscription: Subscription) -> Sequence[str]:
        """Creates what the subscription needs (topics, exchanges, queues, bindings); returns a line for each.

        A subscription without a consumer is a producer's: its topics only, no queue.
        """
        ...

    async def close(self) -> None:
        """Leaves; what was not acknowledged comes again elsewhere. Idempotent."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The set-up that is expected of a broker.

    Attributes:
        topics: destinations of events and commands.
        subscriptions: what consumers read.
        consumers: their names, also of those whose subscription is not known.
        payload_bytes: the largest payload that applications emit.
        remembered: how long inboxes recognise a message that comes again.
        partitions: topic -> how many partitions it has for good.
        used_partitions: topic -> so many were published to.
        compacted: topics that are compacted on purpose.
    """

    topics: frozenset[str] = frozenset()
    subscriptions: tuple[Subscription, ...] = ()
    consumers: tuple[str, ...] = ()
    payload_bytes: int = 900_000
    remembered: timedelta
    partitions: Mapping[str, int] = field(default_factory=dict)
    used_partitions: Mapping[str, int] = field(default_factory=dict)
    compacted: frozenset[str] = frozenset()


def examine(
    url: str,
    expected: Expected,
    options: Mapping[str, str] | None = None,
    *,
    credentials: Credentials | None = None,
) -> list[Finding]:
    """Lists what is wrong with how a broker is set up; nothing for brokers that cannot be asked.

    Reads only. Blocks for some seconds.

    Raises:
        ConfigurationError: as `open_publisher`.
    """
    look = getattr(_module(url), "examine", None)
    given = {} if credentials is None else {"credentials": credentials}
    return [] if look is None else list(look(url, expected, dict(options or {}), **given))


def open_publisher(
    url: str, options: Mapping[str, str] | None = None, *, credentials: Credentials | None = None
) -> Publisher:
    """Returns the publisher for a broker URL; nothing is connected yet.

    Args:
        url: ``kafka://host:9092,host2:9092``, ``kafka+ssl://…``, ``amqp://user:password@host,host2/vhost``,
            ``amqps://…``, ``memory://name``.
        options: client settings by their own names (``sasl.mechanism``); each adapter allows a list and refuses others.
        credentials: gives the login or the token of each new connection, instead of what the URL says.

    Raises:
        ConfigurationError: unparsable URL, unknown scheme, missing extra, setting that is not allowed.
    """
    given = {} if credentials is None else {"credentials": credentials}
    publisher: Publisher = _module(url).publisher(url, dict(options or {}), **given)
    return publisher


def open_subscriber(
    url: str,
    subscription: Subscription,
    options: Mapping[str, str] | None = None,
    *,
    credentials: Credentials | None = None,
) -> Subscriber:
    """Returns the subscriber for a broker URL; see `open_publisher`."""
    given = {} if credentials is None else {"credentials": credentials}
    subscriber: Subscriber = _module(url).subscriber(url, subscription, dict(options or {}), **given)
    return subscriber


def refuse_unknown(options: Mapping[str, str], allowed: Collection[str], broker: str) -> None:
    """Refuses a client setting that is not on the broker's allow-list: some settings load code or log secrets.

    Raises:
        ConfigurationError: names the setting (never its value) and what is allowed.
    """
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ConfigurationError(
            f"the {broker} setting {unknown[0]!r} is not allowed; allowed are {', '.join(sorted(allowed))}",
        )


def text_of(headers: Headers, name: str) -> str | None:
    """The first header of that name as text, whatever its bytes are; None when there is none."""
    return next((value.decode("utf-8", "replace") for known, value in headers if known == name), None)


def _module(url: str):  # type: ignore[no-untyped-def]  # noqa: ANN202  a plug module: its functions are checked by the conformance suite
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    family = scheme.partition("+")[0]
    known = {point.name: point.value for point in entry_points(group=_GROUP)}
    if family not in known:
        raise ConfigurationError(
            f"the broker URL {redacted(url)} has no known scheme; expected one of {', '.join(sorted(known))}, "
            "as in kafka://localhost:9092 or amqp://user:password@localhost/",
        )
    try:
        return importlib.import_module(known[family])
    except ModuleNotFoundError as error:
        extra = {"amqp": "rabbitmq", "amqps": "rabbitmq"}.get(family, family)
        raise ConfigurationError(
            f"{family} needs the module {error.name}; install it: pip install 'outboxkit[{extra}]'",
        ) from error
