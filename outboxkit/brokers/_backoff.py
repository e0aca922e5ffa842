"""Waits between attempts to reach a broker. Pure: the instants are arguments, chance is given."""

from __future__ import annotations

import random
from typing import Final

__all__ = ["Reconnects"]

_BASE_SECONDS: Final = 0.1
_CAP_SECONDS: Final = 5.0
_STEPS: Final = 10  # doublings; far above the cap


class Reconnects:
    """Decides when to try again: later and later under full jitter, until an attempt was good for something.

    The delay is drawn once for each failure and kept: who asks in short intervals waits no longer than who waits once.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0
        self._not_before = 0.0

    @property
    def failures(self) -> int:
        """Number of failures in a row."""
        return self._failures

    def failed(self, now: float) -> None:
        """Notes a failure: no connection, or one that was lost before it was good for anything."""
        self._failures += 1
        ceiling = min(_CAP_SECONDS, _BASE_SECONDS * 2 ** min(self._failures, _STEPS))
        self._not_before = now + ceiling * self._rng.random()

    def succeeded(self) -> None:
        """Notes that something was settled."""
        self._failures = 0

    def left(self, now: float) -> float:
        """Seconds until the next attempt, 0 when it may begin."""
        return max(0.0, self._not_before - now)
