"""Dialects: what differs between databases, behind one contract.

**Writing a dialect.** One module with ``dialect() -> Dialect``, ``refusal(url, error) -> str``, ``hidden(connection,
names) -> list[str]``, ``schema_of(connection) -> str``, ``schemas(connection) -> list[str]``,
``takes_no_writes(connection) -> str`` and ``lock_patience(connection, time)``, a context manager, and one entry point
in the group ``outboxkit.dialects`` named as SQLAlchemy names the dialect. It passes the dialect conformance suite of
``outboxkit.testing``. Everything that plain SQLAlchemy Core says for all databases stays out of here.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import sqlite3
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from outboxkit import tables
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Connection, Engine, Table
    from sqlalchemy.dialects.postgresql import Insert

    from outboxkit.rows import Page, Reading

__all__ = [
    "DatabaseTrouble",
    "Dialect",
    "Features",
    "chain",
    "commits_by_itself",
    "dialect_named",
    "dialect_of",
    "hidden",
    "insert_ignoring",
    "is_about_the_row",
    "is_missing_table",
    "is_unreadable",
    "lock_patience",
    "naming_missing_tables",
    "open_engine",
    "refusal",
    "schema_of",
    "schemas",
    "sqlstate_of",
    "takes_no_writes",
    "trouble_of",
]


_GROUP: Final = "outboxkit.dialects"
_PUBLISHED: Final = ("outbox_messages", "outbox_waiting", "outbox_stopped_keys")

# SQLSTATE classes and codes, as the standard and appendix A of PostgreSQL's manual have them: serialization failure,
# deadlock, lock not available …
_BUSY_STATES: Final = ("40001", "40P01", "55P03")
# … connection exceptions, sessions that the server ended, shutdown and start-up, no resources, a primary that became a
# standby …
_DOWN_STATES: Final = ("08", "25P03", "25P04", "57P01", "57P02", "57P03", "57P05", "53", "25006")
# … data exceptions, violated constraints, and limits of the program such as an index entry that is too large …
_ROW_STATES: Final = ("22", "23", "54")
# … values that cannot be brought out again: damaged pages, bytes that are no text …
_UNREADABLE_STATES: Final = ("XX001", "XX002", "22021", "22P05", "54000")
# … and a table, a column or a schema that is not there.
_MISSING_STATES: Final = ("42P01", "42703", "3F000")
_BUSY_SQLITE: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_DOWN_SQLITE: Final = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
_ROW_SQLITE: Final = (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG, sqlite3.SQLITE_RANGE)
_MISSING_SQLITE: Final = ("no such table", "no such column", "has no column named")  # all of them have one code
_MAX_LINKS: Final = 50  # of a chain of errors


class DatabaseTrouble(StrEnum):
    """Trouble with the database that says nothing about the work at hand: no attempt is spent."""

    BUSY = "busy"  #: another transaction is in the way
    DOWN = "down"  #: the database cannot be reached or takes no work


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Capabilities of a database: the only place where such a question is asked.

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

    def engine(self, url: URL, patience: timedelta, *, pooled: bool, schema: str, creates: bool) -> Engine:
        """An engine for daemons: time-outs on statements, locks and connections; parameters hidden in errors.

        Args:
            url: of the database; an async driver is replaced by the blocking one.
            patience: no statement, lock or connection attempt takes longer.
            pooled: whether the URL leads to a pooler in transaction mode: nothing may rest on a session of its own.
            schema: where the tables are; empty for what the URL and the login say.
            creates: a database that is a file may be made by connecting to it.

        Raises:
            ConfigurationError: the database, or a pooler, has no such schemas.
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

    def confirm_lease(self, connection: Connection, relay: UUID) -> timedelta | None:
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


def dialect_named(name: str) -> Dialect:
    """Returns the dialect that SQLAlchemy calls by this name.

    Raises:
        ConfigurationError: this database is not supported.
    """
    return _dialect(name)


def insert_ignoring(connection: Connection, table: Table) -> Insert:
    """``INSERT … ON CONFLICT DO NOTHING`` for the connection's database; add RETURNING to see what was new."""
    return dialect_of(connection).insert(table).on_conflict_do_nothing()


