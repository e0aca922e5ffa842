"""A token bucket, which bounds the rate of a destination. Pure: ``now`` is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["TokenBucket"]

_BURST: Final = 0.1  # seconds of the rate that may go out at once: batches, and yet an even flow
_EMPTY_SINCE: Final = datetime.min.replace(tzinfo=UTC)


@dataclass(slots=True)
class TokenBucket:
    """Lets ``rate`` messages a second through, in bursts of at most a tenth of a second's worth, at least one message.

    Attributes:
        rate: messages a second, above 0.
        tokens: messages that may go now, as of `at`.
        at: when `tokens` was right.
        ready_at: when it makes sense to ask again, after it has let nothing through.
    """

    rate: float
    tokens: float = 0.0
    at: datetime = _EMPTY_SINCE
    ready_at: datetime = _EMPTY_SINCE

    @property
    def burst(self) -> float:
        """The most that it lets through at once."""
        return max(1.0, self.rate * _BURST)

    def allow(self, wanted: int, now: datetime) -> int:
        """Returns how many of ``wanted`` messages may go now: all, or a whole burst, or none until `ready_at`."""
        self.tokens = min(self.burst, self.tokens + max(0.0, (now - self.at).total_seconds()) * self.rate)
        self.at = now
        needed = min(float(wanted), self.burst)
        if self.tokens >= needed:
            return min(wanted, int(self.tokens))
        self.ready_at = now + timedelta(seconds=(needed - self.tokens) / self.rate, microseconds=1)
        return 0

    def take(self, number: int) -> None:
        """So many went."""
        self.tokens -= number
