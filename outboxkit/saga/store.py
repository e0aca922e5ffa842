"""The rows of sagas: one for each instance, read and changed under a lock in the transaction of what happened."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, select, update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dialects import insert_ignoring, naming_missing_tables
from outboxkit.saga.core import Instance, Status

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection, Row

__all__ = ["SagaRow", "add", "change", "count", "find", "get"]

_SAGAS: Final = tables.outbox_sagas
_MAX_HISTORY: Final = 200  # entries: the first ones and the latest are the interesting ones


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaRow:
    """One instance of a saga, as it is stored.

    Attributes:
        saga: name of the saga.
        key: of the instance.
        version: of the saga that began it.
        instance: its progress.
        step: name of the current step, or of the step that is being undone; empty when it has ended.
        state: the state as JSON bytes.
        history: what happened, in order: ``[instant, text]``.
        started_at: by the database's clock.
        updated_at: likewise.
        due_at: end of the current wait; None when it has none.
        correlation_id: names the conversation.
    """

    saga: str
    key: str
    version: int
    instance: Instance
    step: str
    state: bytes
    history: tuple[tuple[str, str], ...]
    started_at: datetime
    updated_at: datetime
    due_at: datetime | None
    correlation_id: str


def add(connection: Connection, row: dict[str, Any]) -> bool:
    """Inserts an instance; False when there is one of that saga and key.

    Transaction: joins the caller's; does not commit.
    """
    insert = insert_ignoring(connection, _SAGAS).values(**row).returning(_SAGAS.c.key)
    return connection.execute(insert).one_or_none() is not None


@naming_missing_tables()
def get(connection: Connection, saga: str, key: str, *, lock: bool = False) -> SagaRow | None:
    """Returns one instance, or None.

    Transaction: joins the caller's. Locks: the row, with ``lock``.
    """
    query = select(_SAGAS).where(_is(saga, key))
    found = connection.execute(query.with_for_update() if lock else query).one_or_none()
    return None if found is None else _row(found)


@naming_missing_tables()
def find(
    connection: Connection, *, saga: str | None = None, status: Status | None = None, limit: int = 100
) -> list[SagaRow]:
    """Lists instances, the one that changed last first.

    Transaction: joins the caller's; reads only.
    """
    query = select(_SAGAS).where(*_chosen(saga, status)).order_by(_SAGAS.c.updated_at.desc(), _SAGAS.c.key)
    return [_row(found) for found in connection.execute(query.limit(limit))]


@naming_missing_tables()
def count(connection: Connection, *, saga: str | None = None, status: Status | None = None) -> int:
    """Counts what `find` would find without a limit.

    Transaction: joins the caller's; reads only.
    """
    return connection.execute(select(func.count()).select_from(_SAGAS).where(*_chosen(saga, status))).scalar_one()


def change(connection: Connection, row: SagaRow, instance: Instance, **values: Any) -> None:
    """Stores the next state of an instance that `get` has locked.

    Transaction: joins the caller's; does not commit.
    """
    progress = values_of(instance) | {"updated_at": database_now()} | values
    connection.execute(update(_SAGAS).where(_is(row.saga, row.key)).values(**progress))


def values_of(instance: Instance) -> dict[str, Any]:
    """The columns of an instance's progress."""
    return {
        "status": instance.status.value,
        "at": instance.step,
        "number": instance.number,
        "tries": instance.tries,
        "done": list(instance.done),
        "undo": list(instance.undo),
    }


def with_entry(history: tuple[tuple[str, str], ...], now: datetime, *texts: str) -> list[list[str]]:
    """The history and one entry more for each text; of a long one the middle is left out."""
    entries = [*map(list, history), *([now.astimezone(UTC).isoformat(timespec="milliseconds"), text] for text in texts)]
    half = _MAX_HISTORY // 2
    return entries if len(entries) <= _MAX_HISTORY else [*entries[:half], *entries[-half:]]


def due(delay: timedelta | None) -> Any:
    """The end of a wait that begins now, by the database's clock."""
    return None if delay is None else database_now(delay)


def _is(saga: str, key: str) -> ColumnElement[bool]:
    return and_(_SAGAS.c.saga == saga, _SAGAS.c.key == key)


def _chosen(saga: str | None, status: Status | None) -> list[ColumnElement[bool]]:
    names = [] if saga is None else [_SAGAS.c.saga == saga]
    return names if status is None else [*names, _SAGAS.c.status == status.value]


def _row(row: Row[Any]) -> SagaRow:
    instance = Instance(
        status=Status(row.status),
        step=row.at,
        number=row.number,
        tries=row.tries,
        done=tuple(row.done),
        undo=tuple(row.undo),
    )
    return SagaRow(
        saga=row.saga,
        key=row.key,
        version=row.version,
        instance=instance,
        step=row.step,
        state=bytes(row.state),
        history=tuple((at, text) for at, text in row.history),
        started_at=row.started_at,
        updated_at=row.updated_at,
        due_at=row.due_at,
        correlation_id=row.correlation_id,
    )