def open_engine(
    url: str, *, patience: timedelta, pooled: bool = False, schema: str = "", creates: bool = True
) -> Engine:
    """A daemon's engine for a database URL; nothing is connected yet.

    Args:
        url: of the database.
        patience: no statement, lock or connection attempt takes longer.
        pooled: whether the URL leads to a pooler in transaction mode, such as PgBouncer.
        schema: where the tables are; empty for what the URL and the login say.
        creates: whether connecting makes a file that is not there; otherwise it is refused.

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
        return dialect.engine(parsed, patience, pooled=pooled, schema=schema, creates=creates)
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"{parsed.get_backend_name()} needs the module {error.name}; install it: pip install 'outboxkit[postgres]'",
        ) from error


def refusal(url: URL, error: DBAPIError) -> str:
    """Tells why connecting again cannot help: a refused login, or no such database; empty when it may help.

    Args:
        url: of the database.
        error: what connecting raised.
    """
    found: str = _module(url.get_backend_name()).refusal(url, error)
    return found


@contextmanager
def lock_patience(connection: Connection, time: timedelta) -> Iterator[None]:
    """Waits no longer than ``time`` for the lock of another transaction in the block.

    A wait that ends without the lock raises an error of which `trouble_of` says that the database is busy.

    Transaction: joins the caller's.
    """
    with _module(connection.dialect.name).lock_patience(connection, time):
        yield


def commits_by_itself(connection: Connection) -> bool:
    """True if the connection is in AUTOCOMMIT mode, where a rollback takes nothing back."""
    level = connection.get_execution_options().get("isolation_level")
    if level is None:
        level = getattr(connection.dialect, "_on_connect_isolation_level", None)
    # `is True`: the sqlite3 module says -1 where transactions are SQLAlchemy's business.
    return level == "AUTOCOMMIT" or getattr(connection.connection.dbapi_connection, "autocommit", False) is True


def schema_of(connection: Connection) -> str:
    """The schema that the connection finds our tables in, or would create them in; empty where there are none."""
    found: str = _module(connection.dialect.name).schema_of(connection)
    return found


def takes_no_writes(connection: Connection) -> str:
    """Says why this database takes no writes (``a standby``, ``read-only``); empty when it takes them."""
    found: str = _module(connection.dialect.name).takes_no_writes(connection)
    return found


def schemas(connection: Connection) -> list[str]:
    """All schemas of the database that hold our tables, wherever this connection looks."""
    found: list[str] = _module(connection.dialect.name).schemas(connection)
    return found


def trouble_of(error: BaseException) -> DatabaseTrouble | None:
    """Tells what an error says about the database; None when it is about the work itself.

    Decides by the driver's codes, never by its text, and looks into groups and at what an error was raised from. A
    time-out of the pool is `DatabaseTrouble.BUSY`.
    """
    found = {_trouble(link) for link in chain(error)}
    return next((trouble for trouble in (DatabaseTrouble.DOWN, DatabaseTrouble.BUSY) if trouble in found), None)


def sqlstate_of(error: BaseException) -> str:
    """Returns the first SQLSTATE that an error or its causes carry, empty when there is none."""
    states = (_state(link) for link in chain(error) if isinstance(link, DBAPIError))
    return next((state for state in states if state), "")


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, the members of its group, and what each was raised from."""
    found, seen = deque([error]), set[int]()
    while found and len(seen) < _MAX_LINKS:
        link = found.popleft()
        if id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        members = link.exceptions if isinstance(link, BaseExceptionGroup) else ()
        found.extend(one for one in (*members, link.__cause__, link.__context__) if one is not None)


def _trouble(error: BaseException) -> DatabaseTrouble | None:
    if isinstance(error, PoolTimeout):
        return DatabaseTrouble.BUSY
    if not isinstance(error, DBAPIError):
        return None
    if error.connection_invalidated:
        return DatabaseTrouble.DOWN
    state, code = _state(error), _sqlite_code(error)
    if code is None and state is None:
        # No answer from the server: it was not reached, or (asyncpg) a value could not be sent.
        is_ours = isinstance(getattr(error.orig, "__cause__", None), ValueError)
        is_silent = isinstance(error, OperationalError | InterfaceError) and not is_ours
        return DatabaseTrouble.DOWN if is_silent else None
    if code in _BUSY_SQLITE or state in _BUSY_STATES:
        return DatabaseTrouble.BUSY
    down = code in _DOWN_SQLITE or (state is not None and state.startswith(_DOWN_STATES))
    return DatabaseTrouble.DOWN if down else None


def is_about_the_row(error: BaseException) -> bool:
    """True when the database refused values: a constraint, a range, an encoding, a length. Never an outage."""
    if not isinstance(error, DBAPIError):
        return False
    state = _state(error)
    return _sqlite_code(error) in _ROW_SQLITE or (state is not None and state.startswith(_ROW_STATES))


def is_unreadable(error: BaseException) -> bool:
    """True when a stored value cannot be brought out: it is none of its column's kind, or its page is damaged.

    Never an outage.
    """
    if isinstance(error, ValueError | TypeError):  # of the driver, or of SQLAlchemy, that make an object of it
        return not isinstance(error, ConfigurationError)
    found = error.orig if isinstance(error, DBAPIError) else error
    return getattr(found, "sqlstate", None) in _UNREADABLE_STATES


def is_missing_table(error: BaseException) -> bool:
    """True when a statement names a table, a column or a schema that the database does not have."""
    if not isinstance(error, DBAPIError):
        return False
    by_text = _sqlite_code(error) is not None and any(words in str(error.orig) for words in _MISSING_SQLITE)
    return by_text or _state(error) in _MISSING_STATES


@contextmanager
def naming_missing_tables() -> Iterator[None]:
    """Says what to do when a statement of the block fails because our tables are not there.

    Raises:
        ConfigurationError: they are not.
    """
    try:
        yield
    except DBAPIError as error:
        if is_missing_table(error):
            raise ConfigurationError(tables.MISSING) from None
        raise


def _state(error: DBAPIError) -> str | None:
    found: str | None = getattr(error.orig, "sqlstate", None)
    return found


def _sqlite_code(error: DBAPIError) -> int | None:
    """The primary result code; drivers wrap the standard library's error or are it."""
    if not isinstance(error.orig, sqlite3.Error):
        return None
    found: int = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    return found


def hidden(connection: Connection, names: Sequence[str] = _PUBLISHED) -> list[str]:
    """Lists those of these tables, the relay's by default, of which this login may see a part only."""
    found: list[str] = _module(connection.dialect.name).hidden(connection, names)
    return found


@functools.cache
def _dialect(name: str) -> Dialect:
    found: Dialect = _module(name).dialect()
    return found


def _module(name: str) -> Any:
    known = {point.name: point.value for point in entry_points(group=_GROUP)}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        meant = f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(sorted(known))}"
        raise ConfigurationError(f"the database {name!r} is not supported{meant}")
    return importlib.import_module(known[name])
