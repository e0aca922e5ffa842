"""The thread behind the dispatcher: what it was told, what it reports, and when it counts as finished."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, NullPool, create_engine

from outboxkit_relay.daemon.db_thread import DatabaseThread
from tests.deadlines import DEADLINE


class Reports:
    """What a worker has reported; the first report is held back until it is let through."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.begun, self.through = threading.Event(), threading.Event()

    def __call__(self, found: Any) -> None:
        self.begun.set()
        assert self.through.wait(DEADLINE)
        self.found.append(found)


@contextmanager
def working(reports: Reports) -> Iterator[DatabaseThread]:
    engine = create_engine("sqlite://", poolclass=NullPool)  # its connection ends in the thread that made it
    with DatabaseThread("test", engine.connect, reports) as worker:
        yield worker
    engine.dispose()


def fails(_connection: Connection, argument: object) -> object:
    raise ValueError(argument)


def answers(_connection: Connection, argument: object) -> object:
    return argument


@pytest.mark.parametrize("task", [answers, fails])
def test_a_worker_has_finished_only_when_it_has_reported(task: Any) -> None:
    """Whoever waits for it empties the queue of reports next: a later one would speak of a world that is gone."""
    reports, when_finished = Reports(), list[int]()
    with working(reports) as worker:
        worker.do(task, "what was asked")
        assert reports.begun.wait(DEADLINE)

        def wait() -> None:
            worker.finish()
            when_finished.append(len(reports.found))

        waits = threading.Thread(target=wait)
        waits.start()
        waits.join(0.1)  # a worker that counts as finished already lets it end now
        reports.through.set()
        waits.join(DEADLINE)

    assert when_finished == [1]


def test_after_a_failure_nothing_is_done_until_somebody_has_waited() -> None:
    reports = Reports()
    reports.through.set()
    with working(reports) as worker:
        worker.do(fails, "first")
        assert reports.begun.wait(DEADLINE)
        worker.do(answers, "meant for a world that is gone")
        worker.finish()
        worker.do(answers, "second")
        worker.finish()

    assert [str(found) for found in reports.found] == ["first", "second"]
