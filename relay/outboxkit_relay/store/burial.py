"""Burial: makes dead letters of outbox rows, also of those that the database can neither move nor index."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from outboxkit import dead_letters, dialects
from outboxkit._failpoints import failpoint
from outboxkit.policy import Failure, Followers
from outboxkit_relay.store import stopped_keys

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.rows import Row
    from outboxkit_relay.core.protocol import Burial

__all__ = ["bury", "bury_in_place", "code_of"]

_log: Final = logging.getLogger(__name__)

_SHORT: Final = 200  # characters of a text that the database refuses as a whole


def bury(connection: Connection, burial: Burial) -> None:
    """Makes a dead letter of a head, and does with its followers what was decided.

    Transaction: the caller's, fenced.
    """
    row = burial.row
    failpoint("dead.before_insert")
    dead_letters.bury(connection, dead_letters.of_row(row, burial.failure, burial.text, burial.attempts))
    failpoint("dead.after_insert")
    if burial.fate is Followers.PARK:
        stopped_keys.park(connection, row, burial.followers)
    else:
        stopped_keys.remove_dead(connection, row)
        if row.key is not None:
            stopped_keys.resume_key(connection, [(row.topic, row.key)])


def bury_in_place(connection: Connection, row: Row, why: DBAPIError) -> None:
    """Makes a dead letter of a row that cannot be moved; its key goes on, because it cannot be stopped either.

    The letter keeps payload and headers; names that the database refuses there, too, are shortened. What cannot be kept
    even so stays where it is and is told.

    Transaction: the caller's, fenced; uses savepoints.
    """
    text = f"the database cannot move it: {code_of(why)}"
    letter = dead_letters.of_row(row, Failure.INVALID, text, row.attempts + 1)
    shortened = replace(letter, topic=letter.topic[:_SHORT], type=letter.type[:_SHORT], key=None)
    for kept in (letter, shortened):
        try:
            with connection.begin_nested():
                dead_letters.bury(connection, kept)
                stopped_keys.remove_dead(connection, row)
        except DBAPIError as error:
            if not dialects.is_about_the_row(error):
                raise
        else:
            _log.warning("row.buried", extra={"position": row.position, "topic": row.topic, "reason": text})
            return
    _log.error("row.stuck", extra={"position": row.position, "topic": row.topic, "reason": text})


def code_of(error: DBAPIError) -> str:
    """The class and code of a database error: words without data."""
    code = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "sqlite_errorname", "")
    return f"{type(error.orig).__name__} {code}".strip()
