"""Runs of consumers, as the database knows them: who runs, how it stands, and what is wrong in one line each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import case, func, select, union_all

from outboxkit import tables
from outboxkit._sql import database_now, microseconds_of
from outboxkit.inbox.rename import IS_START
from outboxkit.inbox.rows import Standing, standing
from outboxkit.rows import UNREADABLE, CutOff, WaitReason, microseconds
from outboxkit_relay.observe.sentences import rounded, sentence_of_consumer
from outboxkit_relay.words import count

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

__all__ = ["ConsumerStatus", "Run", "RunState", "consumers", "problems"]

_RUNS: Final = tables.inbox_consumers
_ROOM: Final = tables.inbox_waiting
_HANDLED: Final = tables.inbox_messages.c
_MISSED: Final = timedelta(days=1)  # a run that vanished longer ago is history


class RunState(StrEnum):
    """Standing of a run, by its heartbeat."""

    STARTING = "starting"  #: it waits for its first partitions or queues
    RUNNING = "running"
    CUT_OFF = "cut off"  #: it gets no messages
    LOST = "lost"  #: it was not heard of any more, and has not stopped in order
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run of a consumer.

    Attributes:
        host: machine, process and start.
        state: how it stands.
        in_hand: deliveries that it has not settled.
        lag: messages that it has not read, None when its broker has not told.
        up_seconds: since its start.
        heard_seconds: since its heartbeat ended; negative while it counts.
        trouble: a sentence about what keeps it from handling, empty when nothing does.
    """

    host: str
    state: RunState
    in_hand: int
    lag: int | None
    up_seconds: float
    heard_seconds: float
    trouble: str = ""

    @property
    def is_alive(self) -> bool:
        """Whether its heartbeat counts."""
        return self.state not in (RunState.LOST, RunState.STOPPED)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerStatus:
    """A consumer over all its processes.

    Attributes:
        consumer: its name.
        handled: messages whose effect its inbox remembers.
        waiting: deliveries in its waiting room.
        busy: runs that are handling something.
        parked: keys whose dead head waits for an operator.
        overdue: heads whose next try is due.
        overdue_seconds: since when the first of them is.
        oldest_seconds: since the first failure, or the arrival, of what has waited longest.
        lag: messages that its living runs have not read, None when nobody knows.
        runs: the living ones; when there is none, the last one.
    """

    consumer: str
    handled: int
    waiting: int
    busy: int
    parked: int
    overdue: int
    overdue_seconds: float
    oldest_seconds: float
    lag: int | None
    runs: tuple[Run, ...]


def consumers(connection: Connection, now: datetime, *, handled: bool = True) -> list[ConsumerStatus]:
    """Reads all consumers that the database knows, by their names.

    Transaction: joins the caller's; only reads.

    Args:
        connection: the caller's.
        now: by the database's clock.
        handled: also count what their inboxes remember, which reads all of them.
    """
    marks, room = tables.inbox_batches.c, _ROOM.c
    known = (marks.consumer, room.consumer, *((_HANDLED.consumer,) if handled else ()))
    started = select(_RUNS.c.consumer).where(IS_START)
    names = union_all(started, *(select(column) for column in known)).subquery()
    found, waiting = _runs(connection, now), _waiting(connection, now)
    statuses = []
    for name in connection.scalars(select(names.c.consumer).distinct().order_by(names.c.consumer)):
        runs = _of_interest(found.get(name, ()))
        lags = [run.lag for run in runs if run.lag is not None and run.is_alive]
        statuses.append(
            ConsumerStatus(
                consumer=name,
                handled=_count(connection, _HANDLED.consumer == name, standing() == Standing.HANDLED) if handled else 0,
                busy=_count(connection, marks.consumer == name, marks.host != "", marks.expires_at > now),
                lag=sum(lags) if lags else None,
                runs=runs,
                **waiting.get(name, _NOTHING_WAITS),
            )
        )
    return statuses


