"""Reports: what each relay tells of itself beside its lease, so that every machine can read it."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from sqlalchemy import delete, insert, update

from outboxkit import tables
from outboxkit._sql import database_now

if TYPE_CHECKING:
    from uuid import UUID

    from sqlalchemy import Connection

__all__ = ["leave_word", "report"]

_RELAYS: Final = tables.outbox_relays


def report(connection: Connection, relay: UUID, state: str) -> None:
    """Writes the state of a relay's destinations beside its lease.

    Transaction: the caller's.
    """
    this = _RELAYS.c.id == relay
    connection.execute(update(_RELAYS).where(this).values(state=state, told_at=database_now()))


def leave_word(connection: Connection, words: str, *, version: str) -> None:
    """Leaves a word of a relay that could not start, or had to end: it holds no lease, and is read by people.

    A later word from the same host replaces it.

    Transaction: the caller's.
    """
    host = socket.gethostname()
    connection.execute(delete(_RELAYS).where(_RELAYS.c.ended.is_not(None), _RELAYS.c.host == host))
    now = database_now()
    values = {"id": uuid4(), "host": host, "version": version, "ended": words, "expires_at": now, "told_at": now}
    connection.execute(insert(_RELAYS).values(**values))
