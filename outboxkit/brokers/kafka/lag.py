"""Lag: messages between what is settled and the end of the log. The cluster is asked in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Set as AbstractSet
    from concurrent.futures import Future

    from outboxkit.brokers.kafka.progress import Progress
    from outboxkit.brokers.kafka.topics import Topics

__all__ = ["Lag"]

_AGAIN_SECONDS: Final = 5.0

Place = tuple[str, int]


class Lag:
    """Knows the ends of partitions as they were some seconds ago.

    What the client fetches is no measure: it fetches nothing while handlers are busy, which is when a lag grows.
    """

    def __init__(self, topics: Topics) -> None:
        self._topics = topics
        self._asked: Mapping[Place, Future[Any]] = {}
        self._ends: dict[Place, int] = {}
        self._again_at = 0.0

    def count(self, places: AbstractSet[Place], progress: Mapping[Place, Progress]) -> int | None:
        """Counts messages that are not settled; None while the cluster has not answered."""
        if self._asked and all(future.done() for future in self._asked.values()):
            answered = {place: future for place, future in self._asked.items() if future.exception() is None}
            self._ends, self._asked = {place: future.result().offset for place, future in answered.items()}, {}
        if places and not self._asked and time.monotonic() >= self._again_at:
            self._again_at = time.monotonic() + _AGAIN_SECONDS
            self._asked = self._topics.ends(places)
        if not places <= self._ends.keys():
            return None
        # Of a partition without progress nothing has come since it is ours: the group stands at its end.
        return sum(max(0, self._ends[place] - progress[place].position) for place in places if place in progress)
