"""Sentences: one way to say what is wrong with a destination or a consumer, for log, probes and ``status``. Pure.

A sentence says which one, since when, why, what was tried, and what to do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Final

from outboxkit.policy import Failure
from outboxkit.rows import CutOff, Dependency
from outboxkit_relay.observe.stats import Unavailable

__all__ = ["from_text", "rounded", "sentence", "sentence_of_consumer", "to_text"]

_WHAT_TO_DO: Final = {
    Failure.BROKER_DOWN: "start the broker, or mend the way to it: the relay tries again by itself",
    Failure.UNKNOWN_TOPIC: "create it (outboxkit init --topology), or stop writing to it: it is wrong until then",
    Failure.UNROUTABLE: "bind a queue to it, or start its consumer: it is wrong until then",
    Failure.UNAUTHORIZED: "correct the login, or give it the right to write there: it is wrong until then",
    Failure.BLOCKED: "the broker is short of memory or disk: free some, the relay goes on by itself",
    Failure.REFUSING: "look at the broker's log: a limit is reached, the relay tries again by itself",
    Failure.INDETERMINATE: "look at the broker's log: its connections break, the relay sends again by itself",
}
_WITHOUT: Final = {
    Dependency.BROKER: "start the broker, or mend the way to it: the consumer tries again by itself",
    Dependency.DATABASE: "start the database, or mend the way to it: the consumer tries again by itself",
    Dependency.REGISTRY: "start the registry, or mend the way to it: the consumer tries again by itself",
}
_AFTER_A_KILL: Final = "; Kafka takes those of a killed consumer back after its session.timeout.ms, 45 s by default"
_LOOK: Final = "look at the log of the relay"
_USUAL_START: Final = timedelta(seconds=10)
_MINUTE: Final = timedelta(minutes=2)
_HOUR: Final = timedelta(hours=2)


def sentence(found: Unavailable, now: datetime) -> str:
    """One line for a person: ``orders: Kafka at … did not answer; for 40 s, 7 tries; start the broker, …``."""
    tries = "1 try" if found.tries == 1 else f"{found.tries:,} tries"
    known = {failure.value: text for failure, text in _WHAT_TO_DO.items()}
    age, advice = rounded(now - found.since), known.get(found.failure, _LOOK)
    return f"{found.topic}: {found.reason}; for {age}, {tries}; {advice}"


def sentence_of_consumer(name: str, found: CutOff, now: datetime) -> str:
    """One line for a person: ``billing: RabbitMQ at … is away; for 40 s; start the broker, …``."""
    if found.is_new and not found.reason:
        cause = _AFTER_A_KILL if now - found.since > _USUAL_START else ""
        return f"{name}: starting for {rounded(now - found.since)}; it waits for its first partitions or queues{cause}"
    is_starting = "starting; " if found.is_new else ""
    return f"{name}: {is_starting}{found.reason}; for {rounded(now - found.since)}; {_WITHOUT[found.of]}"


def rounded(time: timedelta) -> str:
    """An age in one unit, so that a sentence stays the same for a while: ``40 s``, ``12 min``, ``3 h``."""
    seconds = max(0, int(time.total_seconds()))
    if time < _MINUTE:
        return f"{seconds} s"
    return f"{seconds // 60} min" if time < _HOUR else f"{seconds // 3600} h"


def to_text(unavailable: Iterable[Unavailable]) -> str:
    """The form in which a relay keeps it beside its lease."""
    return json.dumps([asdict(one) | {"since": one.since.isoformat()} for one in unavailable])


def from_text(text: str | None) -> list[Unavailable]:
    """The inverse of `to_text`; what cannot be read, another version may have written: it is left out."""
    try:
        found = json.loads(text or "[]")
        return [Unavailable(**{**one, "since": datetime.fromisoformat(one["since"])}) for one in found]
    except (ValueError, TypeError, KeyError):
        return []
