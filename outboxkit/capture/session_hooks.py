"""Unwritten emissions: they belong to a session's transaction, become rows with its flush, and die with it.

How it works, and why nothing is lost or invented:

- What is emitted waits in a list that is an attribute of the current `SessionTransaction`, a savepoint's own or the
  root's. A rollback throws the transaction away, and the list with it; there is nothing to clean up.
- A pending marker object makes the session dirty, so that a flush happens (before a query, a savepoint, a commit) even
  if nothing else is new. It leaves the session before the flush looks at it.
- `after_flush` writes the list by one INSERT: keys that the database made are known, and the locks of the domain's rows
  are already taken, so that the order of positions is the order of those locks. A flush without other work has no
  `after_flush`: then `before_flush` writes at once. What any path left over, `before_commit` writes.
- The list keeps an emission until its INSERT has returned.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import count
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import Column, Connection, Integer, MetaData, Table, event, exc
from sqlalchemy.orm import Mapper, Session, SessionTransaction, registry
from sqlalchemy.orm.exc import UnmappedInstanceError

from outboxkit import outbox, tables
from outboxkit.capture import _refusals
from outboxkit.errors import CaptureError
from outboxkit.message import Message

__all__ = ["Emission", "add", "install", "remove"]


@dataclass(slots=True)
class Emission:
    """One emitted event on its way to a row.

    Attributes:
        complete: makes the message, None for none after all; called once, after the domain's flush.
        entity: the object that emitted, None when the session itself did.
        mapper: of the entity: the row goes to the same database.
        due: publish later: at an instant, or a time after the insert by the database's clock.
        late: not with the next flush, but when its transaction (or savepoint) commits or a savepoint begins inside it.
        number: of its emission: what one flush writes keeps the order in which it was emitted, in whatever order the
            objects joined the session.
    """

    complete: Callable[[], Message | None]
    entity: object = None
    mapper: Mapper[Any] | None = None
    due: datetime | timedelta | None = None
    late: bool = False
    number: int = field(default_factory=count().__next__)


def add(session: Session, emission: Emission) -> None:
    """Adds an emission to the session's current transaction.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is stored if and only if the transaction, and the savepoint, that is current now commits.

    Raises:
        CaptureError: there is no transaction, it has failed or ended, or it commits every statement by itself.
    """
    transaction = _current(session) or _begin(session)
    if not transaction.is_active:
        raise CaptureError(
            "the session's transaction has ended or failed, or another task is using it, so nothing can be stored with "
            "it now: emit before the commit, roll back and begin again, or give each task its own session"
        )
    unwritten = _unwritten(transaction)
    if emission.mapper not in unwritten.connections and emission.mapper not in unwritten.looked_at:
        _refusals.refuse_autocommit_engine(session, emission.mapper)
        unwritten.looked_at.add(emission.mapper)
    unwritten.emissions.append(emission)
    if emission.late:
        _connection(transaction, emission.mapper)  # the flush knows where rows go; at the commit nobody may ask again
    if unwritten.writing or emission.late:
        return  # emitted by an event that is being made: the loop that writes goes on with it
    if not _flushing(session):
        _mark(session, unwritten)
    elif _is_clean(session):
        _write(session, transaction)  # in a before_flush hook, and the flush will find nothing to do


def install(target: Any = Session) -> None:
    """Listens to sessions; importing outboxkit did it for every `Session`. A second time does nothing."""
    for name, listener in _LISTENERS.items():
        if not event.contains(target, name, listener):
            event.listen(target, name, listener)


def remove(target: Any = Session) -> None:
    """Stops listening: what is emitted afterwards is not stored."""
    for name, listener in _LISTENERS.items():
        if event.contains(target, name, listener):
            event.remove(target, name, listener)


# --- what waits with a transaction -------------------------------------------------------------------------------

_ATTRIBUTE: Final = "_outboxkit_unwritten"


class _Unwritten:
    __slots__ = ("committing", "connections", "emissions", "finished", "looked_at", "marker", "partial", "writing")

    def __init__(self) -> None:
        self.emissions: list[Emission] = []
        self.marker: _Marker | None = None
        self.partial = False  # the flush that runs was told to look at some objects only
        self.connections: dict[Mapper[Any] | None, Connection] = {}  # where messages are written; the root knows all
        self.looked_at: set[Mapper[Any] | None] = set()  # their engines do not commit by themselves
        self.committing = False  # nothing is late any more
        self.writing = False
        self.finished = False

    def is_due(self) -> bool:
        """Whether the next flush has something to write."""
        return any(not emission.late for emission in self.emissions)


def _current(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _begin(session: Session) -> SessionTransaction:
    if not session.autobegin:
        raise CaptureError("the session has no transaction, and does not begin one by itself: call session.begin()")
    return session.begin()


def _unwritten(transaction: SessionTransaction) -> _Unwritten:
    found = _found(transaction)
    if found is None:
        found = _Unwritten()
        setattr(transaction, _ATTRIBUTE, found)
    return found


def _found(transaction: SessionTransaction | None) -> _Unwritten | None:
    return getattr(transaction, _ATTRIBUTE, None)


def _flushing(session: Session) -> bool:
    return session._flushing  # noqa: SLF001 # there is no public way to ask


def _has_new_objects(session: Session) -> bool:
    return bool(session._new)  # noqa: SLF001 # session.new makes a copy, and this is asked for every event


def _is_clean(session: Session) -> bool:
    return not (session.new or session.dirty or session.deleted)


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

    mapper.cascade_iterator = refuse_expunge  # type: ignore[method-assign] # only expunge() asks for this one


def _mark(session: Session, unwritten: _Unwritten) -> None:
    if unwritten.marker is not None or _has_new_objects(session):
        return
    unwritten.marker = _Marker()
    try:
        session.add(unwritten.marker)
    except UnmappedInstanceError:  # the application called clear_mappers()
        _map_marker()
        unwritten.marker = _Marker()
        session.add(unwritten.marker)


def _unmark(session: Session, unwritten: _Unwritten) -> None:
    marker, unwritten.marker = unwritten.marker, None
    if marker is not None and marker in session:
        marker.leaving = True
        session.expunge(marker)


# --- what sessions tell us ---------------------------------------------------------------------------------------


def _before_flush(session: Session, _context: object, objects: object) -> None:
    transaction = _current(session)
    if transaction is None or (unwritten := _found(transaction)) is None:
        return
    unwritten.partial = objects is not None
    if unwritten.partial:
        return
    _unmark(session, unwritten)
    if unwritten.emissions:
        _prepare(session, transaction, unwritten.emissions)
        if _is_clean(session):
            _write(session, transaction, final=unwritten.committing)


def _after_flush(session: Session, _context: object) -> None:
    transaction = _current(session)
    unwritten = _found(transaction)
    if transaction is not None and unwritten is not None and not unwritten.partial:
        _write(session, transaction, final=unwritten.committing)


def _after_transaction_create(session: Session, transaction: SessionTransaction) -> None:
    outer = transaction.parent
    if transaction.nested and outer is not None and (unwritten := _found(outer)) is not None and unwritten.emissions:
        _write(session, outer, final=True)  # before what the savepoint will say, and not inside it


def _before_commit(session: Session) -> None:
    transaction = _current(session)
    if transaction is None:
        return
    outer: SessionTransaction | None = transaction
    while outer is not None:  # of a root that commits with a savepoint still open we hear the savepoint's commit first
        _unwritten(outer).committing = True
        outer = outer.parent
    if _unwritten(transaction).emissions:
        session.flush()
        _write(session, transaction, final=True)
    if (root := _found(session.get_transaction())) is not None:
        for connection in root.connections.values():
            _refusals.refuse_aborted(connection)


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction() and (root := _found(session.get_transaction())) is not None:
        root.finished = True


def _after_rollback(session: Session) -> None:
    if (unwritten := _found(_current(session))) is not None:
        unwritten.finished = True


def _pending_to_transient(session: Session, entity: object) -> None:
    """A new object, or the marker itself, leaves: expunge_all() takes objects away, not what was emitted."""
    if isinstance(entity, _Marker) and entity.leaving:
        return
    transaction = _current(session)
    unwritten = _found(transaction)
    if transaction is None or unwritten is None:
        return
    if unwritten.marker is entity:
        unwritten.marker = None
    if transaction.is_active and not _flushing(session) and unwritten.is_due():
        _mark(session, unwritten)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if (ended := _found(transaction)) is not None:
        _unmark(session, ended)
        spoken = ended.emissions or ended.connections
        known = ended.finished or ended.committing or sys.exc_info()[0] is not None  # an error says enough
        if transaction.parent is None and spoken and not known:
            warnings.warn("a session was closed without commit: its events are dropped", ResourceWarning, stacklevel=2)
    unwritten = _found(_current(session))
    if unwritten is not None and session.is_active and unwritten.is_due():
        _mark(session, unwritten)  # emitted while a flush ran, too late for it: the next flush takes it


_LISTENERS: Final[dict[str, Callable[..., None]]] = {
    "before_flush": _before_flush,
    "after_flush": _after_flush,
    "after_transaction_create": _after_transaction_create,
    "before_commit": _before_commit,
    "after_commit": _after_commit,
    "after_rollback": _after_rollback,
    "after_transaction_end": _after_transaction_end,
    "pending_to_transient": _pending_to_transient,
}


# --- writing -----------------------------------------------------------------------------------------------------

_CLAUSE: Final = tables.outbox_messages.insert()  # what a routing session is asked about
_NUMBER: Final = attrgetter("number")
_MAX_ROUNDS: Final = 100  # events that emit events; what is left then waits for the next flush, as SQLAlchemy bounds it


def _prepare(session: Session, transaction: SessionTransaction, emissions: Iterable[Emission]) -> None:
    """Refuses autocommit before the domain's rows are written, and completes events of objects that will be deleted."""
    for mapper in dict.fromkeys([emission.mapper for emission in emissions]):
        _connection(transaction, mapper)
    deleted = session.deleted
    for emission in emissions if deleted else ():
        if not emission.late and emission.entity is not None and emission.entity in deleted:
            _complete(emission)


