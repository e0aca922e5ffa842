"""Search: letters, their number, and the groups of those that died of one cause."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from outboxkit import tables
from outboxkit.dead_letters.letter import DeadLetter, Filter, letter_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["IN_ORDER", "count", "find", "get", "in_order"]

_LETTERS: Final = tables.dead_letters
#: the original order of the letters of one key, oldest first; what has no position is told apart by its times
IN_ORDER: Final = (
    _LETTERS.c.source_position.asc().nulls_last(),
    _LETTERS.c.first_failed_at,
    _LETTERS.c.died_at,
    _LETTERS.c.id,
)


def find(connection: Connection, which: Filter, *, limit: int | None = 100) -> list[DeadLetter]:
    """Finds letters, the newest first.

    Transaction: joins the caller's; reads only.
    """
    query = select(_LETTERS).where(which.clause()).order_by(_LETTERS.c.died_at.desc(), _LETTERS.c.id).limit(limit)
    return [letter_of(row._asdict()) for row in connection.execute(query)]


def count(connection: Connection, which: Filter) -> int:
    """Counts the letters that `find` would find without a limit.

    Transaction: joins the caller's; reads only.
    """
    return connection.execute(select(func.count()).select_from(_LETTERS).where(which.clause())).scalar_one()


def get(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    """Returns one letter, or None.

    Transaction: joins the caller's; reads only.
    """
    found = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id)).one_or_none()
    return None if found is None else letter_of(found._asdict())


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
