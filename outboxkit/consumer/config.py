"""A consumer's settings as one frozen value: what a run is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from outboxkit.brokers import Start, Subscription
from outboxkit.consumer.handlers import Handlers
from outboxkit.consumer.observe.stats import Tally
from outboxkit.consumer.protocol import ConsumerPolicy
from outboxkit.consumer.reading import Reading
from outboxkit.errors import ConfigurationError
from outboxkit.policy import duration, whole

if TYPE_CHECKING:
    from collections import Counter
    from enum import StrEnum

    from outboxkit.consumer.observe.order_check import OrderCheck
    from outboxkit.consumer.transactions import Sessions
    from outboxkit.dead_letters.letter import DeadLetter
    from outboxkit.dead_letters.topic_copy import DeadLetterTopic

__all__ = ["PREFETCH", "PREFETCH_BYTES", "ConsumerConfig", "beginning", "choice", "counts", "spans", "switch"]

PREFETCH: Final = 500  #: deliveries in hand
PREFETCH_BYTES: Final = 32 * 1024 * 1024  #: of their payloads


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerConfig:
    """Settings of a consumer, as a run reads them.

    Attributes:
        name: who handles.
        sessions: of the user.
        policy: how the core decides.
        reading: how deliveries are read.
        timeout: for one call of a handler.
        drain: how long a stop waits for what is under way.
        prefetch: deliveries in hand at most.
        prefetch_bytes: their payloads; one delivery is always taken.
        resolve: schema text for a fingerprint that the database does not know.
        copy_to: where dead letters are copied to.
        keep_error_text: whether letters keep the texts of errors.
        start: where it begins when the broker does not know it.
        topics: event topics it reads.
        queues: command queues it reads.
        dead_letter_hooks: by type.
        order_check: watches the order, when asked to.
        tally: counts and durations, shared with the consumer.
        schemas: texts that were found, by fingerprint.
    """

    name: str
    sessions: Sessions
    policy: ConsumerPolicy
    reading: Reading
    timeout: timedelta
    drain: timedelta
    prefetch: int = PREFETCH
    prefetch_bytes: int = PREFETCH_BYTES
    resolve: Callable[[str], str] | None = None
    copy_to: DeadLetterTopic | None = None
    keep_error_text: bool = False
    start: Start = "earliest"
    topics: tuple[str, ...] = ()
    queues: tuple[str, ...] = ()
    dead_letter_hooks: dict[str, Callable[[DeadLetter], Any]] = field(default_factory=dict)
    order_check: OrderCheck | None = None
    tally: Tally = field(default_factory=Tally)
    schemas: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """Outcomes of messages."""
        return self.tally.counts

    @property
    def handlers(self) -> Handlers:
        """By topic and type."""
        return self.reading.handlers

    @property
    def subscription(self) -> Subscription:
        """Topics and queues, under the consumer's name."""
        return Subscription(consumer=self.name, topics=self.topics, queues=self.queues, start=self.start)


def choice(name: str, value: str, kind: type[StrEnum]) -> Any:
    """Returns a choice as its enum.

    Raises:
        ConfigurationError: none of the choices.
    """
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(repr(one.value) for one in kind)
        raise ConfigurationError(f"{name} is one of {known}, not {value!r}") from None


def counts(**given: object) -> dict[str, Any]:
    """Returns whole numbers from 1, by their names.

    Raises:
        ConfigurationError: not a whole number, or below 1.
    """
    for name, value in given.items():
        whole(name, value, minimum=1)
    return given


def beginning(start: object) -> Any:
    """Returns a start.

    Raises:
        ConfigurationError: neither earliest nor latest nor an aware datetime.
    """
    if start in ("earliest", "latest") or (isinstance(start, datetime) and start.tzinfo is not None):
        return start
    raise ConfigurationError(f"start is 'earliest', 'latest' or a datetime with a time zone, not {start!r}")


def switch(name: str, value: bool) -> bool:  # noqa: FBT001  a check of exactly that
    """Returns a switch.

    Raises:
        ConfigurationError: neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} is True or False, not {value!r}")
    return value


def spans(**given: timedelta | str) -> dict[str, Any]:
    """Returns durations, by their names.

    Raises:
        ConfigurationError: not a duration; says which setting it is.
    """
    return {name: duration(value, name=name) for name, value in given.items()}
