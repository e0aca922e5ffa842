"""Change capture: a model that asks for it emits an event for each object created, updated or deleted.

Opt-in, by ``Outbox(changes=ChangeCapture())``: such events say how rows look, so the table's shape becomes a contract.
An explicit event that names an intent ages better.

An event holds the columns that changed, their old values as far as they were loaded, and their new ones. A column whose
value only the server knows after an UPDATE is not fetched. A collection or a child is not a column of its parent. What
the database changes by itself (cascades, triggers) is not seen.

The flush is what is captured, not the session: a flush deletes orphans and what its cascades reach, and no collection
of the session ever holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import ClauseElement, inspect
from sqlalchemy import event as listeners
from sqlalchemy.orm import InstanceState, Session, UOWTransaction

from outboxkit.capture import session_hooks
from outboxkit.capture.draft import Options
from outboxkit.capture.emit import OutboxMixin, emission_of
from outboxkit.capture.route import ChangeCapture, captures_changes, route_of

__all__: list[str] = []

Kind = Literal["created", "updated", "deleted"]
Values = dict[str, Any]

_ATTRIBUTE: Final = "_outboxkit_changes"
_COMPUTED: Final = "outboxkit_computed"


@dataclass(slots=True)
class _Change:
    """Changes of one object since the last event about it."""

    state: InstanceState[Any]
    kind: Kind
    old: Values = field(default_factory=dict)
    new: Values = field(default_factory=dict)
    over: bool = False  # told, or taken back

    def facts(self) -> Values:
        self.over = True
        key = {column.key: getattr(self.state.obj(), column.key) for column in _key_columns(self.state)}
        changed = sorted({*self.old, *self.new})
        return {"change": self.kind, "key": key, "changed": changed, "old": self.old, "new": self.new}


@listeners.listens_for(OutboxMixin, "before_delete", propagate=True)
def _before_delete(_mapper: object, _connection: object, entity: OutboxMixin) -> None:
    """The last moment at which what is expired can be loaded."""
    state: InstanceState[Any] = inspect(entity)
    if state.session is not None:
        session_hooks.complete_events_of(state.session, entity)
    if (changes := route_of(type(entity)).changes) is not None:
        for name in _columns(state, changes):
            getattr(entity, name)


@listeners.listens_for(Session, "before_flush", insert=True)
def _before_flush(session: Session, context: UOWTransaction, _objects: object) -> None:
    if captures_changes():
        context.attributes[_COMPUTED] = {
            state: computed for state, changes in _captured(session.dirty) if (computed := _computed(state, changes))
        }


@listeners.listens_for(Session, "after_flush", insert=True)
def _after_flush(session: Session, context: UOWTransaction) -> None:
    if not captures_changes():
        return
    computed: dict[InstanceState[Any], Values] = context.attributes.get(_COMPUTED, {})
    gone = {state for state, (is_delete, _) in context.states.items() if is_delete}
    for state, changes in _captured(session.new):
        if state not in gone:
            _tell(session, changes, _Change(state, "created", new=_loaded(state, changes)))
    for state, changes in _captured(session.dirty):
        if state not in gone:
            old, new = _difference(state, changes, computed.get(state, {}))
            if old or new:
                _tell(session, changes, _Change(state, "updated", old=old, new=new))
    for state, changes in _captured([state.obj() for state in context.states if state in gone]):
        _tell(session, changes, _Change(state, "deleted", old=_loaded(state, changes)))


def _captured(objects: Iterable[object]) -> Iterator[tuple[InstanceState[Any], ChangeCapture]]:
    for found in objects:
        if isinstance(found, OutboxMixin) and (changes := route_of(type(found)).changes) is not None:
            yield inspect(found), changes


def _tell(session: Session, changes: ChangeCapture, change: _Change) -> None:
    told = _changes(session)
    known = told.get(change.state)
    if changes.coalesce == "transaction" and known is not None and not known.over and _merge(known, change):
        return
    told[change.state] = change
    if change.kind not in changes.kinds:
        return
    name = changes.name or change.state.class_.__name__.lower()
    _, emission = emission_of(change.state, change.facts, Options(type=f"{name}.{change.kind}"))
    complete = emission.complete
    emission.complete = lambda: None if change.over else complete()
    emission.late = changes.coalesce == "transaction"
    session_hooks.add(session, emission)


def _merge(known: _Change, change: _Change) -> bool:
    """Merges a change into the known one; True if nothing more is to be told."""
    if change.kind == "deleted":
        known.over = True
        return known.kind == "created"
    known.old = {**change.old, **known.old} if known.kind == "updated" else {}
    known.new.update(change.new)
    return True


def _changes(session: Session) -> dict[InstanceState[Any], _Change]:
    transaction = session.get_nested_transaction() or session.get_transaction()
    found: dict[InstanceState[Any], _Change] | None = getattr(transaction, _ATTRIBUTE, None)
    if found is None:
        found = {}
        setattr(transaction, _ATTRIBUTE, found)
    return found


# --- columns -----------------------------------------------------------------------------------------------------


def _columns(state: InstanceState[Any], changes: ChangeCapture) -> Iterator[str]:
    for attribute in state.mapper.column_attrs:
        if attribute.key not in changes.exclude and (changes.include is None or attribute.key in changes.include):
            yield attribute.key


def _key_columns(state: InstanceState[Any]) -> list[Any]:
    return [state.mapper.get_property_by_column(column) for column in state.mapper.primary_key]


def _loaded(state: InstanceState[Any], changes: ChangeCapture) -> Values:
    values = state.dict
    return {name: values[name] for name in _columns(state, changes) if name in values}


def _computed(state: InstanceState[Any], changes: ChangeCapture) -> Values:
    """The columns that an SQL expression will set, with their old values: after the flush no history tells of them."""
    histories = {name: state.attrs[name].history for name in _columns(state, changes)}
    return {
        name: history.deleted[0] if history.deleted else None
        for name, history in histories.items()
        if history.added and isinstance(history.added[0], ClauseElement)
    }


def _difference(state: InstanceState[Any], changes: ChangeCapture, computed: Values) -> tuple[Values, Values]:
    old: Values = dict(computed)
    new: Values = {name: getattr(state.obj(), name) for name in computed}
    for name in _columns(state, changes):
        history = state.attrs[name].history
        if name not in computed and history.has_changes():
            old.update({name: history.deleted[0]} if history.deleted else {})
            new[name] = history.added[0] if history.added else None
    return old, new
