"""Salvage: rows that the driver cannot read. An id that is no UUID, or a damaged page, must not stop the others.

A page that cannot be read is asked for again, half as long and again, until the fault is its first row. That one is
read column by column; what cannot be had is left empty, and the row has a flaw: it becomes a dead letter in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from outboxkit import dialects, outbox, tables
from outboxkit._legible import Lost, legible
from outboxkit.rows import NO_ID, UNREADABLE, Page, Row

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

    from outboxkit.rows import Reading

__all__ = ["Salvaged", "page_of", "rows_of"]

_TEXTS: Final = ("topic", "type", "kind")
_REFUSALS: Final = (DBAPIError, ValueError, TypeError)
_BYTES: Final = ("key", "payload", "headers")


class Salvaged(NamedTuple):
    """A page, and the flaws of those of its rows that could not be read as they are, by position."""

    page: Page
    flaws: dict[int, str]


def page_of(connection: Connection, reading: Reading) -> Salvaged:
    """Reads a page of ``outbox_messages``, up to a row that cannot be read, or that row alone.

    Transaction: as `outboxkit.outbox.read`; statements of its own, for the connection is in autocommit.
    """
    limit = reading.limit
    while limit:
        try:
            page = outbox.read(connection, replace(reading, limit=limit))
        except _REFUSALS as error:
            if not dialects.is_unreadable(error):
                raise
            limit //= 2
        else:
            return Salvaged(page if limit == reading.limit else replace(page, cut=True), {})
    page = outbox.read(connection, replace(reading, limit=1, blind=True))
    hot = tables.outbox_messages.c
    found = [_of_columns(connection, hot, hot.position == row.position) for row in page.rows]
    flaws = {row.position: flaw for row, flaw in found}
    return Salvaged(replace(page, rows=[row for row, _ in found], cut=True), flaws)


def rows_of(
    connection: Connection, ids: Sequence[int], read: Callable[[Sequence[int]], list[Row]]
) -> tuple[list[Row], dict[int, str]]:
    """Reads rows of ``outbox_waiting`` by their ids; of those that cannot be read what can be had, with their flaws.

    Transaction: joins the caller's; uses savepoints.
    """
    try:
        with connection.begin_nested():
            return read(ids), {}
    except _REFUSALS as error:
        if not dialects.is_unreadable(error):
            raise
    if len(ids) > 1:
        half = len(ids) // 2
        (first, flaws), (second, more) = (rows_of(connection, part, read) for part in (ids[:half], ids[half:]))
        return [*first, *second], flaws | more
    waits = tables.outbox_waiting.c
    row, flaw = _of_columns(connection, waits, waits.id == ids[0])
    return [row._replace(waiting_id=ids[0])], {row.position: flaw}


def _of_columns(connection: Connection, columns: Any, this: ColumnElement[bool]) -> tuple[Row, str]:
    """A row column by column, and why it cannot be sent. Its times are not asked for: so it goes by its position."""
    lost: list[str] = []
    values: dict[str, Any] = {}
    for name in ("message_id", *_TEXTS, *_BYTES):
        found = _value_of(connection, legible(columns[name]), this)
        if isinstance(found, Lost):
            lost.append(f"{name} is no {found.kind}")
        elif found is None and name != "key":
            found = "" if name in _TEXTS else b""
            lost.append(f"the page of {name} is damaged")
        values[name] = found
    del values["message_id"]  # it may be none
    position = connection.execute(select(columns.position).where(this)).scalar_one()
    flaw = f"it cannot be read: {', '.join(lost) or 'one of its columns is not what it should be'}"
    return Row(position=position, raw_id=NO_ID, recorded_us=UNREADABLE, expires_us=None, **values), flaw


def _value_of(connection: Connection, column: ColumnElement[Any], this: ColumnElement[bool]) -> Any:
    """The value of one column; None when it has none, or it cannot be had."""
    is_alone = dialects.commits_by_itself(connection)  # no transaction that a failed statement could spoil
    try:
        with nullcontext() if is_alone else connection.begin_nested():
            return connection.execute(select(column).where(this)).scalar_one_or_none()
    except _REFUSALS as error:
        if not dialects.is_unreadable(error):
            raise
        return None
