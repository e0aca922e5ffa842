"""The database of a short command: connected at once or not at all."""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from outboxkit import dialects
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit_relay.daemon import lifecycle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection, Engine

    from outboxkit_relay.cli.main import Invocation

__all__ = ["connect", "opened", "reading", "snapshot", "writing"]

_PATIENCE: Final = timedelta(seconds=10)  # a person is waiting


@contextmanager
def opened(invocation: Invocation, *, patience: timedelta = _PATIENCE, creates: bool = False) -> Iterator[Engine]:
    """An engine for as long as the block runs; ``creates`` says whether it may make a database that is a file."""
    settings = invocation.settings
    engine = dialects.open_engine(
        settings.database(),
        patience=patience,
        pooled=settings.pooled,
        schema=settings.database_schema,
        creates=creates,
    )
    try:
        yield engine
    finally:
        engine.dispose()


@contextmanager
def reading(invocation: Invocation) -> Iterator[Connection]:
    """A connection that only reads and never takes the writer's place, on a database whose tables are checked.

    Raises:
        ConfigurationError: the login is refused, or the tables are missing.
        OutboxKitError: the database cannot be reached.
    """
    with opened(invocation) as engine, connect(engine) as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        lifecycle.require_tables(connection)
        yield connection


@contextmanager
def snapshot(invocation: Invocation, *, patience: timedelta) -> Iterator[Connection]:
    """A transaction that sees one moment of the whole database and changes nothing; see `reading`.

    Where one writer writes at a time it takes the writer's place.
    """
    with opened(invocation, patience=patience) as engine, connect(engine) as connection:
        if dialects.dialect_of(connection).features.concurrent_writers:
            connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with connection.begin():
            lifecycle.require_tables(connection)
            yield connection


@contextmanager
def writing(invocation: Invocation) -> Iterator[Connection]:
    """A transaction that commits at the end of the block; see `reading`."""
    with opened(invocation) as engine, connect(engine) as connection, connection.begin():
        lifecycle.require_tables(connection)
        yield connection


def connect(engine: Engine) -> Connection:
    """A connection, or one line about why there is none."""
    try:
        return engine.connect()
    except DBAPIError as error:
        if refusal := dialects.refusal(engine.url, error):
            raise ConfigurationError(refusal) from None
        where = engine.url.render_as_string(hide_password=True)
        why = type(error.orig or error).__name__
        raise OutboxKitError(f"the database {where} cannot be reached ({why}): is it running?") from None
