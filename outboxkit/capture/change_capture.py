"""Change capture: a model that asks for it tells what was created, updated and deleted, without `emit`.

Opt-in, by ``Outbox(capture={"created", "updated", "deleted"})``: such events say how rows look, so the table's shape
becomes a contract. An explicit event that names an intent ages better.

What is told: the columns that changed, their old values as far as they were loaded, and their new ones. A column whose
value only the server knows after an UPDATE is not fetched. A collection or a child is not a column of its parent. What
the database changes by itself (cascades, triggers) is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import ClauseElement, inspect
from sqlalchemy import event as listeners
from sqlalchemy.orm import InstanceState, Session, UOWTransaction

from outboxkit.capture import session_hooks
from outboxkit.capture.emit import CAPTURING, Outbox, OutboxMixin, emission_of, route_of

__all__: list[str] = []

Kind = Literal["created", "updated", "deleted"]
Values = dict[str, Any]

_ATTRIBUTE: Final = "_outboxkit_changes"
_COMPUTED: Final = "outboxkit_computed"


@dataclass(slots=True)
class _Change:
    """What happened to one object since the last event about it."""

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


@listeners.listens_for(Session, "before_flush", insert=True)
def _before_flush(session: Session, context: UOWTransaction, _objects: object) -> None:
    if not CAPTURING:
        return
    for state, route in _captured(session.deleted):
        for name in _columns(state, route):  # the last moment at which an expired one can be read
            getattr(state.obj(), name)
    context.attributes[_COMPUTED] = {
        state: computed for state, route in _captured(session.dirty) if (computed := _computed(state, route))
    }


@listeners.listens_for(Session, "after_flush", insert=True)
def _after_flush(session: Session, context: UOWTransaction) -> None:
    if not CAPTURING:
        return
    computed: dict[InstanceState[Any], Values] = context.attributes.get(_COMPUTED, {})
    for state, route in _captured(session.new):
        _tell(session, route, _Change(state, "created", new=_loaded(state, route)))
    for state, route in _captured(session.dirty):
        old, new = _difference(state, route, computed.get(state, {}))
        if old or new:
            _tell(session, route, _Change(state, "updated", old=old, new=new))
    for state, route in _captured(session.deleted):
        _tell(session, route, _Change(state, "deleted", old=_loaded(state, route)))


def _captured(objects: Any) -> Iterator[tuple[InstanceState[Any], Outbox]]:
    for found in objects:
        if isinstance(found, OutboxMixin):
            route = route_of(type(found))
            if route.capture:
                yield inspect(found), route


def _tell(session: Session, route: Outbox, change: _Change) -> None:
    changes = _changes(session)
    known = changes.get(change.state)
    if route.coalesce == "transaction" and known is not None and not known.over and _merge(known, change):
        return
    changes[change.state] = change
    if change.kind not in route.capture:
        return
    name = route.name or change.state.class_.__name__.lower()
    _, emission = emission_of(change.state, change.facts, topic="", options={"type": f"{name}.{change.kind}"})
    complete = emission.complete
    emission.complete = lambda: None if change.over else complete()
    emission.late = route.coalesce == "transaction"
    session_hooks.add(session, emission)


def _merge(known: _Change, change: _Change) -> bool:
    """Whether the known change has taken the new one in, so that nothing more is to be told."""
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


def _columns(state: InstanceState[Any], route: Outbox) -> Iterator[str]:
    for attribute in state.mapper.column_attrs:
        if attribute.key not in route.exclude and (route.include is None or attribute.key in route.include):
            yield attribute.key


def _key_columns(state: InstanceState[Any]) -> list[Any]:
    return [state.mapper.get_property_by_column(column) for column in state.mapper.primary_key]


def _loaded(state: InstanceState[Any], route: Outbox) -> Values:
    values = state.dict
    return {name: values[name] for name in _columns(state, route) if name in values}


def _computed(state: InstanceState[Any], route: Outbox) -> Values:
    """The columns that an SQL expression will set, with their old values: after the flush no history tells of them."""
    histories = {name: state.attrs[name].history for name in _columns(state, route)}
    return {
        name: history.deleted[0] if history.deleted else None
        for name, history in histories.items()
        if history.added and isinstance(history.added[0], ClauseElement)
    }


def _difference(state: InstanceState[Any], route: Outbox, computed: Values) -> tuple[Values, Values]:
    old: Values = dict(computed)
    new: Values = {name: getattr(state.obj(), name) for name in computed}
    for name in _columns(state, route):
        history = state.attrs[name].history
        if name not in computed and history.has_changes():
            old.update({name: history.deleted[0]} if history.deleted else {})
            new[name] = history.added[0] if history.added else None
    return old, new
