"""Dialects: what differs between databases, behind one contract.

**Writing a dialect.** One module with ``dialect() -> Dialect``, ``refusal(url, error) -> str`` and
``hidden(connection) -> list[str]``, and one entry point in the group ``outboxkit.dialects`` named as SQLAlchemy names
the dialect. It passes the dialect conformance suite of ``outboxkit.testing``. Everything that plain SQLAlchemy Core
says for all databases stays out of here.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Connection, Engine, Table
    from sqlalchemy.dialects.postgresql import Insert
    from sqlalchemy.exc import DBAPIError

    from outboxkit.rows import Page, Reading

__all__ = [
    "Dialect",
    "Features",
    "dialect_of",
    "hidden",
    "insert_ignoring",
    "open_engine",
    "refusal",
]


_GROUP: Final = "outboxkit.dialects"


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a database can do: the only place where such a question is asked.

    Attributes:
        name: ``postgresql``, ``sqlite``.
        concurrent_writers: whether two transactions can write at once, so that a smaller position may commit later.
        notifies: whether it can wake a relay.
        arrays: whether a list can be one value, so that many rows are one statement of constant text.
    """

    name: str
    concurrent_writers: bool
    notifies: bool
    arrays: bool = False


class Dialect(Protocol):
    """One database."""

    @property
    def features(self) -> Features: ...

    def engine(self, url: URL, patience: timedelta, *, pooled: bool) -> Engine:
        """An engine for daemons: time-outs on statements, locks and connections; parameters hidden in errors.

        Args:
            url: of the database; an async driver is replaced by the blocking one.
            patience: no statement, lock or connection attempt takes longer.
            pooled: whether the URL leads to a pooler in transaction mode: nothing may rest on a session of its own.
        """
        ...

    def read(self, connection: Connection, reading: Reading) -> Page:
        """One page of unpublished rows in position order.

        Transaction: one statement of its own (READ COMMITTED), always on one connection of one server session: the
        snapshots of another session mean nothing here.
        Guarantee: pages that begin at ``Reading(seen=None)`` and go on with the snapshots that were returned find every
        committed row exactly once, and of two rows of one key the earlier committed one first.

        Raises:
            LeaseLost: the server session is another one than before: everything read must be forgotten.
        """
        ...

    def claim(self, connection: Connection, relay: UUID) -> timedelta | None:
        """Makes every commit that was read durable; tells how long the relay's lease still holds, None when it ended.

        Transaction: its own, committed when this returns; the connection is outside one.
        Guarantee: a transaction that a crash of the server would lose has not been read, or is durable now.
        """
        ...

    def remove(self, connection: Connection, rows: Sequence[tuple[int, bytes]]) -> int:
        """Deletes exactly these (position, id in 16 bytes) from ``outbox_messages``; returns how many were there."""
        ...

    def insert(self, table: Table) -> Insert:
        """An INSERT that understands ``on_conflict_do_nothing`` and RETURNING."""
        ...


def dialect_of(connection: Connection | Engine) -> Dialect:
    """The dialect of a connection.

    Raises:
        ConfigurationError: this database is not supported.
    """
    return _dialect(connection.dialect.name)


def insert_ignoring(connection: Connection, table: Table) -> Insert:
    """``INSERT … ON CONFLICT DO NOTHING`` for the connection's database; add RETURNING to see what was new."""
    return dialect_of(connection).insert(table).on_conflict_do_nothing()


def open_engine(url: str, *, patience: timedelta, pooled: bool = False) -> Engine:
    """A daemon's engine for a database URL; nothing is connected yet.

    Args:
        url: of the database.
        patience: no statement, lock or connection attempt takes longer.
        pooled: whether the URL leads to a pooler in transaction mode, such as PgBouncer.

    Raises:
        ConfigurationError: unparsable URL, unsupported database, or a missing extra.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        # The driver's text repeats the URL, password included: do not chain it.
        raise ConfigurationError(
            "the database URL cannot be parsed; expected one like postgresql+psycopg://user@host/database or "
            "sqlite:///file.db",
        ) from None
    dialect = _dialect(parsed.get_backend_name())
    try:
        return dialect.engine(parsed, patience, pooled=pooled)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{parsed.get_backend_name()} needs the module {error.name}; install it: pip install 'outboxkit[postgres]'",
        ) from error


def refusal(url: URL, error: DBAPIError) -> str:
    """Why connecting again cannot help: the login is refused, or there is no such database; empty when it may help.

    Args:
        url: of the database.
        error: what connecting raised.
    """
    found: str = _module(url.get_backend_name()).refusal(url, error)
    return found


def hidden(connection: Connection) -> list[str]:
    """Which of the relay's tables this login may see in part only: what it does not see is not published."""
    found: list[str] = _module(connection.dialect.name).hidden(connection)
    return found


@functools.cache
def _dialect(name: str) -> Dialect:
    found: Dialect = _module(name).dialect()
    return found


def _module(name: str) -> Any:
    known = {point.name: point.value for point in entry_points(group=_GROUP)}
    if name not in known:
        raise ConfigurationError(f"the database {name!r} is not supported; expected one of {', '.join(sorted(known))}")
    return importlib.import_module(known[name])
