"""Setup: what every view and every change of the page works with, and the history that sparklines need."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from outboxkit.dead_letters import Terms
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outboxkit_relay.dashboard.runs import Runs

__all__ = ["History", "Malformed", "NotFound", "Setup"]

_SAMPLES: Final = 120
_APART: Final = 2.0  # seconds: several visitors do not make the line run faster


class NotFound(ConfigurationError):
    """Nothing is at this address."""


class Malformed(ConfigurationError):
    """A field or an address holds a value that it can never have."""


class History:
    """Samples of what a database does not remember: how much was pending, and for how long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._at = float("-inf")
        self._samples: deque[tuple[float, float]] = deque(maxlen=_SAMPLES)

    def add(self, pending: float, oldest: float) -> None:
        """Adds a sample; one that comes soon after another takes its place."""
        with self._lock:
            now = self._clock()
            if now - self._at < _APART:
                self._samples.pop()
            else:
                self._at = now
            self._samples.append((pending, oldest))

    @property
    def pending(self) -> list[float]:
        """Numbers of pending messages, the latest last."""
        return [pending for pending, _ in list(self._samples)]

    @property
    def oldest(self) -> list[float]:
        """Ages of the oldest pending message in seconds, the latest last."""
        return [oldest for _, oldest in list(self._samples)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Everything that the page was given.

    Attributes:
        engine: of the outbox's database.
        patience: a message that is pending for longer is stuck.
        inbox_retention: how long inboxes remember.
        resolve: finds the schema that a dead message names, when no table has it.
        runs: replays that this process carries out.
        history: samples for sparklines.
    """

    engine: Engine
    patience: timedelta
    inbox_retention: timedelta
    resolve: Callable[[str], str] | None
    runs: Runs
    history: History = field(default_factory=History)

    def terms(self, *, force: bool = False) -> Terms:
        """The terms of a replay."""
        return Terms(force=force, resolve=self.resolve, inbox_retention=self.inbox_retention)
