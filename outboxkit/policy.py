"""Decisions: what a failure means, when to try again, when to give up. Pure: ``now`` and ``rng`` are arguments.

Trouble has one of two addresses. *Destination* trouble (broker away, unroutable, not allowed …) says nothing about the
message: the destination is paused and no attempt is spent. *Message* trouble spends attempts and ends as a dead letter.
An outage is never poison.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from outboxkit.errors import ConfigurationError, DecodeError, InboxConflict, SchemaError

__all__ = [
    "Backoff",
    "Bury",
    "Done",
    "Failure",
    "Followers",
    "Order",
    "OutageLog",
    "PauseDestination",
    "Resend",
    "Retry",
    "RetryPolicy",
    "Verdict",
    "duration",
    "full_jitter",
    "verdict",
    "whole",
]


class Failure(StrEnum):
    """Reason why a message was not published or not handled; adapters choose it from a table, never by text."""

    BROKER_DOWN = "broker-down"
    UNROUTABLE = "unroutable"
    UNKNOWN_TOPIC = "unknown-topic"
    UNAUTHORIZED = "unauthorized"
    BLOCKED = "blocked"
    REFUSING = "refusing"
    INDETERMINATE = "indeterminate"  #: perhaps stored, perhaps not: send again, the inbox removes the copy
    TOO_LARGE = "too-large"
    INVALID = "invalid"
    REJECTED = "rejected"
    FENCED = "fenced"  #: another producer took over: stop all work
    HANDLER = "handler"  #: the consumer's handler raised
    TIMEOUT = "timeout"  #: the handler did not end in time
    POISON = "poison"  #: it can never be handled: undecodable, incompatible, or declared so by the handler
    CONFLICT = "conflict"  #: a known id with other content
    CRASH = "crash"  #: the process died while handling it

    @property
    def of_destination(self) -> bool:
        """Whether the destination is in trouble, and not the message."""
        return self in _DESTINATION

    @property
    def is_final(self) -> bool:
        """Whether trying again cannot help."""
        return self in _FINAL


_DESTINATION: Final = frozenset(
    {
        Failure.BROKER_DOWN,
        Failure.UNROUTABLE,
        Failure.UNKNOWN_TOPIC,
        Failure.UNAUTHORIZED,
        Failure.BLOCKED,
        Failure.REFUSING,
    },
)
_FINAL: Final = frozenset({Failure.TOO_LARGE, Failure.INVALID, Failure.POISON, Failure.CONFLICT})


class Order(StrEnum):
    """Amount of a key that may be in flight at once."""

    PIPELINED = "pipelined"  #: followers may be in flight; one that the broker refuses can be overtaken
    STRICT = "strict"  #: the next one goes out after the previous one is acknowledged


class Followers(StrEnum):
    """Fate of the later messages of a key whose head is dead."""

    PARK = "park"  #: they wait until an operator releases, skips or repairs
    SKIP = "skip"  #: they go on
    BLOCK = "block"  #: the head never dies: it is tried for ever


@dataclass(frozen=True, slots=True)
class Done:
    """It is published or handled."""


@dataclass(frozen=True, slots=True)
class Resend:
    """The outcome is unknown: send again at once, no attempt is spent."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Try this message again at an instant; an attempt is spent."""

    at: datetime


