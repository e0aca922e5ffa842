"""Search: letters, their number, and the groups of those that died of one cause."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import and_, case, func, select, update

from outboxkit import tables
from outboxkit._sql import Instant, database_now
from outboxkit.dead_letters.letter import DeadLetter, Filter, letter_of
from outboxkit.dialects import insert_ignoring, naming_missing_tables

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import ColumnElement, Connection

__all__ = ["IN_ORDER", "Group", "annotate", "count", "family", "find", "get", "groups", "ids", "in_order"]

_LETTERS: Final = tables.dead_letters
_NOTES: Final = tables.dead_letter_groups
_TREND: Final = timedelta(hours=1)
_SAME: Final = ("side", "consumer", "topic", "type", "failure", "stage", "error_class", "error")
#: the original order of the letters of one key, oldest first; what has no position is told apart by its times
IN_ORDER: Final = (
    _LETTERS.c.source_position.asc().nulls_last(),
    _LETTERS.c.first_failed_at,
    _LETTERS.c.died_at,
    _LETTERS.c.id,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Letters that died of one cause.

    Attributes:
        group: names the cause.
        count: how many there are.
        first_seen: when the first one died.
        last_seen: when the latest one died.
        last_hour: how many died in the last hour; with ``hour_before`` it is the trend.
        hour_before: how many died in the hour before that.
        error: the words of one of them.
        note: what people know about it.
        owner: who looks after it.
    """

    group: str
    count: int
    first_seen: datetime
    last_seen: datetime
    last_hour: int
    hour_before: int
    side: str
    consumer: str
    topic: str
    type: str
    failure: str
    stage: str
    error_class: str
    error: str
    note: str
    owner: str


@naming_missing_tables()
def find(
    connection: Connection, which: Filter, *, limit: int | None = 100, among: int | None = None
) -> list[DeadLetter]:
    """Finds letters, the newest first.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        which: a choice of letters.
        limit: at most so many.
        among: looks only among so many of the newest in that state, whatever the table holds.
    """
    where = _chosen(connection, which, among)
    query = select(_LETTERS).where(where).order_by(_LETTERS.c.died_at.desc(), _LETTERS.c.id).limit(limit)
    return [letter_of(row._asdict()) for row in connection.execute(query)]


@naming_missing_tables()
def ids(connection: Connection, which: Filter, *, among: int | None = None) -> list[UUID]:
    """Returns the ids of letters, in the original order of each key.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        which: a choice of letters.
        among: as in `find`.
    """
    return list(connection.scalars(select(_LETTERS.c.id).where(_chosen(connection, which, among)).order_by(*IN_ORDER)))


@naming_missing_tables()
def family(connection: Connection, letter: DeadLetter) -> list[DeadLetter]:
    """Returns the letters of one message, the oldest first: those that its replays came from, those that they became.

    Transaction: joins the caller's; reads only.
    """
    older, newer = [letter], [letter]
    while (parent := older[-1].parent_id) and (found := get(connection, parent)):
        older.append(found)
    while children := find(connection, Filter(state=None, parent_id=newer[-1].id), limit=1):
        newer += children
    return [*reversed(older[1:]), *newer]


@naming_missing_tables()
def count(connection: Connection, which: Filter) -> int:
    """Counts the letters that `find` would find without a limit.

    Transaction: joins the caller's; reads only.
    """
    return connection.execute(select(func.count()).select_from(_LETTERS).where(which.clause())).scalar_one()


@naming_missing_tables()
def get(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    """Returns one letter, or None.

    Transaction: joins the caller's; reads only.
    """
    found = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id)).one_or_none()
    return None if found is None else letter_of(found._asdict())


@naming_missing_tables()
def groups(connection: Connection, which: Filter, *, limit: int = 100, among: int | None = None) -> list[Group]:
    """Groups letters by their cause, the largest first.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        which: a choice of letters.
        limit: at most so many groups.
        among: as in `find`.
    """
    recent = _LETTERS.c.died_at >= database_now(-_TREND)
    before = and_(~recent, _LETTERS.c.died_at >= database_now(-2 * _TREND))
    counted = (
        select(
            _LETTERS.c.group,
            func.count().label("count"),
            func.min(_LETTERS.c.died_at, type_=Instant()).label("first_seen"),
            func.max(_LETTERS.c.died_at, type_=Instant()).label("last_seen"),
            func.sum(case((recent, 1), else_=0)).label("last_hour"),
            func.sum(case((before, 1), else_=0)).label("hour_before"),
            # Of a group all these are the same, but for words and lines of code, which any letter may tell.
            *(func.max(_LETTERS.c[name]).label(name) for name in _SAME),
        )
        .where(_chosen(connection, which, among))
        .group_by(_LETTERS.c.group)
        .subquery()
    )
    query = (
        select(
            counted, func.coalesce(_NOTES.c.note, "").label("note"), func.coalesce(_NOTES.c.owner, "").label("owner")
        )
        .outerjoin(_NOTES, _NOTES.c.group == counted.c.group)
        .order_by(counted.c.count.desc(), counted.c.last_seen.desc(), counted.c.group)
        .limit(limit)
    )
    return [Group(**row) for row in connection.execute(query).mappings()]


def _chosen(connection: Connection, which: Filter, among: int | None) -> ColumnElement[bool]:
    """The condition of a filter, or of a filter among the newest letters in its state.

    Those are bounded by the time of the oldest of them, which the index on state and time tells: a list of their ids
    would be joined, over a scan of all letters.
    """
    if among is None:
        return which.clause()
    newest = select(_LETTERS.c.died_at).where(Filter(state=which.state).clause()).order_by(_LETTERS.c.died_at.desc())
    since = connection.execute(newest.offset(among - 1).limit(1)).scalar_one_or_none()
    return which.clause() if since is None else and_(which.clause(), _LETTERS.c.died_at >= since)


@naming_missing_tables()
def annotate(connection: Connection, group: str, *, by: str, note: str | None = None, owner: str | None = None) -> None:
    """Writes what people know about a group, and who looks after it; None leaves what is there.

    Transaction: joins the caller's; does not commit. Writes: ``dead_letter_groups``.
    """
    told = {name: text for name, text in (("note", note), ("owner", owner)) if text is not None}
    connection.execute(insert_ignoring(connection, _NOTES).values(group=group, set_by=by))
    values = {**told, "set_by": by, "set_at": database_now()}
    connection.execute(update(_NOTES).where(_NOTES.c.group == group).values(**values))


def in_order(connection: Connection, ids: Sequence[UUID], *, lock: bool = False) -> list[DeadLetter]:
    """Returns letters by their ids, in the original order of each key; ids without a letter are left out.

    Transaction: joins the caller's. Locks: the letters, if asked, in the order of their ids.
    """
    if lock:  # in one order, so that two replays do not lock crosswise
        connection.execute(
            select(_LETTERS.c.id).where(_LETTERS.c.id.in_(ids)).order_by(_LETTERS.c.id).with_for_update()
        )
    query = select(_LETTERS).where(_LETTERS.c.id.in_(ids)).order_by(*IN_ORDER)
    return [letter_of(row._asdict()) for row in connection.execute(query)]
