"""Bulk statements: an ORM UPDATE, DELETE or INSERT changes rows without objects, so nobody emits for them.

On a model with `OutboxMixin` they are refused, unless the statement, the session or the model allows them, or `bulk`
runs them and emits one event per row. What no hook can see is left to the SQL function ``outboxkit_emit`` and a trigger
(see `outboxkit.migrations`): Core statements on a connection, ``bulk_save_objects``, raw SQL, other programs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Insert, UpdateBase
from sqlalchemy import event as listeners
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Mapper, ORMExecuteState, Session, scoped_session

from outboxkit.capture.emit import OutboxMixin, sync_session
from outboxkit.capture.route import BULK_RULES, route_of
from outboxkit.errors import CaptureError

__all__ = ["GUARD", "bulk"]

GUARD: Final = "outbox_bulk"  #: execution option of a statement, or key of `Session.info`: raise, warn or allow
_MAX_BINDS: Final = 30_000  # of one statement: SQLite takes 32,766, PostgreSQL's protocol 65,535


def bulk(
    session: Session | scoped_session[Any],
    statement: Any,
    event: Callable[[Any], object],
    parameters: Sequence[Mapping[str, Any]] | None = None,
) -> int:
    """Runs an ORM UPDATE, DELETE or INSERT and emits one event per row that it touched.

    What the session has changed is flushed first, also with ``autoflush=False``: the statement reads the rows again,
    and would overwrite it. On an `AsyncSession`: ``await session.run_sync(bulk, statement, make_event)``.

    Transaction: joins the session's.
    Guarantee: the rows change and the events are published together, or neither.

    Args:
        session: the session.
        statement: ``update(Order)…``, ``delete(Order)…`` or ``insert(Order)…``; the database must know RETURNING.
        event: makes the event of one object, as it is after an UPDATE or INSERT, and was before a DELETE.
        parameters: the rows of an ``insert(Order)`` without values, any number of them.

    Returns:
        How many rows were touched.

    Raises:
        CaptureError: the statement is none of these, or not on a model that captures.
    """
    if parameters is not None and not isinstance(statement, Insert):
        raise CaptureError("bulk() takes a list of parameters for insert() only; give update() and delete() a where()")
    given: object = session
    if isinstance(given, AsyncSession | async_scoped_session):
        raise CaptureError("on an AsyncSession: await session.run_sync(bulk, statement, make_event)")
    model, sync = _model(statement), sync_session(session)
    sync.flush()
    touched = 0
    for part in _parts(statement):
        objects = sync.scalars(*_with_returning(part, model, parameters), execution_options=_OPTIONS).all()
        for found in objects:
            found.emit(event(found))
        touched += len(objects)
    return touched


_OPTIONS: Final = {GUARD: "allow", "populate_existing": True}


def _parts(statement: Any) -> Iterator[Any]:
    """The statement itself; one with very many VALUES in several, because no database takes as many parameters."""
    rows = [row for values in getattr(statement, "_multi_values", ()) for row in values]
    size = max(1, _MAX_BINDS // max(1, len(statement.table.columns)))
    if len(rows) <= size:
        yield statement
        return
    for start in range(0, len(rows), size):
        part = statement._clone()  # noqa: SLF001  no public way leads from a statement to its values
        part._multi_values = (rows[start : start + size],)  # noqa: SLF001
        yield part


def _with_returning(statement: Any, model: type, parameters: Any) -> tuple[Any, ...]:
    if parameters is None:
        return (statement.returning(model),)
    return statement.returning(model, sort_by_parameter_order=_keeps_order(statement)), list(parameters)


def _keeps_order(statement: Any) -> bool:
    """True if RETURNING can be made to keep the order of the rows: not for an upsert."""
    return getattr(statement, "_post_values_clause", None) is None


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
    if rule not in BULK_RULES:
        raise CaptureError(f"{GUARD} is one of {', '.join(map(repr, BULK_RULES))}, not {rule!r}")
    text = (
        f"a bulk statement on {mapper.class_.__qualname__} changes rows without emitting events: run it by "
        f"outboxkit.bulk(session, statement, make_event), or allow it by execution_options({GUARD}='allow')"
    )
    if rule == "raise":
        raise CaptureError(text)
    warnings.warn(text, RuntimeWarning, stacklevel=2)
