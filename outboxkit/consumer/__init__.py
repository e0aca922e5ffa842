"""The consumer: receives deliveries, handles each once in a transaction of its own, and gives up on none silently.

Files, in reading order: `handlers` (the user's functions), `reading` (what a delivery is), `protocol` and `core` (what
becomes of it: pure decisions), `process` (one message, one transaction), `settle` (carries decisions out), `retries`
(the waiting room), `quarantine` (operators' verbs for held keys), `crash_marker` (finds the message that kills the
process), `run` (one run, from start to stop), `transactions` (sessions, threads and patience), `observe/` (numbers,
durations, standing).
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from outboxkit import brokers
from outboxkit.brokers import Subscriber, Subscription
from outboxkit.consumer.config import PREFETCH, PREFETCH_BYTES, ConsumerConfig, beginning, choice, counts, spans, switch
from outboxkit.consumer.handlers import Handlers, MessageContext, Want
from outboxkit.consumer.observe.order_check import OrderCheck
from outboxkit.consumer.observe.stats import ConsumerStats, Tally
from outboxkit.consumer.protocol import ConsumerPolicy, WhileWaiting
from outboxkit.consumer.reading import Expired, Ordering, Reading, extractor_of
from outboxkit.consumer.run import Run
from outboxkit.consumer.transactions import Transactions
from outboxkit.dead_letters.topic_copy import DeadLetterTopic
from outboxkit.errors import ConfigurationError
from outboxkit.events import EventType, event_type
from outboxkit.policy import Followers, RetryPolicy

if TYPE_CHECKING:
    from collections import Counter

    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
    from sqlalchemy.orm import Session, sessionmaker

    from outboxkit.brokers import Credentials
    from outboxkit.dead_letters.letter import DeadLetter

__all__ = ["Consumer", "ConsumerConfig", "MessageContext"]

F = TypeVar("F", bound=Callable[..., Any])
Finder = Callable[..., object]  #: of the message, or of the message and the delivery


class Consumer:
    """Handlers under one name, with one inbox.

    Args:
        name: who handles: part of the inbox key, Kafka group id, part of the RabbitMQ queue's name.
        sessions: an ``async_sessionmaker`` for coroutine handlers, a ``sessionmaker`` for plain ones.
        retry: how patient to be with a message that fails; by default for about half an hour.
        timeout: for one call of a handler; a plain function cannot be interrupted, but is rolled back afterwards.
        concurrency: how many keys are handled at the same time.
        batch: how many messages share one transaction as long as all goes well; when one fails they are handled singly.
        ordering: ``key`` keeps the order of each key; ``none`` handles every message by itself.
        while_waiting: ``block`` lets the later messages of a key wait behind one that is tried again; ``skip`` lets
            them go on.
        on_dead: what the later messages of a key do when one dies: ``skip`` (they go on), ``park`` (they wait for an
            operator), ``block`` (the message never dies).
        expired: ``skip`` counts and acknowledges messages whose time is over, ``dead`` makes dead letters of them,
            ``handle`` handles them.
        patience: how old a message may become by `MessageContext.later`.
        drain: how long a stop waits for the messages that are under way.
        prefetch: messages in hand at most.
        prefetch_bytes: bytes of their payloads at most; one message is always taken.
        resolve: schema text for a fingerprint that the database does not know.
        message_id: finds the id of a foreign message without one: a function of the message, or of the message and the
            delivery; ``"place"`` takes topic, partition and offset.
        type_of: finds the type of a foreign message, in the same way.
        check_order: log and count (``out of order``) each message that takes effect after a later one of its key.
        copy_to: also copy dead letters to this topic, through the outbox: a topic, or a `DeadLetterTopic` with a header
            style.
        keep_error_text: letters keep the texts of errors, which may quote data; without it only classes and places.
        start: where a consumer begins that the broker does not know: with all that it has (``earliest``), with what
            comes from now on (``latest``), or at an instant. RabbitMQ knows ``earliest`` only: what is in the queue.
        credentials: gives the `Login`, or for Kafka the `Token` (OAUTHBEARER), of each new connection to the broker,
            instead of what its URL says.

    Attributes:
        name: as given.

    Raises:
        ConfigurationError: an argument that is not one of the above; says which, and what is allowed.
    """

    def __init__(
        self,
        name: str,
        *,
        sessions: sessionmaker[Session] | async_sessionmaker[AsyncSession],
        retry: RetryPolicy | None = None,
        timeout: timedelta | str = "30s",
        concurrency: int = 16,
        batch: int = 1,
        ordering: Literal["key", "none"] = "key",
        while_waiting: Literal["block", "skip"] = "block",
        on_dead: Literal["skip", "park", "block"] = "skip",
        expired: Literal["skip", "dead", "handle"] = "skip",
        patience: timedelta | str = "1d",
        drain: timedelta | str = "20s",
        prefetch: int = PREFETCH,
        prefetch_bytes: int = PREFETCH_BYTES,
        resolve: Callable[[str], str] | None = None,
        message_id: Finder | Literal["place"] | None = None,
        type_of: Finder | None = None,
        check_order: bool = False,
        copy_to: DeadLetterTopic | str | None = None,
        keep_error_text: bool = False,
        start: Literal["earliest", "latest"] | datetime = "earliest",
        credentials: Credentials | None = None,
    ) -> None:
        _check(name, sessions, retry, ("resolve", resolve), ("credentials", credentials))
        self.name, self._tally, self._credentials = name, Tally(), credentials
        self._config: dict[str, Any] = {
            **{"name": name, "sessions": sessions, "resolve": resolve, "start": beginning(start)},  # noqa: PIE800
            "policy": ConsumerPolicy(
                retry=retry or RetryPolicy(),
                on_dead=choice("on_dead", on_dead, Followers),
                while_waiting=choice("while_waiting", while_waiting, WhileWaiting),
                **counts(concurrency=concurrency, batch=batch),
                **spans(patience=patience),
            ),
            **spans(timeout=timeout, drain=drain),
            **counts(prefetch=prefetch, prefetch_bytes=prefetch_bytes),
            "copy_to": _topic(copy_to),
            "keep_error_text": switch("keep_error_text", keep_error_text),
            "order_check": OrderCheck() if switch("check_order", check_order) else None,
        }
        self._reading: dict[str, Any] = {
            "in_order": choice("ordering", ordering, Ordering) is Ordering.KEY,
            "message_id": extractor_of("message_id", message_id),
            "type_of": extractor_of("type_of", type_of),
            "expired": choice("expired", expired, Expired),
        }
        self._handlers, self._hooks, self._topics, self._queues = Handlers(), {}, (), ()

    _hooks: dict[str, Callable[[DeadLetter], Any]]
    _topics: tuple[str, ...]
    _queues: tuple[str, ...]

    def __repr__(self) -> str:
        sources = [*self._topics, *(f"queue {queue}" for queue in self._queues)]
        return f"<Consumer {self.name!r}: {len(list(self._handlers))} handlers of {', '.join(sources) or 'nothing'}>"

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
            handler = self._handlers.add(function, topic or queue, contract)
            wants = {want for _, want in handler.wants}
            if not Transactions.is_async(self._config["sessions"]) and (
                inspect.iscoroutinefunction(function) or Want.ASYNC_SESSION in wants
            ):
                raise ConfigurationError(
                    f"{function.__qualname__} is a coroutine or wants an AsyncSession: give an async_sessionmaker"
                )
            self._topics = tuple(dict.fromkeys((*self._topics, topic))) if topic else self._topics
            self._queues = tuple(dict.fromkeys((*self._queues, queue))) if queue else self._queues
            return function

        return register

    def on_dead_letter(self, what: type | EventType) -> Callable[[F], F]:
        """Registers what to do when a message of this type has died: called once, after the commit, best effort."""

        def register(function: F) -> F:
            self._hooks[(event_type(what) if isinstance(what, type) else what).name] = function
            return function

        return register

    @property
    def config(self) -> ConsumerConfig:
        """The settings and handlers as one frozen value, as they are now."""
        return ConsumerConfig(
            reading=Reading(handlers=self._handlers, queues=self._queues, **self._reading),
            topics=self._topics,
            queues=self._queues,
            dead_letter_hooks=dict(self._hooks),
            tally=self._tally,
            **self._config,
        )

    @property
    def stats(self) -> ConsumerStats:
        """Numbers, durations and standing in this process, as one frozen value; any thread may ask."""
        return self._tally.stats(self.name, self._config["policy"].concurrency)

    @property
    def counts(self) -> Counter[str]:
        """Outcomes of messages, since the start of the process."""
        return self._tally.counts

    def resolve_with(self, resolve: Callable[[str], str]) -> None:
        """Takes a look-up of schemas for what the database does not know, unless one was given when it was made."""
        if self._config["resolve"] is None:
            self._config["resolve"] = resolve

    @property
    def subscription(self) -> Subscription:
        """Topics and queues, under the consumer's name."""
        return self.config.subscription

    def open_subscriber(
        self, url: str, options: Mapping[str, str] | None = None, *, credentials: Credentials | None = None
    ) -> Subscriber:
        """Returns what it receives from; nothing is connected yet.

        Args:
            url: of the broker.
            options: client settings by their own names.
            credentials: the login of each new connection, unless the consumer has credentials of its own.

        Raises:
            ConfigurationError: the URL or an option is wrong, or an extra is missing.
        """
        chosen = self._credentials or credentials
        return brokers.open_subscriber(url, self.subscription, options, credentials=chosen)

    async def run(
        self,
        broker: str | Subscriber,
        stop: asyncio.Event | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Handles messages until ``stop`` is set or the task is cancelled.

        After a stop no message is begun; those under way have ``drain`` to end, the rest is given back to the broker.

        Guarantee: what was not acknowledged comes again; what was has its effect, waits or is a dead letter.

        Raises:
            ConfigurationError: the tables are missing, the login was refused, a topic or queue is missing, the
                engine is in AUTOCOMMIT mode, or the consumer was renamed.
        """
        subscriber = self.open_subscriber(broker, options) if isinstance(broker, str) else broker
        await Run(self.config, subscriber, stop or asyncio.Event()).work()


def _topic(copy_to: object) -> DeadLetterTopic | None:
    if copy_to is None or isinstance(copy_to, DeadLetterTopic):
        return copy_to
    if not isinstance(copy_to, str):
        raise ConfigurationError(f"copy_to is a topic or a DeadLetterTopic, not {copy_to!r}")
    return DeadLetterTopic(copy_to)


def _check(name: object, sessions: object, retry: object, *functions: tuple[str, object]) -> None:
    """Refuses what would be found out much later."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ConfigurationError(f"a consumer needs a name, got {name!r}")
    if not callable(sessions) or not hasattr(sessions, "kw"):
        raise ConfigurationError(f"{name}: sessions is a sessionmaker or an async_sessionmaker, not {sessions!r}")
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise ConfigurationError(f"{name}: retry is a RetryPolicy, not {retry!r}")
    if retry is not None and retry.followers is not None:
        raise ConfigurationError(f"{name}: RetryPolicy(followers=…) is the relay's; a Consumer has on_dead=…")
    for argument, function in functions:
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name}: {argument} is a function, not {function!r}")
