"""Names of consumers: one that nobody knows is told as that, and not as one that has nothing."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from sqlalchemy import select

from outboxkit import dead_letters, tables
from outboxkit.dead_letters import Filter
from outboxkit.inbox.rename import IS_START
from outboxkit_relay.words import safe

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["nothing_found"]


def nothing_found(connection: Connection, consumer: str | None, nothing: str) -> str:
    """Returns ``nothing``, and that no consumer is known by that name where none is, with a name that is close.

    Transaction: joins the caller's; reads only.
    """
    starts = tables.inbox_consumers.c
    known = set(connection.scalars(select(starts.consumer).where(IS_START).distinct()))
    if consumer is None or consumer in known or dead_letters.count(connection, Filter(state=None, consumer=consumer)):
        return nothing
    close = difflib.get_close_matches(consumer, known, 1)
    meant = f"; did you mean {safe(close[0])}?" if close else ""
    return f"{nothing}: no consumer is known as {safe(consumer)}{meant}"
