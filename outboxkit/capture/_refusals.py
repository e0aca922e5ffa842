"""Refusals: where a message would not live and die with the transaction that its session believes in."""

from __future__ import annotations

import weakref
from typing import Any, Final

from sqlalchemy import Connection, Engine, ExceptionContext, event, exc, inspect, literal, select
from sqlalchemy.orm import Mapper, Session

from outboxkit.errors import CaptureError

__all__ = [
    "refuse_aborted",
    "refuse_autocommit",
    "refuse_autocommit_engine",
    "refuse_committing_savepoint",
    "refuse_elsewhere",
    "unbound",
]

_AUTOCOMMIT: Final = "AUTOCOMMIT"
_PSYCOPG_INERROR: Final = 3  # psycopg.pq.TransactionStatus.INERROR; psycopg need not be installed
_AUTOCOMMITS: Final = (
    "the connection is in AUTOCOMMIT mode: every statement would commit by itself, so that the change could persist "
    "without its message; use an engine with a transactional isolation level"
)
_failed: weakref.WeakSet[Connection] = weakref.WeakSet()  # a statement failed since the last look
_early: weakref.WeakSet[Connection] = weakref.WeakSet()  # a savepoint began before SQLite's transaction did


def unbound(error: exc.UnboundExecutionError) -> str:
    """The text for a session that has no database for a message."""
    return f"the session cannot say which database the message belongs to: {error}"


def refuse_autocommit_engine(session: Session, mapper: Mapper[Any] | None) -> None:
    """Refuses an engine that commits each statement, without connecting.

    Raises:
        CaptureError: it does, or the session knows no engine.
    """
    if type(session).get_bind is not Session.get_bind:
        return  # a routing session may answer with a read replica here; the flush looks at the real connection
    try:
        bind = session.get_bind(mapper)
    except exc.UnboundExecutionError as error:
        raise CaptureError(unbound(error)) from error
    level = bind.get_execution_options().get("isolation_level") or getattr(
        bind.dialect, "_on_connect_isolation_level", None
    )
    if level == _AUTOCOMMIT:
        raise CaptureError(_AUTOCOMMITS)


def refuse_autocommit(connection: Connection) -> None:
    """Refuses a connection that commits each statement, as SQLAlchemy or the driver itself was told.

    Raises:
        CaptureError: it does.
    """
    level = connection.get_execution_options().get("isolation_level")
    if level == _AUTOCOMMIT or _psycopg_autocommit(connection) or _sqlite_autocommit(connection):
        raise CaptureError(_AUTOCOMMITS)


def refuse_elsewhere(session: Session, connection: Connection, *, besides: type) -> None:
    """Refuses another database than that of the changes, as far as this flush knows them.

    Raises:
        CaptureError: one could commit without the other.
    """
    changed = {inspect(found).mapper for found in (*session.new, *session.dirty, *session.deleted)}
    others = {session.get_bind(mapper).engine for mapper in changed if mapper.class_ is not besides}
    if others and connection.engine not in others:
        raise CaptureError(
            "the message would go to another database than the changes it tells of, so one could commit without the "
            "other: emit from the object, whose own database is then used"
        )


def refuse_aborted(connection: Connection) -> None:
    """Refuses to commit an aborted transaction: PostgreSQL answers with success and rolls back.

    Raises:
        CaptureError: a statement failed, and nobody rolled back.
    """
    driver = _psycopg(connection) if not connection.closed and not connection.invalidated else None
    if connection not in _failed and (driver is None or driver.info.transaction_status != _PSYCOPG_INERROR):
        return
    try:
        connection.execute(select(literal(1)))
    except exc.DBAPIError as error:
        raise CaptureError(
            "a statement failed earlier in this transaction and the error was swallowed: the database would roll back "
            "at commit and say nothing; roll back, or use a savepoint around what may fail"
        ) from error
    _failed.discard(connection)


def refuse_committing_savepoint(connection: Connection) -> None:
    """Refuses a savepoint whose RELEASE commits, because SQLite's driver had not begun the transaction around it.

    Raises:
        CaptureError: it is one.
    """
    if connection in _early:
        raise CaptureError(
            "SQLite's driver began no transaction before this savepoint, so that releasing it commits and a later "
            "rollback cannot undo it: call outboxkit.capture.begin_sqlite_transactions(engine) once for the engine"
        )


def _psycopg(connection: Connection) -> Any | None:
    return connection.connection.driver_connection if connection.dialect.driver.startswith("psycopg") else None


def _psycopg_autocommit(connection: Connection) -> bool:
    driver = _psycopg(connection)
    return driver is not None and bool(driver.autocommit)


def _sqlite(connection: Connection) -> Any | None:
    return connection.connection.driver_connection if connection.dialect.name == "sqlite" else None


def _sqlite_autocommit(connection: Connection) -> bool:
    """True if nobody begins a transaction: not the driver by itself, and no listener has done it."""
    driver = _sqlite(connection)
    if driver is None or getattr(driver, "in_transaction", True):
        return False
    return driver.isolation_level is None or getattr(driver, "autocommit", None) is True


@event.listens_for(Engine, "handle_error")
def _remember_failure(context: ExceptionContext) -> None:
    if context.connection is not None:
        _failed.add(context.connection)


@event.listens_for(Engine, "savepoint")
def _remember_early_savepoint(connection: Connection, _name: object) -> None:
    driver = _sqlite(connection)
    if driver is not None and not getattr(driver, "in_transaction", True):
        _early.add(connection)


@event.listens_for(Engine, "rollback")
@event.listens_for(Engine, "commit")
def _forget_early_savepoint(connection: Connection) -> None:
    _early.discard(connection)
