"""Renames a consumer: everything that is kept under its name, in one transaction.

A new name alone is a new consumer: it reads everything again, and everything takes effect again. With its rows a name
takes along what it has handled, what waits, its dead letters and the schemas that it reads with.

A name is locked by a row of its own in ``inbox_consumers``, whose id is made of it. A run that begins holds that row
until its start is committed, a renaming holds those of both names; so each of them waits for the other, and sees what
it did. The old name's row stays, and says what the consumer is called now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from uuid import NAMESPACE_URL, UUID, uuid5

from sqlalchemy import delete, func, insert, or_, select, update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dialects import insert_ignoring, lock_patience
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Column, Connection

__all__ = ["IS_START", "Renaming", "look", "new_name", "rename"]

_STARTS: Final = tables.inbox_consumers
_RUNS: Final = _STARTS.c
#: Of a row in ``inbox_consumers``: a process has started. The others keep a name that nobody may use any more.
IS_START: Final = _RUNS.renamed_to.is_(None)
_LETTERS: Final = tables.dead_letters.c
_PATIENCE: Final = timedelta(seconds=10)  # with runs that begin; that takes milliseconds
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
    _check_names(old, new)
    rows = _rows(connection, old)
    return Renaming(old=old, new=new, rows=rows, refusal=_refusal(connection, old, new, rows))


def _check_names(old: str, new: str) -> None:
    if not new.strip() or "\0" in new:
        raise ConfigurationError(f"a consumer needs a name, got {new!r}")
    if new == old:
        raise ConfigurationError(f"{old} has this name already")


def rename(connection: Connection, old: str, new: str, *, by: str, why: str = "") -> Renaming:
    """Renames a consumer, unless `look` has an objection; the broker is told by hand.

    Transaction: joins the caller's; does not commit. Locks: both names, so that no run of theirs begins before the
    commit. Writes: every table with a consumer, and ``outbox_audit``.
    Guarantee: all rows or none. A run that begins before is an objection; one that begins after has the new name's
    rows, or ends because its name is the old one. Who calls `outboxkit.inbox.claim` has no run, and is not seen.

    Raises:
        ConfigurationError: as `look`; or there is an objection, after the names were locked, that was not there before.
    """
    found = look(connection, old, new)
    if found.refusal:
        return found
    _lock_names(connection, old, new)
    if objection := _refusal(connection, old, new, found.rows):
        raise ConfigurationError(f"{objection}; nothing was renamed")
    known = tables.outbox_schemas  # it says again at its start what it reads with
    connection.execute(delete(known).where(known.c.consumer == new))
    for column in _columns():
        this = (column == old, _RUNS.id != _name_id(old)) if column.table is _STARTS else (column == old,)
        connection.execute(update(column.table).where(*this).values({column.name: new}))
    connection.execute(update(_STARTS).where(_RUNS.id == _name_id(old)).values(renamed_to=new))
    connection.execute(delete(_STARTS).where(_RUNS.id == _name_id(new)))
    target = f"consumer {old} to {new}"
    entry = {"who": by, "action": "consumer.rename", "target": target, "why": why}
    connection.execute(insert(tables.outbox_audit).values(**entry))
    return found


def new_name(connection: Connection, consumer: str) -> str:
    """Returns what a consumer is called now that was renamed; empty for all others, whose run may begin.

    Transaction: joins the caller's, which records the start of a run and is committed at once. Waits for a renaming
    of this name, and for others that begin.
    """
    taken = insert_ignoring(connection, _STARTS).values(**_name_row(consumer)).returning(_RUNS.id)
    if connection.execute(taken).first() is None:
        return connection.scalar(select(_RUNS.renamed_to).where(_RUNS.id == _name_id(consumer))) or ""
    connection.execute(delete(_STARTS).where(_RUNS.id == _name_id(consumer)))
    return ""


# --- names -------------------------------------------------------------------------------------------------------


def _name_id(name: str) -> UUID:
    return uuid5(NAMESPACE_URL, f"urn:outboxkit:consumer:{name}")


def _name_row(name: str) -> dict[str, object]:
    now = database_now()
    return {"id": _name_id(name), "consumer": name, "host": "", "expires_at": now, "stopped_at": now}


def _lock_names(connection: Connection, *names: str) -> None:
    """In one order, so that two renamings do not wait crosswise; the row of an earlier renaming is replaced."""
    with lock_patience(connection, _PATIENCE):
        for name in sorted(names):
            connection.execute(delete(_STARTS).where(_RUNS.id == _name_id(name)))
            connection.execute(insert_ignoring(connection, _STARTS).values(**_name_row(name)))


# --- objections --------------------------------------------------------------------------------------------------


def _columns() -> list[Column[str]]:
    """Columns that hold a consumer's name; those of a replay's receiver and of an earlier renaming among them."""
    named = [table.c.consumer for table in tables.METADATA.sorted_tables if "consumer" in table.c]
    return [*named, _LETTERS.replay_to, _RUNS.renamed_to]


def _rows(connection: Connection, name: str) -> dict[str, int]:
    found = {
        column.table.name: connection.scalars(select(func.count()).where(column == name)).one()
        for column in _columns()
        if column.name == "consumer"
    }
    locks = select(func.count()).where(_RUNS.id == _name_id(name))
    return found | {_STARTS.name: found[_STARTS.name] - connection.scalars(locks).one()}


def _refusal(connection: Connection, old: str, new: str, rows: Mapping[str, int]) -> str:
    if now := connection.scalar(select(_RUNS.renamed_to).where(_RUNS.id == _name_id(old))):
        return f"{old} was renamed to {now}"
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
