"""Unwritten emissions: they belong to a session's transaction, become rows after its flush, and die with it.

How it works, and why nothing is lost or invented:

- What is emitted waits in a list that is an attribute of the `SessionTransaction` that is current, a savepoint's own or
  the root's. A rollback throws the transaction away, and the list with it; there is nothing to clean up.
- A pending marker object makes the session dirty, so that a flush happens (autoflush, a savepoint's begin, a commit) even
  if nothing else changed. It leaves the session before the flush looks at it.
- `after_flush` writes the list: keys that the database made are known, and the domain rows' locks are already taken, so
  that the order of positions is the order of those locks. If nothing else is dirty there is no `after_flush`, so
  `before_flush` writes at once; what any path forgot, `before_commit` writes.
- The list keeps an emission until its INSERT has returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, Integer, MetaData, Table, event, exc
from sqlalchemy.orm import Session, registry
from sqlalchemy.orm.exc import UnmappedInstanceError

from outboxkit import outbox, tables
from outboxkit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime, timedelta

    from sqlalchemy import Connection
    from sqlalchemy.orm import Mapper, SessionTransaction, UOWTransaction

    from outboxkit.message import Message

__all__ = ["Emission", "add", "install", "remove", "unwritten"]


@dataclass(slots=True, kw_only=True)
class Emission:
    """One emitted event on its way to a row.

    Attributes:
        complete: makes the message; called once, after the domain's flush.
        entity: the object that emitted, None when the session itself did.
        mapper: of the entity: the outbox is in the same database.
        due: publish later: at an instant, or a time after the insert by the database's clock.
    """

    complete: Callable[[], Message]
    entity: object = None
    mapper: Mapper[Any] | None = None
    due: datetime | timedelta | None = None


def add(session: Session, emission: Emission) -> None:
    """Adds an emission to the session's current transaction.

    Transaction: joins the session's, begins it if the session begins by itself.
    Guarantee: the message is stored if and only if the transaction (and the savepoint) that is current now commits.

    Raises:
        CaptureError: there is no transaction, or it has failed or ended.
    """
    waiting = _waiting(_transaction(session))
    waiting.emissions.append(emission)
    if not session._flushing:
        _mark(session, waiting)
    elif not (session.new or session.dirty or session.deleted):
        _write(session, waiting)  # inside a before_flush hook, and the flush will find nothing to do


def unwritten(session: Session) -> int:
    """How many emissions of the current transaction are not yet rows."""
    transaction = session.get_nested_transaction() or session.get_transaction()
    return len(_waiting(transaction).emissions) if transaction else 0


def install(target: Any = Session) -> None:
    """Listens to sessions; importing `outboxkit` has done it for every `Session`. Again does nothing."""
    for name, listener in _LISTENERS.items():
        if not event.contains(target, name, listener):
            event.listen(target, name, listener)


def remove(target: Any = Session) -> None:
    """Stops listening."""
    for name, listener in _LISTENERS.items():
        if event.contains(target, name, listener):
            event.remove(target, name, listener)


# --- the list of a transaction -----------------------------------------------------------------------------------


class _Waiting:
    __slots__ = ("checked", "emissions", "marker", "written")

    def __init__(self) -> None:
        self.emissions: list[Emission] = []
        self.marker: _Marker | None = None
        self.written: set[Connection] = set()


_ATTRIBUTE: Final = "_outboxkit_waiting"


def _waiting(transaction: SessionTransaction) -> _Waiting:
    found: _Waiting | None = getattr(transaction, _ATTRIBUTE, None)
    if found is None:
        found = _Waiting()
        setattr(transaction, _ATTRIBUTE, found)
    return found


def _current(session: Session) -> _Waiting | None:
    transaction = session.get_nested_transaction() or session.get_transaction()
    return getattr(transaction, _ATTRIBUTE, None)


def _transaction(session: Session) -> SessionTransaction:
    transaction = session.get_nested_transaction() or session.get_transaction()
    if transaction is None:
        if not session.autobegin:
            raise CaptureError("the session has no transaction: call session.begin() first")
        transaction = session.begin()
    if not transaction.is_active:
        raise CaptureError(
            "the session's transaction has ended or failed, so nothing can be written with it any more: "
            "emit before the commit, or roll back and begin again",
        )
    return transaction


# --- the marker --------------------------------------------------------------------------------------------------


class _Marker:
    """Makes a session dirty; never reaches the database."""

    leaving = False


def _map_marker() -> None:
    table = Table("outboxkit_marker", MetaData(), Column("id", Integer, primary_key=True))
    mapper = registry().map_imperatively(_Marker, table)
    cascade = mapper.cascade_iterator

    def refuse_expunge(type_: str, state: Any, *args: Any, **options: Any) -> Any:
        if type_ == "expunge" and not state.obj().leaving:
            raise CaptureError("an emitted event cannot be taken back by expunge(): roll back its savepoint instead")
        return cascade(type_, state, *args, **options)

    mapper.cascade_iterator = refuse_expunge  # type: ignore[method-assign] # only Session.expunge asks for this cascade


def _mark(session: Session, waiting: _Waiting) -> None:
    if waiting.marker is None or waiting.marker not in session:
        try:
            waiting.marker = _Marker()
            session.add(waiting.marker)
        except UnmappedInstanceError:  # the application called clear_mappers()
            _map_marker()
            _mark(session, waiting)


def _unmark(session: Session, waiting: _Waiting) -> None:
    marker, waiting.marker = waiting.marker, None
    if marker is not None and marker in session:
        marker.leaving = True
        session.expunge(marker)


# --- what the session tells us -----------------------------------------------------------------------------------


def _before_flush(session: Session, context: UOWTransaction, objects: Any) -> None:
    waiting = _current(session)
    if waiting is None or objects is not None:  # a partial flush leaves the rest, and the marker, for the next one
        return
    _unmark(session, waiting)
    if not waiting.emissions:
        return
    if not (session.new or session.dirty or session.deleted):
        _write(session, waiting)


def _after_flush(session: Session, context: UOWTransaction) -> None:
    waiting = _current(session)
    if waiting is not None and waiting.emissions and waiting.marker is None:
        _write(session, waiting)


def _before_commit(session: Session) -> None:
    waiting = _current(session)
    if waiting is None:
        return
    if waiting.emissions:
        session.flush()
    if waiting.emissions:
        _write(session, waiting)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    waiting = _current(session)
    if waiting is not None and waiting.emissions and session.is_active:
        _mark(session, waiting)


_LISTENERS: Final[dict[str, Callable[..., None]]] = {
    "before_flush": _before_flush,
    "after_flush": _after_flush,
    "before_commit": _before_commit,
    "after_transaction_end": _after_transaction_end,
}


# --- writing -----------------------------------------------------------------------------------------------------


def _write(session: Session, waiting: _Waiting) -> None:
    batch, waiting.emissions = waiting.emissions, []
    try:
        for connection, group in _by_connection(session, batch):
            outbox.write(connection, [one.complete() for one in group if one.due is None])
            outbox.schedule(connection, [(one.complete(), one.due) for one in group if one.due is not None])
            waiting.written.add(connection)
    except BaseException:
        waiting.emissions[:0] = batch
        raise


def _by_connection(session: Session, batch: list[Emission]) -> list[tuple[Connection, list[Emission]]]:
    groups: dict[Any, tuple[Connection, list[Emission]]] = {}
    mappers: dict[Any, Connection] = {}
    for emission in batch:
        connection = mappers.get(emission.mapper)
        if connection is None:
            connection = mappers[emission.mapper] = _connection(session, emission.mapper)
        groups.setdefault(connection, (connection, []))[1].append(emission)
    return list(groups.values())


def _connection(session: Session, mapper: Mapper[Any] | None) -> Connection:
    try:
        return session.connection(bind_arguments={"mapper": mapper, "clause": tables.outbox_messages.insert()})
    except exc.UnboundExecutionError as error:
        raise CaptureError(f"the session does not know which database the message belongs to: {error}") from error


_map_marker()
install()
