"""Runs: replays that this process carries out, each in a thread of its own.

A process that dies leaves a replay where its table says; whoever presses "go on" carries out the rest.
"""

from __future__ import annotations

import logging
import threading
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


class Runs:
    """The replays under way here."""

    def __init__(self, engine: Engine, resolve: Callable[[str], str] | None) -> None:
        self._engine, self._resolve = engine, resolve
        self._lock = threading.Lock()
        self._threads: dict[UUID, threading.Thread] = {}
        self._leave = threading.Event()

    def start(self, replay_id: UUID, how: Pace, *, by: str) -> None:
        """Carries a replay out; does nothing when it is being carried out here already."""
        with self._lock:
            if replay_id in self._threads:
                return
            thread = threading.Thread(target=self._run, args=(replay_id, how, by), name="outboxkit-replay", daemon=True)
            self._threads[replay_id] = thread
            thread.start()

    def is_running(self, replay_id: UUID) -> bool:
        """Tells whether a replay is being carried out here."""
        return replay_id in self._threads

    def close(self) -> None:
        """Leaves every replay after the portion at hand, and waits for that."""
        self._leave.set()
        for thread in list(self._threads.values()):
            thread.join()

    def _run(self, replay_id: UUID, how: Pace, by: str) -> None:
        try:
            pace.queue(self._engine, replay_id, how, by=by, resolve=self._resolve, leave=self._leave)
        except (SQLAlchemyError, OutboxKitError) as error:
            _log.warning("replay.cut_off", extra={"replay": str(replay_id), "error": type(error).__name__})
        finally:
            del self._threads[replay_id]
