"""Pauses: destinations, event types and keys that operators hold back.

A pause names a destination, an event type, or a key, with a reason and, if wanted, an end. It is a row in
``outbox_control``; every change of it is a row in ``outbox_audit``. Relays look every third of their lease. What is
paused waits in the database: no attempt is spent, and the order of each key is kept, so that behind a message of a
paused type the later ones of its key wait, too.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

from sqlalchemy import and_, delete, insert, or_, select

from outboxkit import tables
from outboxkit._sql import database_now, microseconds_of
from outboxkit.dialects import naming_missing_tables
from outboxkit.errors import ConfigurationError
from outboxkit.policy import duration
from outboxkit.rows import UNREADABLE, PauseSet

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

__all__ = [
    "Pause",
    "Scope",
    "Target",
    "pause",
    "pause_set",
    "pauses",
    "resume",
    "unescaped",
]

_log: Final = logging.getLogger(__name__)

_CONTROL: Final = tables.outbox_control
_LONGEST: Final = timedelta(days=366)
_MAX_TEXT: Final = 1024  # bytes of a name, a key or a reason
_NEVER_SEEN: Final = datetime(1, 1, 1, tzinfo=UTC)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Scope(StrEnum):
    """Kinds of targets of a pause."""

    DESTINATION = "destination"  #: nothing goes out to a topic or queue
    TYPE = "type"  #: messages of an event type wait, and behind each the later ones of its key
    KEY = "key"  #: messages of one key of a destination wait


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a pause.

    Attributes:
        scope: what kind of thing.
        name: the destination, or the event type.
        key: the key, for `Scope.KEY` only.
    """

    scope: Scope
    name: str
    key: bytes | None = None

    def __post_init__(self) -> None:
        if (self.key is not None) != (self.scope is Scope.KEY):
            raise ConfigurationError("a pause of a key names a destination and a key, every other one no key")
        if not self.name.strip() or not self.name.isprintable() or len(self.name.encode()) > _MAX_TEXT:
            raise ConfigurationError(
                f"the name of what is paused is text without control characters, at most {_MAX_TEXT:,} bytes"
            )
        if self.key is not None and len(self.key) > _MAX_TEXT:
            raise ConfigurationError(f"a key has at most {_MAX_TEXT:,} bytes, got {len(self.key):,}")

    def __str__(self) -> str:
        return self.name if self.key is None else f"{_escaped(self.name.encode(), r' ')} {_escaped(self.key)}"

    @classmethod
    def parse(cls, scope: Scope, text: str) -> Self:
        """Reads what `str` shows.

        Raises:
            ConfigurationError: no pause looks like this.
            UnicodeDecodeError: the destination is no text.
        """
        if scope is not Scope.KEY:
            return cls(scope, text)
        name, _, key = text.partition(" ")
        return cls(scope, unescaped(name).decode(), unescaped(key))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A pause in force.

    Attributes:
        target: what is paused.
        reason: why, in the operator's words.
        by: who did it.
        since: when.
        until: when it ends by itself; None: when it is resumed.
    """

    target: Target
    reason: str
    by: str
    since: datetime
    until: datetime | None


# --- operators ---------------------------------------------------------------------------------------------------


@naming_missing_tables()
def pause(
    connection: Connection, target: Target, *, by: str, reason: str, lasts: timedelta | str | None = None
) -> None:
    """Pauses a destination, a type or a key; a pause of the same target that is in force is replaced.

    Transaction: joins the caller's; does not commit.
    Guarantee: each relay obeys at the latest when it renews its lease, every third of it; what it has handed to the
        broker by then is heard out.

    Writes: ``outbox_control``, ``outbox_audit``.

    Args:
        connection: the caller's.
        target: what to pause.
        by: who asks.
        reason: why, for the people who find it paused.
        lasts: ends by itself after this time, by the database's clock, at most a year; None: it lasts until `resume`.

    Raises:
        ConfigurationError: no reason is given, it lasts no time or more than a year, or the tables are missing.
    """
    if not reason.strip() or len(reason.encode()) > _MAX_TEXT:
        raise ConfigurationError(f"a pause has a reason, at most {_MAX_TEXT:,} bytes, for the people who find it")
    time = None if lasts is None else duration(lasts, name="lasts")
    if time is not None and time > _LONGEST:
        raise ConfigurationError(f"a pause lasts at most a year, got {lasts}; without an end it lasts until resumed")
    connection.execute(delete(_CONTROL).where(_is(connection, target)))
    until = None if time is None else database_now(time)
    values = {"scope": target.scope.value, "target": str(target), "reason": reason, "set_by": by, "until": until}
    connection.execute(insert(_CONTROL).values(**values))
    _record(connection, "pause", target, by=by, why=reason)


@naming_missing_tables()
def resume(connection: Connection, target: Target, *, by: str, why: str = "") -> bool:
    """Ends a pause; returns whether there was one in force.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `pause`: what has waited goes out in order.

    Writes: ``outbox_control``, ``outbox_audit``.
    """
    was = connection.execute(select(_CONTROL.c.id).where(_is(connection, target), _in_force())).first() is not None
    connection.execute(delete(_CONTROL).where(_is(connection, target)))
    if was:
        _record(connection, "resume", target, by=by, why=why)
    return was


@naming_missing_tables()
def pauses(connection: Connection) -> list[Pause]:
    """The pauses in force, the oldest first.

    Transaction: joins the caller's; reads only.
    """
    columns = (_CONTROL.c.id, _CONTROL.c.scope, _CONTROL.c.target, _CONTROL.c.reason, _CONTROL.c.set_by)
    times = (microseconds_of(_CONTROL.c.set_at).label("since"), microseconds_of(_CONTROL.c.until).label("until"))
    found = connection.execute(select(*columns, *times).where(_in_force()).order_by(_CONTROL.c.set_at, _CONTROL.c.id))
    return [
        Pause(
            target=target,
            reason=row.reason,
            by=row.set_by,
            since=_instant(row.since) or _NEVER_SEEN,
            until=_instant(row.until),
        )
        for row in found
        if (target := _target(row.id, row.scope, row.target)) is not None
    ]


def _target(number: int, scope: str, text: str) -> Target | None:
    """Returns the target of a row; None when it says nothing that could be obeyed: it is told and left alone."""
    try:
        return Target.parse(Scope(scope), text)
    except (ConfigurationError, ValueError):
        _tell_once(number, scope)
        return None


@lru_cache(maxsize=1000)
def _tell_once(number: int, scope: str) -> None:
    _log.warning("pause.unreadable", extra={"id": number, "scope": scope})


def _instant(microseconds: int | None) -> datetime | None:
    """An end that is no instant of the calendar is none: the pause lasts until it is resumed."""
    if microseconds is None or microseconds == UNREADABLE:
        return None
    return _EPOCH + timedelta(microseconds=microseconds)


# --- relays ------------------------------------------------------------------------------------------------------


def pause_set(connection: Connection) -> PauseSet:
    """All pauses in force, as relays ask them.

    Transaction: joins the caller's; reads only.
    """
    found = [pause.target for pause in pauses(connection)]
    return PauseSet(
        frozenset(target.name for target in found if target.scope is Scope.DESTINATION),
        frozenset(target.name for target in found if target.scope is Scope.TYPE),
        frozenset((target.name, target.key) for target in found if target.key is not None),
    )


def _is(connection: Connection, target: Target) -> ColumnElement[bool]:
    """The rows of a target, however they spell it: a program may have written them."""
    of_scope = select(_CONTROL.c.id, _CONTROL.c.target).where(_CONTROL.c.scope == target.scope.value)
    rows = connection.execute(of_scope).all()
    return _CONTROL.c.id.in_([row.id for row in rows if _target(row.id, target.scope, row.target) == target])


def _in_force() -> ColumnElement[bool]:
    known = _CONTROL.c.scope.in_([scope.value for scope in Scope])
    return and_(known, or_(_CONTROL.c.until.is_(None), _CONTROL.c.until > database_now()))


def _record(connection: Connection, what: str, target: Target, *, by: str, why: str) -> None:
    entry = {"who": by, "action": f"control.{what}", "target": f"{target.scope} {target}", "why": why}
    connection.execute(insert(tables.outbox_audit).values(**entry))


# Text columns take neither NUL nor bytes that are no UTF-8, and a blank separates a destination from its key.
def _escaped(value: bytes, also: str = "") -> str:
    text = value.replace(b"\\", b"\\x5c").decode("utf-8", "backslashreplace")
    return "".join(f"\\x{ord(char):02x}" if char == "\0" or char in also else char for char in text)


def unescaped(text: str) -> bytes:
    r"""The bytes that are shown like this: ``\xff`` stands for a byte that is no text."""
    raw = text.encode("utf-8", "surrogateescape")  # as a command line hands over bytes that are no text
    return re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), raw)
