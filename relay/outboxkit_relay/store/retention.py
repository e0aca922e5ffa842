"""Retention: deletes what is no longer kept. Never a message on its way, never an open dead letter."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from sqlalchemy import Interval, Table, and_, bindparam, delete, exists, func, select, text, tuple_

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.saga.core import Status

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement, Connection

    from outboxkit_relay.settings import Retention

__all__ = ["PRUNED", "prune", "prune_table"]

_LEDGER: Final = tables.outbox_ledger
_INBOX: Final = tables.inbox_messages
_LETTERS: Final = tables.dead_letters
_AUDIT: Final = tables.outbox_audit
_KEYS: Final = tables.outbox_idempotency
_SAGAS: Final = tables.outbox_sagas
_ENDED: Final = (Status.COMPLETED.value, Status.COMPENSATED.value)

#: the tables that grow with time, and are kept for as long as `Retention` says
PRUNED: Final = (
    "outbox_ledger",
    "inbox_messages",
    "dead_letters",
    "outbox_audit",
    "outbox_idempotency",
    "outbox_sagas",
)


def prune(
    connection: Connection, retention: Retention, *, dry_run: bool = False, limit: int = 10_000
) -> dict[str, int]:
    """Deletes at most ``limit`` rows of each table that are older than their retention; returns how many by table.

    Transaction: joins the caller's; does not commit. Call it again while a count reaches the limit.
    Guarantee: the inbox row of an open dead letter stays, however old: without it a redelivery would take effect.

    Writes: ``outbox_ledger``, ``inbox_messages``, ``dead_letters``, ``outbox_audit``, ended ``outbox_sagas``, and
    ``outbox_idempotency``, whose rows say themselves when they expire. Index used: those on the times.

    Args:
        connection: the caller's.
        retention: how long each is kept, by the database's clock.
        dry_run: counts only, without a limit.
        limit: bounds the transaction.
    """
    due = _due(retention)
    if dry_run:
        return {table.name: _count(connection, table, old) for table, old in due.items()}
    return {table.name: _delete(connection, table, old, limit) for table, old in due.items()}


def prune_table(connection: Connection, retention: Retention, name: str, *, limit: int) -> int:
    """Deletes at most ``limit`` old rows of one table, but none that others have locked; returns how many.

    A login that may not delete has them deleted by ``outboxkit_prune``, a function of the tables' owner, if it may call
    that; the function keeps what is younger than a floor of its own.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `prune`.
    """
    table, old = next((table, old) for table, old in _due(retention).items() if table.name == name)
    if connection.dialect.name == "postgresql" and not connection.execute(_MAY_DELETE, {"relation": name}).scalar():
        asked = {"relation": name, "kept": _kept(retention)[name], "limit": limit}
        return int(connection.execute(_ASK, asked).scalar_one())
    return _delete(connection, table, old, limit)


#: A lock needs the right to UPDATE.
_MAY_DELETE: Final = text(
    "SELECT has_table_privilege(:relation, 'DELETE') AND has_table_privilege(:relation, 'UPDATE')"
)
_ASK: Final = text("SELECT outboxkit_prune(:relation, :kept, :limit)").bindparams(bindparam("kept", type_=Interval))


def _kept(retention: Retention) -> dict[str, timedelta]:
    """The time that rows of each table are kept; a key says by itself when it expires."""
    return {
        "outbox_ledger": retention.ledger,
        "inbox_messages": retention.inbox,
        "dead_letters": retention.dead_letters,
        "outbox_audit": retention.audit,
        "outbox_idempotency": timedelta(0),
        "outbox_sagas": retention.sagas,
    }


def _due(retention: Retention) -> dict[Table, ColumnElement[bool]]:
    """Lists what is old, by table."""
    return {
        _LEDGER: _older(_LEDGER.c.published_at, retention.ledger),
        _INBOX: and_(_older(_INBOX.c.handled_at, retention.inbox), ~_stands_for_an_open_letter()),
        _LETTERS: _older(_LETTERS.c.closed_at, retention.dead_letters),
        _AUDIT: _older(_AUDIT.c.at, retention.audit),
        _KEYS: _KEYS.c.expires_at < database_now(),
        _SAGAS: and_(_older(_SAGAS.c.updated_at, retention.sagas), _SAGAS.c.status.in_(_ENDED)),
    }


def _older(time: Column[object], than: timedelta) -> ColumnElement[bool]:
    return time < database_now(-than)


def _stands_for_an_open_letter() -> ColumnElement[bool]:
    return exists().where(
        _LETTERS.c.message_id == _INBOX.c.message_id,
        _LETTERS.c.consumer == _INBOX.c.consumer,
        _LETTERS.c.source == _INBOX.c.source,
        _LETTERS.c.closed_at.is_(None),
    )


def _count(connection: Connection, table: Table, old: ColumnElement[bool]) -> int:
    return connection.execute(select(func.count()).select_from(table).where(old)).scalar_one()


def _delete(connection: Connection, table: Table, old: ColumnElement[bool], limit: int) -> int:
    key = tuple_(*table.primary_key.columns)
    oldest = select(*table.primary_key.columns).where(old).limit(limit).with_for_update(skip_locked=True, of=table)
    return connection.execute(delete(table).where(key.in_(oldest))).rowcount
