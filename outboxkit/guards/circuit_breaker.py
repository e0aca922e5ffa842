"""A circuit breaker: a destination that refuses too much of what it gets is left alone for a while. Pure.

It comes on top of the pause that every trouble of a destination brings: a single refusal pauses for a moment, with full
jitter; a rate of refusals opens the circuit. When that time is over, a few messages probe the destination (half-open):
if they get through the circuit is closed and the window forgotten, else it is open again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from outboxkit.errors import ConfigurationError
from outboxkit.policy import duration, whole

__all__ = ["Breaker", "CircuitRule", "CircuitState"]

_SLICES: Final = 10  # of a window: it forgets in steps of a tenth


class CircuitState(StrEnum):
    """Whether a destination is used."""

    CLOSED = "closed"  #: as usual
    HALF_OPEN = "half-open"  #: a few messages find out whether it works again
    OPEN = "open"  #: not at all


@dataclass(frozen=True, slots=True, kw_only=True)
class CircuitRule:
    """When a circuit opens, and for how long.

    Attributes:
        failure_rate: share of a window's messages that must be refused to open it, above 0, at most 1.
        window: how far it looks back; text such as ``30s`` is read.
        open_for: how long it stays open; likewise.
        min_messages: messages that a window must have: a few say nothing about a rate.

    Raises:
        ConfigurationError: a value is not one of these.
    """

    failure_rate: float = 0.5
    window: timedelta = timedelta(seconds=30)
    open_for: timedelta = timedelta(seconds=5)
    min_messages: int = 20

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", duration(self.window, name="CircuitRule(window=…)"))
        object.__setattr__(self, "open_for", duration(self.open_for, name="CircuitRule(open_for=…)"))
        whole("CircuitRule(min_messages=…)", self.min_messages, minimum=1)
        rate: object = self.failure_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ConfigurationError(f"CircuitRule(failure_rate=…) is above 0 and at most 1, got {rate!r}")


@dataclass(slots=True)
class _Slice:
    since: datetime
    passed: int = 0
    refused: int = 0


@dataclass(slots=True)
class Breaker:
    """The circuit of one destination.

    Attributes:
        rule: what it goes by.
        open: whether it has opened, and no probe has got through since.
    """

    rule: CircuitRule
    open: bool = False
    _slices: deque[_Slice] = field(default_factory=deque)

    def passed(self, number: int, now: datetime) -> None:
        """So many messages were acknowledged, in a batch without a refusal: a probe closes the circuit."""
        if self.open:
            self.open = False
            self._slices.clear()
        self._slice(now).passed += number

    def refused(self, number: int, passed: int, now: datetime) -> bool:
        """So many of a batch were refused, the others passed; whether the circuit is open now."""
        latest = self._slice(now)
        latest.refused += number
        latest.passed += passed
        refused = sum(one.refused for one in self._slices)
        total = refused + sum(one.passed for one in self._slices)
        self.open = self.open or (total >= self.rule.min_messages and refused >= self.rule.failure_rate * total)
        return self.open

    def _slice(self, now: datetime) -> _Slice:
        """The window's latest part; what is older than the window is forgotten."""
        while self._slices and self._slices[0].since <= now - self.rule.window:
            self._slices.popleft()
        if not self._slices or self._slices[-1].since <= now - self.rule.window / _SLICES:
            self._slices.append(_Slice(now))
        return self._slices[-1]
