"""Renames a consumer: everything that is kept under its name, in one transaction.

A new name alone is a new consumer: it reads everything again, and everything takes effect again. With its rows a name
takes along what it has handled, what waits, its dead letters and the schemas that it reads with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import delete, func, insert, or_, select, update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection

__all__ = ["Renaming", "look", "rename"]

_RUNS: Final = tables.inbox_consumers.c
_LETTERS: Final = tables.dead_letters.c
_REPLAYING: Final = "replaying"
#: A new name may have these: the starts of a run that found nothing, and what it said of its schemas.
_HARMLESS: Final = ("inbox_consumers", "outbox_schemas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """A renaming that was looked at.

    Attributes:
        old: the name so far.
        new: the name to be.
        rows: how many rows of each table go along.
        refusal: why it cannot be done, empty when it can.
    """

    old: str
    new: str
    rows: Mapping[str, int]
    refusal: str


def look(connection: Connection, old: str, new: str) -> Renaming:
    """Counts the rows, and says whether they may be renamed.

    Transaction: joins the caller's; only reads.

    Raises:
        ConfigurationError: the new name is no name of a consumer, or is the old one.
    """
    if not new.strip() or "\0" in new:
        raise ConfigurationError(f"a consumer needs a name, got {new!r}")
    if new == old:
        raise ConfigurationError(f"{old} has this name already")
    rows = _rows(connection, old)
    return Renaming(old=old, new=new, rows=rows, refusal=_refusal(connection, old, new, rows))


def rename(connection: Connection, old: str, new: str, *, by: str, why: str = "") -> Renaming:
    """Renames a consumer, unless `look` has an objection; the broker is told by hand.

    Transaction: joins the caller's; does not commit. Writes: every table with a consumer, and ``outbox_audit``.
    Guarantee: all rows or none; a run that began meanwhile is an objection, too.

    Raises:
        ConfigurationError: as `look`; or a run began, or a row of the new name came, while the rows were renamed.
    """
    found = look(connection, old, new)
    if found.refusal:
        return found
    known = tables.outbox_schemas  # it says again at its start what it reads with
    connection.execute(delete(known).where(known.c.consumer == new))
    for column in _columns():
        connection.execute(update(column.table).where(column == old).values({column.name: new}))
    if running := _running(connection, old, new):
        raise ConfigurationError(f"{running}: stop it; nothing was renamed")
    target = f"consumer {old} to {new}"
    entry = {"who": by, "action": "consumer.rename", "target": target, "why": why}
    connection.execute(insert(tables.outbox_audit).values(**entry))
    return found


def _columns() -> list[Column[str]]:
    """Columns that hold a consumer's name; the one of a replay's receiver among them."""
    named = [table.c.consumer for table in tables.METADATA.sorted_tables if "consumer" in table.c]
    return [*named, _LETTERS.replay_to]


def _rows(connection: Connection, name: str) -> dict[str, int]:
    return {
        column.table.name: connection.scalars(select(func.count()).where(column == name)).one()
        for column in _columns()
        if column.name == "consumer"
    }


def _refusal(connection: Connection, old: str, new: str, rows: Mapping[str, int]) -> str:
    if not any(rows.values()):
        return f"nothing is known of {old}"
    if running := _running(connection, old, new):
        return f"{running}: stop it first"
    is_of_either = or_(_LETTERS.consumer.in_([old, new]), _LETTERS.replay_to.in_([old, new]))
    under_way = select(func.count()).where(_LETTERS.state == _REPLAYING, is_of_either)
    if replaying := connection.scalars(under_way).one():
        return f"{replaying:,} dead letters are being replayed: wait for them, or discard them"
    taken = {name: number for name, number in _rows(connection, new).items() if number and name not in _HARMLESS}
    if taken:
        there = ", ".join(f"{number:,} in {name}" for name, number in taken.items())
        return f"{new} has rows of its own ({there}): two consumers cannot become one"
    return ""


def _running(connection: Connection, old: str, new: str) -> str:
    alive = select(_RUNS.consumer, _RUNS.host).where(_RUNS.consumer.in_([old, new]), _RUNS.expires_at > database_now())
    found = connection.execute(alive.order_by(_RUNS.started_at)).all()
    return f"{found[0].consumer} runs on {found[0].host}" if found else ""
