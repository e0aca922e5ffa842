"""Three verbs: what an application says happened becomes a message in the transaction in which it happened.

`OutboxMixin.emit` speaks for an object, `publish` for a session (an event, any number of receivers), `send` asks one
receiver for something (a command). None of them does I/O: they encode, check and remember. The rows are written by the
same transaction, with the session's next flush (see `outboxkit.capture.session_hooks`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import EllipsisType
from typing import Any, ClassVar, Final

from sqlalchemy import event as listeners
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import InstanceState, Session, scoped_session
from sqlalchemy.orm.attributes import instance_state

from outboxkit.capture import session_hooks
from outboxkit.capture.draft import Draft, Options, make_draft
from outboxkit.capture.keys import KeyValue
from outboxkit.capture.route import Outbox, route_of
from outboxkit.capture.session_hooks import Emission
from outboxkit.errors import CaptureError
from outboxkit.message import Kind, MessageLimits

__all__ = ["AnySession", "OutboxMixin", "emission_of", "publish", "send", "sync_session"]

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_PARKED: Final = "outboxkit_parked"


class OutboxMixin:
    """Gives a mapped class the verb `emit`. The class says where its events go by ``__outbox__``."""

    __outbox__: ClassVar[Outbox]

    def emit(
        self,
        event: object,
        *,
        topic: str = "",
        type: str = "",  # noqa: A002  the word on the wire
        key: KeyValue | EllipsisType | None = ...,
        headers: Mapping[str, KeyValue] | None = None,
        delay: timedelta | str | None = None,
        at: datetime | None = None,
        expires: timedelta | datetime | str | None = None,
        unique_key: KeyValue | None = None,
        source: str = "",
        limits: MessageLimits | None = None,
    ) -> str:
        """Says that something happened to this object; the message is stored with the object's own changes.

        Transaction: joins that of the object's session; a new object's events wait until it is added to one.
        Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

        Args:
            event: an event, or a function without arguments that makes it after the flush, when keys are known.
            topic: another destination than the model's.
            type: the type of an event that is a mapping; others carry theirs.
            key: another ordering key than the model's; None has no order.
            headers: added to the model's.
            delay: publish that long after the insert, by the database's clock: a timedelta, or text such as ``5m``.
            at: publish at this instant.
            expires: do not publish after this time from now, or this instant.
            unique_key: the same key gives the same message id, so that receivers drop a second one.
            source: another producer's name than the model's.
            limits: other bounds than the model's.

        Returns:
            The message's id.

        Raises:
            CaptureError: the object is detached, its transaction cannot take the message, or an argument cannot be
                used.
            ConfigurationError: a duration cannot be read.
            EncodeError: the event cannot be encoded or is too large; the path says where.
        """
        told = Options(type, key, headers, delay, at, expires, unique_key, source, limits)
        state: InstanceState[Any] = instance_state(self)
        message_id, emission = emission_of(state, event, told, topic=topic)
        _take(state, emission)
        return message_id


def publish(
    session: AnySession,
    event: object,
    *,
    topic: str = "",
    type: str = "",  # noqa: A002  the word on the wire
    key: KeyValue | None = None,
    headers: Mapping[str, KeyValue] | None = None,
    delay: timedelta | str | None = None,
    at: datetime | None = None,
    expires: timedelta | datetime | str | None = None,
    unique_key: KeyValue | None = None,
    source: str = "",
    limits: MessageLimits | None = None,
) -> str:
    """Publishes an event with the session's transaction: something happened, any number of receivers may care.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        event: an event, or a function without arguments that makes it after the flush.
        topic: the destination; the event's type when empty.
        type: the type of an event that is a mapping; others carry theirs.
        key: the ordering key: messages of one (topic, key) keep their order; None has no order.
        headers: added to the message.
        delay: publish that long after the insert, by the database's clock: a timedelta, or text such as ``5m``.
        at: publish at this instant.
        expires: do not publish after this time from now, or this instant.
        unique_key: the same key gives the same message id, so that receivers drop a second one.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        limits: other bounds than the defaults.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message, or an argument cannot be used.
        ConfigurationError: a duration cannot be read.
        EncodeError: the event cannot be encoded or is too large; the path says where.
    """
    told = Options(type, key, headers, delay, at, expires, unique_key, source, limits)
    return _add(session, make_draft(Kind.EVENT, topic, event, told))


def send(
    session: AnySession,
    command: object,
    *,
    to: str,
    type: str = "",  # noqa: A002  the word on the wire
    key: KeyValue | None = None,
    headers: Mapping[str, KeyValue] | None = None,
    delay: timedelta | str | None = None,
    at: datetime | None = None,
    expires: timedelta | datetime | str | None = None,
    unique_key: KeyValue | None = None,
    source: str = "",
    limits: MessageLimits | None = None,
) -> str:
    """Sends a command with the session's transaction: something is asked for, exactly one receiver does it.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is sent if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        command: a command (declared like an event), or a function without arguments that makes it after the flush.
        to: the receiver: a queue or topic.
        type: the type of a command that is a mapping; others carry theirs.
        key: the ordering key: commands of one (receiver, key) keep their order; None has no order.
        headers: added to the message.
        delay: send that long after the insert, by the database's clock: a timedelta, or text such as ``5m``.
        at: send at this instant.
        expires: do not send after this time from now, or this instant.
        unique_key: the same key gives the same message id, so that receivers drop a second one.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        limits: other bounds than the defaults.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message, or an argument cannot be used.
        ConfigurationError: a duration cannot be read.
        EncodeError: the command cannot be encoded or is too large; the path says where.
    """
    if not to:
        raise CaptureError("a command needs its receiver: send(session, command, to='payments')")
    told = Options(type, key, headers, delay, at, expires, unique_key, source, limits)
    return _add(session, make_draft(Kind.COMMAND, to, command, told))


def emission_of(state: InstanceState[Any], event: object, told: Options, *, topic: str = "") -> tuple[str, Emission]:
    """Makes an object's event an emission: what waits for a row. Returns the message's id, too.

    Raises:
        CaptureError: the class does not say where its events go, or an option cannot be used.
        EncodeError: the event cannot be encoded or is too large.
    """
    entity = state.obj()
    route = route_of(type(entity))
    draft = make_draft(Kind.EVENT, topic or route.topic, event, told, route=route, entity=entity)
    return draft.id, Emission(draft.make, entity, state.mapper, draft.due)


# --- to a session ------------------------------------------------------------------------------------------------


def _add(session: AnySession, draft: Draft) -> str:
    session_hooks.add(sync_session(session), Emission(draft.make, due=draft.due))
    return draft.id


def sync_session(session: AnySession) -> Session:
    """Finds the `Session` behind a session of any kind.

    Raises:
        CaptureError: it is no session.
    """
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        session = session.sync_session
    if not isinstance(session, Session):
        raise CaptureError(f"expected a Session or an AsyncSession, got {type(session).__qualname__}")
    return session


class _Parked(list[Emission]):
    """The emissions of a new object, until it joins a session."""

    def __del__(self) -> None:
        if self:
            warnings.warn(
                "events were emitted on a new object that never joined a session, so they are dropped; "
                "add the object (merge() would copy it without them)",
                ResourceWarning,
                stacklevel=2,
            )


def _take(state: InstanceState[Any], emission: Emission) -> None:
    session = state.session
    if session is not None:
        session_hooks.add(session, emission)
    elif state.transient:
        state.info.setdefault(_PARKED, _Parked()).append(emission)
    else:
        raise CaptureError(
            f"{state.class_.__qualname__} is detached: its session has ended, so no transaction can take the event; "
            "add or merge the object first and emit from what that returns"
        )


@listeners.listens_for(Session, "transient_to_pending")
def _unpark(session: Session, entity: object) -> None:
    if isinstance(entity, OutboxMixin):
        parked = instance_state(entity).info.pop(_PARKED, None)
        while parked:
            session_hooks.add(session, parked.pop(0))
