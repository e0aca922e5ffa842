"""Examines a RabbitMQ: whether its exchanges route, and its queues keep, what the relay hands over.

AMQP tells whether a name exists and little else; arguments, policies and alarms are known to the management interface
(`rabbitmq-plugins enable rabbitmq_management`). It is asked with the login of the broker, at the broker's own host
unless the option ``management`` names another address.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote, urlsplit

from outboxkit.brokers.rabbitmq.publish import RabbitPublisher
from outboxkit.brokers.rabbitmq.subscribe import queue_of
from outboxkit.errors import ConfigurationError
from outboxkit.findings import Finding, note, problem, warning
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.brokers import Expected
    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = ["QueueFacts", "evaluate", "examine"]

_PATIENCE: Final = timedelta(seconds=10)
_LARGEST_ANSWER: Final = 64 << 20
_PORTS: Final = {"amqp": ("http", 15672), "amqps": ("https", 15671)}
_LIMITED_SINCE: Final = 4  # the version from which on a quorum queue drops after 20 deliveries by default
_DEFAULT_LIMIT: Final = 20

_Json = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueFacts:
    """Facts about one queue.

    Attributes:
        name: of the queue.
        kind: ``quorum``, ``classic``, ``stream``.
        durable: whether it outlives the broker.
        is_ours: whether a consumer of outboxkit reads it.
        set: what arguments and policies say, without ``x-``.
        version: the broker's first number.
    """

    name: str
    kind: str
    durable: bool
    is_ours: bool
    set: Mapping[str, Any]
    version: int


def evaluate(queue: QueueFacts) -> Iterator[Finding]:
    """Yields what is wrong with a queue. Pure."""
    name = f"the queue {queue.name}"
    anew = f"delete it when it is empty, and run outboxkit init --topology (or declare {queue.name} anew)"
    if not queue.durable:
        yield problem("queue-not-durable", f"{name} ends with the broker, and its messages with it", anew)
    if queue.is_ours and queue.kind != "quorum":
        yield warning("queue-not-quorum", f"{name} is a {queue.kind} queue: it dies with its node", anew)
    if queue.is_ours and queue.set.get("single-active-consumer") is not True:
        yield problem("queue-order", f"{name} has no single active consumer: two reverse the order of a key", anew)
    yield from _losses(queue, name)


def _losses(queue: QueueFacts, name: str) -> Iterator[Finding]:
    """Ways in which a queue drops messages by itself; with a dead-letter exchange they are at least somewhere."""
    if "dead-letter-exchange" in queue.set:
        if queue.set.get("dead-letter-strategy") != "at-least-once":
            seen = f"{name} dead-letters at most once: what it moves may be lost on the way"
            yield note(
                "dead-letter-strategy", seen, "set dead-letter-strategy at-least-once and overflow reject-publish"
            )
        return
    exchange = "or give it a dead-letter-exchange that you watch"
    default = _DEFAULT_LIMIT if queue.kind == "quorum" and queue.version >= _LIMITED_SINCE else None
    limit = queue.set.get("delivery-limit", default)
    if limit is not None and 0 <= limit < 1_000_000:  # noqa: PLR2004  ours are above: a limit that is never reached
        seen = f"{name} drops a message after {limit} deliveries, and has no dead-letter exchange"
        yield problem("delivery-limit", seen, f"remove the delivery-limit (-1 since RabbitMQ 4), {exchange}")
    length = next((one for one in ("max-length", "max-length-bytes") if one in queue.set), None)
    if length and queue.set.get("overflow", "drop-head") == "drop-head":
        seen = f"{name} drops its oldest messages above {length} {queue.set[length]}"
        yield problem("queue-length", seen, f"remove {length}, {exchange}")
    age = next((one for one in ("message-ttl", "expires") if one in queue.set), None)
    if age:
        seen = f"{name} drops messages after {age} {queue.set[age]} ms"
        yield problem("queue-age", seen, f"remove {age}, {exchange}")


def examine(settings: Settings, expected: Expected) -> Iterator[Finding]:
    """Yields what is wrong with the broker for these topics and consumers. Blocks for some seconds at most."""
    present, found = _missing(settings, expected)
    yield from found
    if any(one.check == "broker" for one in found):
        return
    ask = _Management(settings)
    try:
        overview, nodes = ask("overview"), ask("nodes")
        queues = {one["name"]: one for one in ask("queues", vhost=True)}
        exchanges = {one["name"]: one for one in ask("exchanges", vhost=True)}
        bindings = ask("bindings", vhost=True)
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        yield note(
            "management-away",
            f"arguments, policies and alarms of RabbitMQ were not examined: {ask.address} {_why(error)}",
            "run rabbitmq-plugins enable rabbitmq_management, or set management in [broker]",
        )
        return
    yield from _nodes(nodes)
    yield from _exchanges(present, exchanges, bindings)
    version = int(str(overview.get("rabbitmq_version", "0")).partition(".")[0])
    for name, is_ours in sorted(_concerned(expected, queues, bindings).items()):
        yield from evaluate(_facts(queues[name], is_ours=is_ours, version=version))


def _missing(settings: Settings, expected: Expected) -> tuple[set[str], list[Finding]]:
    """Looks each destination up over AMQP; returns those that exist, and what is wrong."""
    names = {*expected.topics, *(queue for one in expected.subscriptions for queue in _queues_of(one))}
    publisher = RabbitPublisher(settings)
    try:
        troubles = publisher.check(names or {"outboxkit"}, _PATIENCE)
    except ConfigurationError as error:
        return set(), [problem("broker", error.message, "correct broker_url, its login or its virtual host")]
    finally:
        publisher.close()
    found = []
    for name, trouble in sorted(troubles.items()):
        if trouble.failure is not Failure.UNKNOWN_TOPIC:
            return set(), [problem("broker", trouble.text, "start the broker, or correct broker_url and its login")]
        if name in names:
            fix = f"outboxkit init --topic {name}" if name in expected.topics else "outboxkit init --topology APP"
            found.append(problem("topic-missing", f"RabbitMQ has neither an exchange nor a queue {name}", fix))
    return names - troubles.keys(), found


def _queues_of(subscription: Any) -> list[str]:
    return [*(queue_of(topic, subscription.consumer) for topic in subscription.topics), *subscription.queues]


def _nodes(nodes: Sequence[_Json]) -> Iterator[Finding]:
    for node in nodes:
        for alarm, what in (("mem_alarm", "memory"), ("disk_free_alarm", "disk")):
            if node.get(alarm):
                seen = f"the node {node.get('name')} is short of {what}: the broker takes nothing"
                yield problem("broker-alarm", seen, f"free {what}, or raise the node's limit")
        if not node.get("running", True):
            yield warning("broker-node", f"the node {node.get('name')} does not run", "start it, or remove it")
    if len(nodes) == 1:
        yield note("single-broker", "the cluster has one node: what it loses is lost", "run three in production")


def _exchanges(present: set[str], exchanges: Mapping[str, _Json], bindings: Sequence[_Json]) -> Iterator[Finding]:
    bound = {one["source"] for one in bindings}
    for name in sorted(present & exchanges.keys()):
        exchange = exchanges[name]
        if not exchange.get("durable", True):
            seen = f"the exchange {name} ends with the broker"
            yield problem("exchange-not-durable", seen, f"delete it, and run outboxkit init --topic {name}")
        told = {**(exchange.get("arguments") or {}), **(exchange.get("policy_definition") or {})}
        other = told.get("alternate-exchange")
        if other:
            seen = f"the exchange {name} hands what nobody wants to {other}: a missing queue is not noticed"
            yield warning("alternate-exchange", seen, "remove its alternate-exchange, or watch the queue behind it")
        elif name not in bound:
            seen = f"no queue is bound to the exchange {name}: every event is refused, and waits"
            yield problem("exchange-unbound", seen, "start its consumers, or run outboxkit init --topology APP")


def _concerned(expected: Expected, queues: Mapping[str, _Json], bindings: Sequence[_Json]) -> dict[str, bool]:
    """The queues that get our messages, and whether a consumer of outboxkit reads each."""
    ours = {queue for one in expected.subscriptions for queue in _queues_of(one)}
    ours |= {queue_of(topic, name) for topic in expected.topics for name in expected.consumers}
    behind = {one["destination"] for one in bindings if one["source"] in expected.topics}
    names = (behind | ours | expected.topics) & queues.keys()
    return {name: name in ours for name in names}


def _facts(queue: _Json, *, is_ours: bool, version: int) -> QueueFacts:
    told = {**(queue.get("effective_policy_definition") or {})}
    told |= {name.removeprefix("x-"): value for name, value in (queue.get("arguments") or {}).items()}
    return QueueFacts(
        name=queue["name"],
        kind=queue.get("type", "classic"),
        durable=bool(queue.get("durable", True)),
        is_ours=is_ours,
        set=told,
        version=version,
    )


# --- the management interface ------------------------------------------------------------------------------------


class _Management:
    """Asks the management interface; no redirect is followed, and no proxy is taken."""

    def __init__(self, settings: Settings) -> None:
        scheme, port = _PORTS[settings.scheme]
        host = settings.nodes[0].rpartition(":")[0] or settings.nodes[0]
        parts = urlsplit(settings.management or f"{scheme}://{host}:{port}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigurationError("the rabbitmq option management must be an address such as http://host:15672")
        self.address = f"{parts.scheme}://{parts.hostname}:{parts.port or port}"
        self._open: Callable[[], http.client.HTTPConnection] = lambda: _connection(parts.scheme, self.address)
        self._vhost = quote(unquote(settings.path.removeprefix("/")) or "/", safe="")
        login = urlsplit(settings.urls()[0])
        pair = f"{unquote(login.username or 'guest')}:{unquote(login.password or 'guest')}"
        self._headers = {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    def __call__(self, what: str, *, vhost: bool = False) -> _Json:
        connection = self._open()
        try:
            connection.request("GET", f"/api/{what}{f'/{self._vhost}' if vhost else ''}", headers=self._headers)
            answer = connection.getresponse()
            body = answer.read(_LARGEST_ANSWER)
            if answer.status != http.client.OK:
                raise OSError(f"answers with HTTP {answer.status}")
            return json.loads(body)
        finally:
            connection.close()


def _connection(scheme: str, address: str) -> http.client.HTTPConnection:
    parts, seconds = urlsplit(address), _PATIENCE.total_seconds()
    if scheme == "http":
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
    context = ssl.create_default_context()
    return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=seconds, context=context)


def _why(error: Exception) -> str:
    """Words for a failure, without what a foreign answer says."""
    return str(error) if str(error).startswith("answers with") else f"cannot be asked ({type(error).__name__})"
