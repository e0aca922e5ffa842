"""Reading: what the page asks of the database beyond what the commands ask. Every statement is bounded.

A table of five million rows is looked at through an index, or its newest rows are; what is counted is counted to a
bound, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import Integer, and_, case, cast, func, literal, select

from outboxkit import dead_letters, outbox, tables
from outboxkit._legible import Lost, flaw_of, legible
from outboxkit._sql import Instant, database_now, list_length, seconds_between
from outboxkit.dead_letters import DeadLetter, Filter, Group, State
from outboxkit.dead_letters.plan import Outcome
from outboxkit.inbox.rename import IS_START
from outboxkit_relay.dashboard.search import DEAD, PENDING, Search
from outboxkit_relay.store.unpublished import place_of

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection, Select

__all__ = [
    "BUCKETS",
    "MAX_LETTERS",
    "ConsumerRow",
    "Found",
    "MessageRow",
    "audit_log",
    "consumers",
    "deaths",
    "find",
    "groups",
    "left_out",
    "letters",
    "now",
    "open_letters",
    "sent",
]

BUCKETS: Final = 30  #: minutes of a rate's history
MAX_LETTERS: Final = 10_000  #: newest ones that are looked at where no index helps
MAX_COUNTED: Final = 100_000

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_LETTERS: Final = tables.dead_letters
_LEDGER: Final = tables.outbox_ledger
_AUDIT: Final = tables.outbox_audit
_MINUTE: Final = 60
_SHOWN: Final = ("message_id", "topic", "key", "type", "recorded_at")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageRow:
    """A message in a list.

    Attributes:
        id: empty when the row has none.
        since: None when it has no instant.
        letter: the dead letter that it became.
        due_at: when it goes out, or is tried again.
    """

    id: str
    state: str
    topic: str
    type: str
    key: bytes | None
    since: datetime | None
    due_at: datetime | None = None
    error: str = ""
    letter: UUID | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """The messages of a search: those that wait, the oldest first, then the dead, the newest first; and whether all."""

    rows: list[MessageRow]
    is_cut: bool


def find(connection: Connection, wanted: Search, *, limit: int) -> Found:
    """Finds messages that are not published yet, and dead ones.

    Transaction: joins the caller's; reads only. Index used: the primary keys, in their order; of the letters the one on
    state and time, or on the message's id.
    """
    rows: list[MessageRow] = []
    if wanted.state in (None, PENDING):
        rows += [_row(row, PENDING) for row in connection.execute(_unpublished(_HOT, wanted, limit))]
    if wanted.state not in (PENDING, DEAD):
        rows += [_row(row, row.reason) for row in connection.execute(_unpublished(_WAITING, wanted, limit))]
    if wanted.state in (None, DEAD):
        rows += [_of_letter(letter) for letter in _dead(connection, wanted, limit)]
    return Found(rows[:limit], len(rows) > limit)


def _unpublished(table: Any, wanted: Search, limit: int) -> Select[Any]:
    (at,) = table.primary_key.columns
    names = (*_SHOWN, "reason", "due_at", "error") if table is _WAITING else _SHOWN
    where = [
        table.c[name] == value for name in ("topic", "type", "key") if (value := getattr(wanted, name)) is not None
    ]
    if wanted.id is not None:
        where.append(table.c.message_id == outbox.stored_id(wanted.id))
    if wanted.age is not None:
        where.append(table.c.recorded_at <= database_now(-wanted.age))
    if table is _WAITING and wanted.state is not None:
        where.append(_WAITING.c.reason == wanted.state)
    return (
        select(at.label("at"), *(legible(table.c[name]) for name in names)).where(*where).order_by(at).limit(limit + 1)
    )


def _dead(connection: Connection, wanted: Search, limit: int) -> list[DeadLetter]:
    which = Filter(
        state=None if wanted.id is not None else State.DEAD,
        topic=wanted.topic,
        type=wanted.type,
        key=wanted.key,
        message_id=wanted.id,
        until=None if wanted.age is None else connection.execute(select(database_now(-wanted.age))).scalar_one(),
    )
    return letters(connection, which, limit=limit + 1)


def _row(row: Any, state: str) -> MessageRow:
    told = row._asdict()
    flaw = flaw_of(told)
    return MessageRow(
        id="" if isinstance(row.message_id, Lost) else str(row.message_id),
        state=state,
        topic=row.topic,
        type=row.type,
        key=row.key,
        since=_instant(row.recorded_at),
        due_at=_instant(told.get("due_at")),
        error=f"{place_of(state, row.at)}: {flaw}" if flaw else told.get("error") or "",
    )


def _instant(value: datetime | Lost | None) -> datetime | None:
    return None if isinstance(value, Lost) else value


def _of_letter(letter: DeadLetter) -> MessageRow:
    return MessageRow(
        id=letter.message_id,
        state=letter.state.value,
        topic=letter.topic,
        type=letter.type,
        key=letter.key,
        since=letter.died_at or letter.first_failed_at or datetime.min,  # noqa: DTZ901  neither is null in the table
        error=f"{letter.error_class}: {letter.error}",
        letter=letter.id,
    )


# --- dead letters ------------------------------------------------------------------------------------------------


def letters(connection: Connection, which: Filter, *, limit: int) -> list[DeadLetter]:
    """Finds letters, the newest first, among the newest `MAX_LETTERS`; one that is named by its message anywhere.

    Transaction: joins the caller's; reads only.
    """
    return dead_letters.find(connection, which, limit=limit, among=None if which.message_id else MAX_LETTERS)


def groups(connection: Connection, which: Filter, *, limit: int = 100) -> list[Group]:
    """Groups the newest `MAX_LETTERS` letters by their cause, the largest first.

    Transaction: joins the caller's; reads only.
    """
    return dead_letters.groups(connection, which, limit=limit, among=MAX_LETTERS)


def open_letters(connection: Connection) -> int:
    """Counts open letters, to a bound.

    Transaction: joins the caller's; reads only. Index used: the one on state and time.
    """
    some = select(literal(1)).select_from(_LETTERS).where(_LETTERS.c.state == State.DEAD).limit(MAX_COUNTED).subquery()
    return connection.execute(select(func.count()).select_from(some)).scalar_one()


# --- rates -------------------------------------------------------------------------------------------------------


def sent(connection: Connection, now: datetime) -> list[float]:
    """Counts the messages that brokers have confirmed, minute by minute, the latest last.

    Transaction: joins the caller's; reads only. Index used: the ledger's on the time.
    """
    return _by_minute(connection, now, _LEDGER.c.published_at, func.sum(list_length(_LEDGER.c.partitions)))


def deaths(connection: Connection, now: datetime) -> list[float]:
    """Counts the letters that were written, minute by minute, the latest last.

    Transaction: joins the caller's; reads only. Index used: the letters' on state and time.
    """
    return _by_minute(connection, now, _LETTERS.c.died_at, func.count(), _LETTERS.c.state.in_(list(State)))


def _by_minute(
    connection: Connection,
    now: datetime,
    time: ColumnElement[datetime],
    *rest: ColumnElement[Any],
) -> list[float]:
    number, *where = rest
    # Bound values: a clock that is a function of the database would keep every index from being used.
    minutes = (cast(seconds_between(time, literal(now, Instant())), Integer) // _MINUTE).label("ago")
    recent = time > now - timedelta(minutes=BUCKETS)
    query = select(minutes, number.label("number")).where(recent, *where).group_by(minutes)
    found = {row.ago: float(row.number) for row in connection.execute(query)}
    return [found.get(ago, 0.0) for ago in reversed(range(BUCKETS))]


def audit_log(connection: Connection, *, limit: int) -> list[Any]:
    """Returns the latest entries of the audit log.

    Transaction: joins the caller's; reads only.
    """
    return list(connection.execute(select(_AUDIT).order_by(_AUDIT.c.id.desc()).limit(limit)))


# --- consumers and replays ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerRow:
    """A consumer, by what its processes told last.

    Attributes:
        running: processes with a heartbeat.
        in_hand: messages that they handle now.
        lag: messages that wait at the broker, where it is known.
        trouble: what keeps one of them from working.
    """

    consumer: str
    running: int
    in_hand: int
    lag: int | None
    trouble: str


def consumers(connection: Connection, now: datetime) -> list[ConsumerRow]:
    """Lists the consumers of which a process was seen within a day.

    Transaction: joins the caller's; reads only.
    """
    starts = tables.inbox_consumers.c
    runs = and_(starts.expires_at > now, starts.stopped_at.is_(None))
    query = (
        select(
            starts.consumer,
            func.sum(case((runs, 1), else_=0)).label("running"),
            func.sum(case((runs, starts.in_hand), else_=0)).label("in_hand"),
            func.sum(case((runs, starts.lag))).label("lag"),
            func.max(case((runs, starts.trouble))).label("trouble"),
        )
        .where(starts.expires_at > now - timedelta(days=1), IS_START)
        .group_by(starts.consumer)
        .order_by(starts.consumer)
    )
    return [ConsumerRow(**{**row, "trouble": row["trouble"] or ""}) for row in connection.execute(query).mappings()]


def left_out(connection: Connection, replay_id: UUID, *, limit: int) -> list[tuple[UUID, str, str]]:
    """Returns letters of a replay that were not queued: number, outcome, reason.

    Transaction: joins the caller's; reads only.
    """
    items = tables.dead_letter_replay_items.c
    not_queued = and_(items.replay_id == replay_id, items.outcome.in_([Outcome.REFUSED, Outcome.GONE]))
    query = select(items.letter_id, items.outcome, items.reason).where(not_queued).order_by(items.number).limit(limit)
    return [(row.letter_id, row.outcome, row.reason) for row in connection.execute(query)]


def now(connection: Connection) -> datetime:
    """Returns the time by the database's clock."""
    return connection.execute(select(database_now())).scalar_one()
