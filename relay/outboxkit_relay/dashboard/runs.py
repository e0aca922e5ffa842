"""Runs: replays that this process carries out, each in a thread of its own.

A process that dies leaves a replay where its table says; whoever presses "go on" carries out the rest.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from outboxkit.dead_letters import pace
from outboxkit.errors import OutboxKitError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from outboxkit.dead_letters.pace import Pace

__all__ = ["Runs"]

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Run:
    thread: threading.Thread
    leave: threading.Event


class Runs:
    """The replays under way here."""

    def __init__(self, engine: Engine, resolve: Callable[[str], str] | None) -> None:
        self._engine, self._resolve = engine, resolve
        self._lock = threading.Lock()
        self._runs: dict[UUID, _Run] = {}

    def start(self, replay_id: UUID, how: Pace, *, by: str) -> None:
        """Carries a replay out; does nothing when it is being carried out here already."""
        with self._lock:
            if self.is_running(replay_id):
                return
            leave = threading.Event()
            given = (replay_id, how, by, leave)
            thread = threading.Thread(target=self._run, args=given, name="outboxkit-replay", daemon=True)
            self._runs[replay_id] = _Run(thread, leave)
            thread.start()

    def is_running(self, replay_id: UUID) -> bool:
        """Tells whether a replay is being carried out here."""
        return (run := self._runs.get(replay_id)) is not None and run.thread.is_alive()

    def end(self, replay_id: UUID) -> None:
        """Leaves a replay after the portion at hand, and waits for that."""
        if (run := self._runs.pop(replay_id, None)) is not None:
            run.leave.set()
            run.thread.join()

    def close(self) -> None:
        """Leaves every replay."""
        for replay_id in list(self._runs):
            self.end(replay_id)

    def _run(self, replay_id: UUID, how: Pace, by: str, leave: threading.Event) -> None:
        try:
            pace.queue(self._engine, replay_id, how, by=by, resolve=self._resolve, leave=leave)
        except (SQLAlchemyError, OutboxKitError) as error:
            _log.warning("replay.cut_off", extra={"replay": str(replay_id), "error": type(error).__name__})
