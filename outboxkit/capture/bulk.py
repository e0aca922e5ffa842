"""Bulk statements: an ORM UPDATE, DELETE or INSERT changes rows without objects, so nobody emits for them.

On a model with `OutboxMixin` they are refused, unless the statement, the session or the model allows them, or `bulk`
runs them and emits one event per row. What no hook can see is left to the SQL function ``outboxkit_emit`` and a trigger
(see `outboxkit.migrations`): Core statements on a connection, ``bulk_save_objects``, raw SQL, other programs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

from sqlalchemy import UpdateBase
from sqlalchemy import event as listeners
from sqlalchemy.orm import Mapper, ORMExecuteState, Session

from outboxkit.capture.emit import OutboxMixin, route_of
from outboxkit.errors import CaptureError

__all__ = ["GUARD", "bulk"]

GUARD: Final = "outbox_bulk"  #: execution option of a statement, or key of `Session.info`: raise, warn or allow


def bulk(session: Session, statement: Any, event: Callable[[Any], object]) -> int:
    """Runs an ORM UPDATE, DELETE or INSERT and emits one event per row that it touched.

    On an `AsyncSession`: ``await session.run_sync(bulk, statement, make_event)``.

    Transaction: joins the session's.
    Guarantee: the rows change and the events are published together, or neither.

    Args:
        session: the session.
        statement: ``update(Order)…``, ``delete(Order)…`` or ``insert(Order)…``; the database must know RETURNING.
        event: makes the event of one object, as it is after an UPDATE or INSERT, and was before a DELETE.

    Returns:
        How many rows were touched.

    Raises:
        CaptureError: the statement is none of these, or not on a model that captures.
    """
    model = _model(statement)
    options = {GUARD: "allow", "populate_existing": not statement.is_insert}
    objects = session.scalars(statement.returning(model), execution_options=options).all()
    for found in objects:
        found.emit(event(found))
    return len(objects)


def _model(statement: Any) -> type[OutboxMixin]:
    model = statement.entity_description.get("entity") if isinstance(statement, UpdateBase) else None
    if not isinstance(model, type) or not issubclass(model, OutboxMixin):
        raise CaptureError("bulk() runs update(), delete() or insert() of a model that has OutboxMixin")
    return model


@listeners.listens_for(Session, "do_orm_execute")
def _guard(state: ORMExecuteState) -> None:
    if state.is_select or not (state.is_update or state.is_delete or state.is_insert):
        return
    mapper: Mapper[Any] | None = state.bind_mapper
    if mapper is None or not issubclass(mapper.class_, OutboxMixin):
        return
    rule = state.execution_options.get(GUARD) or state.session.info.get(GUARD) or route_of(mapper.class_).bulk
    if rule == "allow":
        return
    text = (
        f"a bulk statement on {mapper.class_.__qualname__} changes rows without emitting events: run it by "
        f"outboxkit.capture.bulk.bulk(session, statement, make_event), or say execution_options({GUARD}='allow')"
    )
    if rule == "raise":
        raise CaptureError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=2)
