"""Doctor: is this set-up right? Every check that a database or a broker can answer, each with the line that mends it.

A check is a small function over one `Patient`; it yields findings, and nothing where all is well. A check that may not
look says so by a note: the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from outboxkit import dialects, migrations
from outboxkit.errors import OutboxKitError
from outboxkit.findings import Finding, FindingSeverity, note, problem
from outboxkit_relay import redaction
from outboxkit_relay.diagnose import broker_checks, postgresql_checks, table_checks
from outboxkit_relay.diagnose.patient import Patient, Thresholds

if TYPE_CHECKING:
    from datetime import timedelta

    from sqlalchemy import Connection, Engine, MetaData

    from outboxkit.brokers import Subscription
    from outboxkit_relay.settings import Settings

__all__ = ["doctor", "examine"]

_ORDER: Final = tuple(FindingSeverity)
_USUAL: Final = Thresholds()
_OF_DIALECTS: Final = {"postgresql": postgresql_checks.CHECKS}

Check = Callable[[Patient], Iterator[Finding]]


def doctor(
    settings: Settings,
    *,
    patience: timedelta,
    metadata: MetaData | None = None,
    subscriptions: Sequence[Subscription] = (),
    role: str = "relay",
    thresholds: Thresholds = _USUAL,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> list[Finding]:
    """Examines database and brokers; returns what is wrong, the worst first, and nothing for a healthy set-up.

    Transaction: reads only, each statement for itself.

    Args:
        settings: of the relay.
        patience: no statement and no attempt to connect takes longer.
        metadata: the application's, if Alembic compares it with the database.
        subscriptions: of consumers, whose topics and queues are to be there.
        role: of the login, as `outboxkit.migrations.roles` names it: its rights are compared.
        thresholds: from where on something counts as wrong.
        clock: of this machine.
    """
    found: list[Finding] = []
    with _opened(settings, patience) as (engine, direct):
        connection = _connected(engine, found)
        if connection is not None:
            with connection, _own(direct, connection) as reading:
                patient = Patient(
                    settings=settings,
                    connection=connection,
                    direct=reading,
                    metadata=metadata,
                    subscriptions=tuple(subscriptions),
                    role=role,
                    thresholds=thresholds,
                    clock=clock,
                )
                found += examine(patient)
    return sorted(found, key=lambda one: _ORDER.index(one.severity))


def examine(patient: Patient) -> list[Finding]:
    """Carries out every check; returns what they found, in their order.

    Transaction: reads only, on the patient's connections.
    """
    checks: list[Check] = [*_OF_DIALECTS.get(patient.connection.dialect.name, ()), table_checks.check_tables]
    if migrations.current(patient.connection):
        checks += [*table_checks.CHECKS, *broker_checks.CHECKS]
    return [one for check in checks for one in _carried_out(check, patient)]


def _carried_out(check: Check, patient: Patient) -> list[Finding]:
    name = check.__name__.removeprefix("check_").replace("_", "-")
    try:
        return list(check(patient))
    except DBAPIError as error:
        if dialects.is_missing_table(error):
            return []  # `check_tables` tells of it
        seen = f"{name} was not examined: {redaction.cause(error.orig or error)}"
        return [note("not-examined", seen, "run outboxkit doctor as the owner of the tables, or outboxkit init")]
    except OutboxKitError as error:
        return [problem("settings", error.message, "correct the settings: docs/reference/settings.md")]


@contextmanager
def _opened(settings: Settings, patience: timedelta) -> Iterator[tuple[Engine, Engine]]:
    schema = settings.database_schema
    engine = dialects.open_engine(
        settings.database(), patience=patience, pooled=settings.pooled, schema=schema, creates=False
    )
    direct = dialects.open_engine(settings.direct_database(), patience=patience, schema=schema, creates=False)
    try:
        yield engine, direct
    finally:
        engine.dispose()
        direct.dispose()


def _connected(engine: Engine, found: list[Finding]) -> Connection | None:
    """Connects; what keeps it from doing so is a finding."""
    try:
        return engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    except DBAPIError as error:
        where = engine.url.render_as_string(hide_password=True)
        away = f"{where} cannot be reached ({type(error.orig or error).__name__})"
        fix = "start the database, or correct its URL, the login and its rights"
        found.append(problem("database", dialects.refusal(engine.url, error) or away, fix))
        return None


@contextmanager
def _own(direct: Engine, connection: Connection) -> Iterator[Connection]:
    """The reading connection of a relay: the one that is open, unless a pooler stands before it."""
    if direct.url == connection.engine.url:
        yield connection
    else:
        with direct.connect().execution_options(isolation_level="AUTOCOMMIT") as other:
            yield other