@dataclass(frozen=True, slots=True)
class PauseDestination:
    """Stop using the destination until an instant; no attempt is spent."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Bury:
    """Make it a dead letter."""

    reason: Failure
    followers: Followers


Verdict = Done | Resend | Retry | PauseDestination | Bury


_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION: Final = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*(ms|s|m|h|d)", re.ASCII)
_MAX_DURATION: Final = timedelta(days=36_525)  # a century: any instant plus it can still be written down


def duration(value: timedelta | str, *, name: str = "") -> timedelta:
    """Reads a positive duration: a timedelta, or a text such as ``250ms``, ``30s``, ``5m``, ``1h``, ``14d``.

    Args:
        value: the duration.
        name: of the argument, for the error.

    Raises:
        ConfigurationError: it is neither, not positive, or longer than a century.
    """
    of = f"{name}: " if name else ""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if not match:
            raise ConfigurationError(f"{of}expected a duration such as 250ms, 30s, 5m, 1h or 14d, got {value!r:.80}")
        seconds = float(match[1]) * _UNITS[match[2]]
        value = timedelta(seconds=min(seconds, 2 * _MAX_DURATION.total_seconds()))
    if not isinstance(value, timedelta):
        raise ConfigurationError(f"{of}expected a timedelta, or a text such as 30s or 5m, got {value!r:.80}")
    if value <= timedelta(0):
        raise ConfigurationError(f"{of}expected a duration above zero, got {value}")
    if value > _MAX_DURATION:
        raise ConfigurationError(f"{of}expected a duration of at most {_MAX_DURATION.days}d, got a longer one")
    return value


def whole(what: str, value: object, *, minimum: int = 0) -> None:
    """Checks a whole number.

    Raises:
        ConfigurationError: it is none, or below the minimum.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ConfigurationError(f"{what} takes a whole number from {minimum}, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays that grow exponentially under full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015:
    sleep = random(0, min(cap, base · 2^n)).

    Attributes:
        base: upper bound of the first delay; text such as ``100ms`` is read.
        cap: upper bound of every delay; likewise.
        attempts: how many delayed retries there are, from 0.

    Raises:
        ConfigurationError: a duration is not positive, the cap is below the base, or attempts is not a whole number.
    """

    base: timedelta
    cap: timedelta
    attempts: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", duration(self.base, name="Backoff(base=…)"))
        object.__setattr__(self, "cap", duration(self.cap, name="Backoff(cap=…)"))
        whole("Backoff(attempts=…)", self.attempts)
        if self.cap < self.base:
            raise ConfigurationError(f"a backoff's cap is at least its base: got base {self.base} and cap {self.cap}")

    def delay(self, attempt: int, rng: random.Random) -> timedelta:
        """The delay after the given failed attempt (1 is the first)."""
        # 2**30 is above every sensible cap / base and keeps the product inside a timedelta.
        ceiling: timedelta = min(self.cap, self.base * 2 ** min(attempt - 1, 30))
        jitter: float = rng.random()
        return ceiling * jitter


def full_jitter(base: timedelta | str, *, cap: timedelta | str, attempts: int) -> Backoff:
    """Makes a backoff by full jitter: ``full_jitter("1s", cap="5m", attempts=8)``.

    Raises:
        ConfigurationError: a duration is not positive, or attempts is below 1.
    """
    whole("full_jitter(attempts=…)", attempts, minimum=1)
    return Backoff(base=duration(base, name="base"), cap=duration(cap, name="cap"), attempts=attempts)


_ALWAYS_POISON: Final = (DecodeError, SchemaError, InboxConflict)


@dataclass(slots=True)
class OutageLog:
    """The count of tries during one outage: it is told once when it begins, and once when it is over.

    Attributes:
        backoff: how long to wait between two tries.
        failures: failed tries in a row.
    """

    backoff: Backoff
    failures: int = 0

    @property
    def has_just_begun(self) -> bool:
        """Whether the latest failure is the first one: worth a line in the log."""
        return self.failures == 1

    def failed(self, rng: random.Random) -> timedelta:
        """Counts a failed try; returns how long to wait before the next one."""
        self.failures += 1
        return self.backoff.delay(self.failures, rng)

    def over(self) -> int:
        """Ends the outage; returns its failed tries, 0 when there was none."""
        failures, self.failures = self.failures, 0
        return failures


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Number and times of the retries of a message in trouble.

    Attributes:
        immediate: retries at once, before any delay.
        delayed: the backoff after them; its ``attempts`` counts delayed retries.
        poison: more exception classes for which no retry can help, one or several. `DecodeError`, `SchemaError` and
            `InboxConflict` always are such, and come first when it is read.
        followers: what happens to the key's later messages when a head dies; None parks them. For the relay: a consumer
            has ``on_dead``.

    Raises:
        ConfigurationError: an argument is of another kind, or negative.
    """

    immediate: int = 0
    delayed: Backoff = field(
        default=Backoff(base=timedelta(milliseconds=100), cap=timedelta(minutes=5), attempts=22),
    )
    poison: type[BaseException] | Collection[type[BaseException]] = ()
    followers: Followers | None = None

    def __post_init__(self) -> None:
        whole("RetryPolicy(immediate=…)", self.immediate)
        if not isinstance(self.delayed, Backoff):
            raise ConfigurationError(
                f"RetryPolicy(delayed=…) takes a Backoff such as full_jitter('1s', cap='5m', attempts=8), "
                f"got {self.delayed!r:.80}"
            )
        object.__setattr__(self, "poison", tuple(dict.fromkeys((*_ALWAYS_POISON, *_classes(self.poison)))))
        if self.followers is not None:
            object.__setattr__(self, "followers", _followers(self.followers))

    @property
    def poison_classes(self) -> tuple[type[BaseException], ...]:
        """Every exception class for which no retry can help, the built-in ones included."""
        return _classes(self.poison)

    @property
    def attempts(self) -> int:
        """Number of tries before a message dies, the first one included."""
        return 1 + self.immediate + self.delayed.attempts


# A final failure gets one more try alone: a broker may refuse a whole batch because of one message in it.
_TRIES_OF_A_FINAL_FAILURE: Final = 2


def verdict(  # noqa: PLR0917  the five things a decision depends on; all are always given
    outcome: Failure | None,
    attempt: int,
    policy: RetryPolicy,
    now: datetime,
    rng: random.Random,
) -> Verdict:
    """Decides what to do next with a message.

    Args:
        outcome: None for success, else why it failed.
        attempt: which try this was, the first is 1. For destination trouble: how often in a row it was in trouble.
        policy: how patient to be.
        now: the current instant.
        rng: source of the jitter.
    """
    if outcome is None:
        return Done()
    if outcome in (Failure.INDETERMINATE, Failure.FENCED):
        return Resend()
    if outcome.of_destination:
        return PauseDestination(now + policy.delayed.delay(attempt, rng))
    spent = attempt >= (_TRIES_OF_A_FINAL_FAILURE if outcome.is_final else policy.attempts)
    if spent and policy.followers is not Followers.BLOCK:
        return Bury(outcome, policy.followers or Followers.PARK)
    if attempt <= policy.immediate or (outcome.is_final and not spent):
        return Retry(now)
    return Retry(now + policy.delayed.delay(attempt - policy.immediate, rng))


# --- arguments ---------------------------------------------------------------------------------------------------


def _classes(poison: object) -> tuple[type[BaseException], ...]:
    """Exception classes, of which one may stand alone."""
    classes = (poison,) if isinstance(poison, type) else poison
    if isinstance(classes, str | bytes) or not isinstance(classes, Collection):
        raise ConfigurationError(f"RetryPolicy(poison=…) takes exception classes, got {poison!r}")
    for one in classes:
        if not isinstance(one, type) or not issubclass(one, BaseException):
            raise ConfigurationError(f"RetryPolicy(poison=…) takes exception classes, got {one!r}")
    return tuple(classes)


def _followers(followers: object) -> Followers:
    try:
        return Followers(followers)  # type: ignore[arg-type] # text from settings is read, too
    except ValueError as error:
        expected = ", ".join(repr(one.value) for one in Followers)
        raise ConfigurationError(f"RetryPolicy(followers=…) is one of {expected}, got {followers!r}") from error