def complete_events_of(session: Session, entity: object) -> None:
    """Completes the events of an object whose row is about to be deleted: afterwards nothing of it can be loaded.

    The flush finds some objects by itself (orphans, and what a cascade reaches), so ``session.deleted`` does not tell.
    """
    unwritten = _found(_current(session))
    for emission in () if unwritten is None else unwritten.emissions:
        if emission.entity is entity and not emission.late:
            _complete(emission)


def _complete(emission: Emission) -> None:
    emission.complete = partial(_identity, emission.complete())


def _identity(message: Message | None) -> Message | None:
    return message


def _write(session: Session, transaction: SessionTransaction, *, final: bool = False) -> None:
    unwritten = _unwritten(transaction)
    if unwritten.writing:
        return  # an event that is being made ran a query, and the session flushed before it
    unwritten.writing = True
    try:
        for _ in range(_MAX_ROUNDS):
            batch = [emission for emission in unwritten.emissions if final or not emission.late]
            if not batch:
                return
            _insert(transaction, batch)
            written = set(map(id, batch))
            unwritten.emissions = [emission for emission in unwritten.emissions if id(emission) not in written]
    finally:
        unwritten.writing = False
    if not _flushing(session):
        _mark(session, unwritten)


def _insert(transaction: SessionTransaction, batch: list[Emission]) -> None:
    fresh: dict[Connection, list[Message]] = {}
    scheduled: dict[Connection, list[tuple[Message, datetime | timedelta]]] = {}
    known = _unwritten(transaction).connections
    for emission in sorted(batch, key=_NUMBER):
        connection = known.get(emission.mapper) or _connection(transaction, emission.mapper)
        if (message := emission.complete()) is None:
            continue
        if emission.due is None:
            fresh.setdefault(connection, []).append(message)
        else:
            scheduled.setdefault(connection, []).append((message, emission.due))
    for connection in {**fresh, **scheduled} if transaction.nested else ():
        _refusals.refuse_committing_savepoint(connection)
    for connection, messages in fresh.items():
        outbox.write(connection, messages)
    for connection, later in scheduled.items():
        outbox.schedule(connection, later)


def _connection(transaction: SessionTransaction, mapper: Mapper[Any] | None) -> Connection:
    known = _unwritten(transaction).connections  # not the root's: asking a savepoint's transaction is what begins it
    if (connection := known.get(mapper)) is None:
        connection = known[mapper] = _connect(transaction, mapper)
        root = transaction.session.get_transaction()
        _unwritten(root or transaction).connections.setdefault(mapper, connection)
    return connection


def _connect(transaction: SessionTransaction, mapper: Mapper[Any] | None) -> Connection:
    """Finds the connection that a flush would use: a routing session answers others with a read replica."""
    session = transaction.session
    flushing = session._flushing  # noqa: SLF001  SQLAlchemy's own recipe for routing sessions asks it
    session._flushing = True  # noqa: SLF001
    try:
        connection = transaction.connection(mapper, clause=_CLAUSE)
        _refusals.refuse_autocommit(connection)
        if mapper is None:
            _refusals.refuse_elsewhere(session, connection, besides=_Marker)
    except exc.UnboundExecutionError as error:
        raise CaptureError(_refusals.unbound(error)) from error
    finally:
        session._flushing = flushing  # noqa: SLF001
    return connection


_map_marker()
install()