def problems(found: Iterable[ConsumerStatus], patience: timedelta) -> Iterator[str]:
    """Says what is wrong with consumers, a sentence each.

    Args:
        found: all of them.
        patience: how long a start, or a retry that is due, may take.
    """
    for one in found:
        alive = [run for run in one.runs if run.is_alive]
        for run in alive:
            is_late = run.state is RunState.STARTING and run.up_seconds > patience.total_seconds()
            if run.state is RunState.CUT_OFF or is_late:
                yield run.trouble
        lost = next((run for run in one.runs if run.state is RunState.LOST), None)
        if lost is not None and lost.heard_seconds < _MISSED.total_seconds():
            since = rounded(timedelta(seconds=lost.heard_seconds))
            yield (
                f"{one.consumer}: nobody runs it; the run on {lost.host} vanished {since} ago: "
                "start it with `outboxkit consume`, and look at its log"
            )
        elif one.overdue and not alive and one.overdue_seconds > patience.total_seconds():
            yield (
                f"{one.consumer}: {count(one.overdue, 'message')} due for another try, and nobody runs it: "
                "start it with `outboxkit consume`"
            )


# --- reading -----------------------------------------------------------------------------------------------------

_NOTHING_WAITS: Final[dict[str, Any]] = {
    "waiting": 0,
    "parked": 0,
    "overdue": 0,
    "overdue_seconds": 0.0,
    "oldest_seconds": 0.0,
}


def _waiting(connection: Connection, now: datetime) -> dict[str, dict[str, Any]]:
    since, due = microseconds_of(_ROOM.c.first_failed_at), microseconds_of(_ROOM.c.due_at)
    is_due = _ROOM.c.due_at <= database_now()
    query = select(
        _ROOM.c.consumer,
        func.count().label("waiting"),
        func.count(case((_ROOM.c.reason == WaitReason.PARKED, 1))).label("parked"),
        func.count(case((is_due, 1))).label("overdue"),
        func.min(func.nullif(due, UNREADABLE), type_=due.type).label("due"),
        func.min(func.nullif(since, UNREADABLE), type_=since.type).label("since"),
    ).group_by(_ROOM.c.consumer)
    until = microseconds(now)

    def age(began: int | None) -> float:
        return 0.0 if began is None else max(0.0, (until - began) / 1e6)

    return {
        row.consumer: {
            "waiting": row.waiting,
            "parked": row.parked,
            "overdue": row.overdue,
            "overdue_seconds": age(row.due),
            "oldest_seconds": age(row.since),
        }
        for row in connection.execute(query)
    }


def _runs(connection: Connection, now: datetime) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for row in connection.execute(select(_RUNS).where(IS_START).order_by(_RUNS.c.consumer, _RUNS.c.started_at)):
        cut_off = CutOff.from_text(row.trouble, row.started_at)
        run = Run(
            host=row.host,
            state=_state(row, cut_off, now),
            in_hand=row.in_hand,
            lag=row.lag,
            up_seconds=round((now - row.started_at).total_seconds(), 1),
            heard_seconds=round((now - row.expires_at).total_seconds(), 1),
            trouble=sentence_of_consumer(f"{row.consumer} on {row.host}", cut_off, now) if cut_off else "",
        )
        found.setdefault(row.consumer, []).append(run)
    return found


def _state(row: Any, cut_off: CutOff | None, now: datetime) -> RunState:
    if row.stopped_at is not None:
        return RunState.STOPPED
    if row.expires_at <= now:
        return RunState.LOST
    if cut_off is None:
        return RunState.RUNNING
    return RunState.STARTING if cut_off.is_new else RunState.CUT_OFF


def _of_interest(runs: Iterable[Run]) -> tuple[Run, ...]:
    known = tuple(runs)
    return tuple(run for run in known if run.is_alive) or known[-1:]


def _count(connection: Connection, *of: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).where(*of)).scalar_one()
