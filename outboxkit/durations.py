"""Durations, counted in buckets: what relays and consumers measure, and what Prometheus reads. Pure."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Final

__all__ = ["LIMITS", "Distribution", "Durations"]

LIMITS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  #: seconds


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram of durations.

    Attributes:
        counts: observations up to each of `LIMITS`, and above the last one.
        total: seconds of all of them.
    """

    counts: tuple[int, ...] = (0,) * (len(LIMITS) + 1)
    total: float = 0.0


@dataclass(slots=True)
class Durations:
    """Counts durations; one thread adds, any thread reads."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(LIMITS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one; a clock that went back makes it zero."""
        seconds = max(0.0, seconds)
        self.counts[bisect_left(LIMITS, seconds)] += 1
        self.total += seconds

    @property
    def now(self) -> Distribution:
        """The histogram so far."""
        return Distribution(tuple(self.counts), self.total)
