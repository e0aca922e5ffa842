"""A thread with a database connection of its own, which carries out one task after another."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["DatabaseThread"]

Task = tuple[Callable[[Any, Any], Any], Any]


class DatabaseThread:
    """One thread, one connection, one queue of tasks. Results and errors of tasks go to `report`.

    Used as a context manager: the thread and the connection live as long as the block. After a task has raised, the
    tasks behind it are dropped until `finish`: they were meant for a world that is gone.

    Args:
        name: of the thread.
        connect: opens the connection, on the thread.
        report: takes each result (a list is reported one by one), or the exception.
    """

    def __init__(self, name: str, connect: Callable[[], Connection], report: Callable[[Any], None]) -> None:
        self._name, self._connect, self._report = name, connect, report
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._working = self._broken = self._ending = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._tasks.clear()
        self._working = self._broken = self._ending = False
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with self._changed:
            self._ending = True
            self._tasks.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def do(self, function: Callable[[Any, Any], Any], argument: object) -> None:
        """Queues ``function(connection, argument)``."""
        with self._changed:
            self._tasks.append((function, argument))
            self._changed.notify_all()

    def take(self, limit: int, fits: Callable[[Any], bool]) -> list[Any]:
        """(on the thread) The arguments of the next tasks, as long as they fit: to be done together with this one."""
        taken: list[Any] = []
        with self._changed:
            while self._tasks and len(taken) < limit and fits(self._tasks[0][1]):
                taken.append(self._tasks.popleft()[1])
        return taken

    def finish(self) -> None:
        """Waits until nothing is queued or under way and all is reported; a worker that failed takes tasks again."""
        with self._changed:
            self._changed.wait_for(lambda: (self._broken or not self._tasks) and not self._working)
            self._tasks.clear()
            self._broken = False

    def _run(self) -> None:
        connection: Connection | None = None
        try:
            while (task := self._next()) is not None:
                try:
                    connection = connection or self._connect()
                    found = task[0](connection, task[1])
                # Reported first: who waits for the end of a task finds its result, and nothing comes after that.
                except BaseException as error:  # noqa: BLE001  reported to the dispatcher, which raises it
                    self._report(error)
                    self._done(broken=True)
                else:
                    for item in found if isinstance(found, list) else [found]:
                        self._report(item)
                    self._done(broken=False)
        finally:
            if connection is not None:
                connection.close()

    def _next(self) -> Task | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ending or (self._tasks and not self._broken))
            if self._ending:
                return None
            self._working = True
            return self._tasks.popleft()

    def _done(self, *, broken: bool) -> None:
        with self._changed:
            self._working, self._broken = False, broken
            self._changed.notify_all()
