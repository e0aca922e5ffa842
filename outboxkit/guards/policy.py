"""A guard's decisions: may a call begin, how long may it take, and what its end means. Pure: ``now`` is an argument.

A guard has at most four limits, asked in this order: the circuit, the rate, the number of calls at a time, and the time
of one call. State belongs to one process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from math import inf

from outboxkit.errors import ConfigurationError
from outboxkit.guards.circuit_breaker import Breaker, CircuitRule, CircuitState
from outboxkit.guards.token_bucket import TokenBucket
from outboxkit.policy import whole

__all__ = ["GuardLimits", "Refusal", "Refused", "State"]


class Refusal(StrEnum):
    """The limit that a call met."""

    CIRCUIT = "circuit"  #: too many calls failed: none is made for a while
    RATE = "rate"  #: too many calls in this second
    BULKHEAD = "bulkhead"  #: too many calls at a time
    DEADLINE = "deadline"  #: the time of the whole operation is over


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardLimits:
    """The limits of a guard; None means no limit.

    Attributes:
        timeout: time for one call.
        circuit: the rule of its circuit breaker.
        bulkhead: calls at a time.
        rate: calls a second.
    """

    timeout: timedelta | None = None
    circuit: CircuitRule | None = None
    bulkhead: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        rate: object = self.rate
        if self.bulkhead is not None:
            whole("guard(bulkhead=…)", self.bulkhead, minimum=1)
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < inf):
            raise ConfigurationError(f"guard(rate=…) takes calls a second, above 0, got {rate!r}")
        if not isinstance(self.circuit, CircuitRule | None):
            raise ConfigurationError(f"guard(breaker=…) takes a CircuitRule, got {self.circuit!r}")


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that may not begin.

    Attributes:
        why: the limit.
        retry_after: when it may help to ask again.
    """

    why: Refusal
    retry_after: timedelta


@dataclass(slots=True)
class State:
    """The state of one guard.

    Attributes:
        limits: its limits.
        running: calls under way.
        open_until: end of the time in which the circuit lets no call through; None while it is closed.
        probing: a call under way finds out whether the circuit may close.
    """

    limits: GuardLimits
    running: int = 0
    open_until: datetime | None = None
    probing: bool = False
    breaker: Breaker | None = field(init=False)
    bucket: TokenBucket | None = field(init=False)

    def __post_init__(self) -> None:
        self.breaker = Breaker(self.limits.circuit) if self.limits.circuit else None
        self.bucket = TokenBucket(self.limits.rate) if self.limits.rate else None

    def circuit(self, now: datetime) -> CircuitState:
        """The circuit as it is now."""
        if self.open_until is None:
            return CircuitState.CLOSED
        return CircuitState.OPEN if now < self.open_until else CircuitState.HALF_OPEN

    def begin(self, now: datetime, deadline: datetime | None) -> timedelta | Refused | None:
        """Admits a call: returns its time, None for no limit, or why it may not begin."""
        if deadline is not None and now >= deadline:
            return Refused(Refusal.DEADLINE, timedelta(0))
        circuit = self.circuit(now)
        if self.open_until is not None and (circuit is CircuitState.OPEN or self.probing):
            return Refused(Refusal.CIRCUIT, max(timedelta(0), self.open_until - now))
        if self.limits.bulkhead is not None and self.running >= self.limits.bulkhead:
            return Refused(Refusal.BULKHEAD, timedelta(0))
        if self.bucket is not None:
            if not self.bucket.allow(1, now):
                return Refused(Refusal.RATE, self.bucket.ready_at - now)
            self.bucket.take(1)
        self.running += 1
        self.probing = circuit is CircuitState.HALF_OPEN
        left = None if deadline is None else deadline - now
        times = [time for time in (self.limits.timeout, left) if time is not None]
        return min(times, default=None)

    def end(self, now: datetime, *, failed: bool) -> None:
        """Records the end of a call."""
        self.running -= 1
        self.probing = False
        if self.breaker is None:
            return
        if failed:
            if self.breaker.refused(1, 0, now):
                self.open_until = now + self.breaker.rule.open_for
        else:
            self.breaker.passed(1, now)
            self.open_until = None
