"""Capture: what an application says happened becomes a message in the transaction in which it happened.

Three verbs. `OutboxMixin.emit` speaks for an object, `publish` for a session (an event, any number of receivers), `send`
asks one receiver for something (a command). None of them does I/O: they encode, check and remember; the rows are written
with the session's next flush (see `outboxkit.unit_of_work`), by the same transaction.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final
from uuid import UUID, uuid5

from sqlalchemy import inspect
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, object_session, scoped_session

from outboxkit import codecs, context, unit_of_work
from outboxkit.errors import CaptureError
from outboxkit.events import EventType, event_type
from outboxkit.message import Headers, Kind, Limits, Message, check_limits
from outboxkit.unit_of_work import Emission

if sys.version_info >= (3, 14):
    from uuid import uuid7
else:
    from uuid_utils.compat import uuid7

if TYPE_CHECKING:
    from sqlalchemy.orm import InstanceState

__all__ = ["AnySession", "Outbox", "OutboxMixin", "publish", "send"]

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]

_UNIQUE: Final = UUID("6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51")  # the namespace of ids that are made from a unique key
_PARKED: Final = "outboxkit_parked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """Where the events of a model go: ``__outbox__ = Outbox(topic="orders", key="id")``.

    Attributes:
        topic: the destination.
        key: the ordering key: a column's name, several (joined by ``/``), or a function of the object; None has no order.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        headers: added to every message.
        limits: bounds that a message must keep.
    """

    topic: str
    key: str | Sequence[str] | Callable[[Any], object] | None = None
    source: str = ""
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    limits: Limits = Limits()


class OutboxMixin:
    """Gives a mapped class the verb `emit`. The class says where its events go by ``__outbox__``."""

    __outbox__: ClassVar[Outbox]

    def emit(
        self,
        event: object,
        *,
        type: str = "",
        topic: str = "",
        key: str | bytes | None = None,
        headers: Mapping[str, str | bytes] | None = None,
        delay: timedelta | None = None,
        at: datetime | None = None,
        expires: timedelta | datetime | None = None,
        unique_key: str = "",
    ) -> str:
        """Says that something happened to this object; the message is stored with the object's own changes.

        Transaction: joins that of the object's session; a new object's events wait until it is added to one.
        Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

        Args:
            event: an event, or a function without arguments that makes it after the flush, when keys are known.
            type: of an event that is a mapping.
            topic: another destination than the model's.
            key: another ordering key than the model's.
            headers: added to the message.
            delay: publish that long after the commit, by the database's clock.
            at: publish at this instant.
            expires: do not publish after this time or instant.
            unique_key: the same key gives the same message id, so that receivers drop a second one.

        Returns:
            The message's id.

        Raises:
            CaptureError: the object is detached, or its transaction cannot take the message.
            EncodeError: the event cannot be encoded or is too large; the path says where.
        """
        outbox = _outbox_of(self)
        envelope = _Envelope.at_emit(
            kind=Kind.EVENT,
            topic=topic or outbox.topic,
            key=key,
            source=outbox.source,
            headers={**outbox.headers, **(headers or {})},
            expires=expires,
            unique_key=unique_key,
            limits=outbox.limits,
            type=type,
            key_of=None if key is not None or outbox.key is None else partial(_key_of, self, outbox.key),
        )
        state: InstanceState[Any] = inspect(self)
        emission = Emission(
            complete=envelope.freeze(event),
            entity=self,
            mapper=state.mapper,
            due=_due(delay, at),
        )
        _take(state, emission)
        return envelope.id


def publish(
    session: AnySession,
    event: object,
    *,
    topic: str = "",
    type: str = "",
    key: str | bytes | None = None,
    headers: Mapping[str, str | bytes] | None = None,
    delay: timedelta | None = None,
    at: datetime | None = None,
    expires: timedelta | datetime | None = None,
    unique_key: str = "",
    source: str = "",
    limits: Limits = Limits(),
) -> str:
    """Publishes an event with the session's transaction: something happened, any number of receivers may care.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        event: an event, or a function without arguments that makes it after the flush.
        topic: the destination; the event's type when empty.
        type: of an event that is a mapping.
        key: messages of one (topic, key) keep their order; None has no order.
        headers: added to the message.
        delay: publish that long after the commit, by the database's clock.
        at: publish at this instant.
        expires: do not publish after this time or instant.
        unique_key: the same key gives the same message id, so that receivers drop a second one.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        limits: bounds that the message must keep.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message.
        EncodeError: the event cannot be encoded or is too large; the path says where.
    """
    return _say(
        session,
        event,
        _due(delay, at),
        kind=Kind.EVENT,
        topic=topic,
        type=type,
        key=key,
        headers=headers or {},
        expires=expires,
        unique_key=unique_key,
        source=source,
        limits=limits,
    )


def send(
    session: AnySession,
    command: object,
    *,
    to: str,
    type: str = "",
    key: str | bytes | None = None,
    headers: Mapping[str, str | bytes] | None = None,
    delay: timedelta | None = None,
    at: datetime | None = None,
    expires: timedelta | datetime | None = None,
    unique_key: str = "",
    source: str = "",
    limits: Limits = Limits(),
) -> str:
    """Sends a command with the session's transaction: something is asked for, exactly one receiver does it.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is sent if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        command: a command (declared like an event), or a function without arguments that makes it after the flush.
        to: the receiver: a queue or topic.
        type: of a command that is a mapping.
        key: messages of one (topic, key) keep their order; None has no order.
        headers: added to the message.
        delay: send that long after the commit, by the database's clock.
        at: send at this instant.
        expires: do not send after this time or instant.
        unique_key: the same key gives the same message id, so that the receiver drops a second one.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        limits: bounds that the message must keep.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message.
        EncodeError: the command cannot be encoded or is too large; the path says where.
    """
    return _say(
        session,
        command,
        _due(delay, at),
        kind=Kind.COMMAND,
        topic=to,
        type=type,
        key=key,
        headers=headers or {},
        expires=expires,
        unique_key=unique_key,
        source=source,
        limits=limits,
    )


# --- from an event to a message ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Envelope:
    """Everything about a message but its payload and the key that only the flush may know."""

    id: str
    kind: Kind
    topic: str
    type: str
    key: bytes | None
    key_of: Callable[[], bytes | None] | None
    source: str
    headers: Headers
    occurred_at: datetime
    expires_at: datetime | None
    correlation_id: str
    causation_id: str
    limits: Limits

    @classmethod
    def at_emit(
        cls,
        *,
        kind: Kind,
        topic: str,
        type: str,
        key: str | bytes | None,
        headers: Mapping[str, str | bytes],
        expires: timedelta | datetime | None,
        unique_key: str,
        source: str,
        limits: Limits,
        key_of: Callable[[], bytes | None] | None = None,
    ) -> _Envelope:
        now = datetime.now(UTC)
        source = source or context.source()
        return cls(
            id=str(uuid5(_UNIQUE, f"{source}\0{topic}\0{unique_key}") if unique_key else uuid7()),
            kind=kind,
            topic=topic,
            type=type,
            key=key.encode() if isinstance(key, str) else key,
            key_of=key_of,
            source=source,
            headers=(*_header_bytes(headers), *context.trace_headers()),
            occurred_at=now,
            expires_at=now + expires if isinstance(expires, timedelta) else expires,
            correlation_id=context.correlation_id(),
            causation_id=context.causation_id(),
            limits=limits,
        )

    def freeze(self, event: object) -> Callable[[], Message]:
        """Encodes the event now; a function is called and encoded when the message is completed."""
        if _is_deferred(event):
            return lambda: self._keyed(self._message(event()))  # type: ignore[operator]
        message = self._message(event)
        return (lambda: message) if self.key_of is None else partial(self._keyed, message)

    def _message(self, event: object) -> Message:
        declared = _declared(event, self.type)
        encoded = codecs.codec_named(declared.codec).encode(event, declared)
        message = Message(
            id=self.id,
            type=declared.name,
            topic=self.topic or declared.name,
            payload=encoded.payload,
            key=self.key,
            kind=self.kind,
            source=self.source,
            content_type=encoded.content_type,
            schema=encoded.schema,
            dataschema=declared.dataschema,
            occurred_at=self.occurred_at,
            expires_at=self.expires_at,
            correlation_id=self.correlation_id,
            causation_id=self.causation_id,
            headers=self.headers,
        )
        check_limits(message, self.limits)
        return message

    def _keyed(self, message: Message) -> Message:
        if self.key_of is None:
            return message
        message = replace(message, key=self.key_of())
        check_limits(message, self.limits)
        return message


def _is_deferred(event: object) -> bool:
    return (
        callable(event)
        and not isinstance(event, type)
        and not isinstance(
            type(event).__dict__.get("__outboxkit_event__"),
            EventType,
        )
    )


def _declared(event: object, name: str) -> EventType:
    if not isinstance(event, Mapping):
        return event_type(event)
    if not name:
        raise CaptureError("an event that is a mapping needs its type: publish(session, {...}, type='order.placed')")
    return EventType(name=name)


def _key_of(entity: object, key: str | Sequence[str] | Callable[[Any], object]) -> bytes | None:
    if callable(key):
        found = key(entity)
        return found if isinstance(found, bytes) or found is None else str(found).encode()
    names = [key] if isinstance(key, str) else key
    values = [getattr(entity, name) for name in names]
    if None in values:
        raise CaptureError(
            f"{type(entity).__qualname__}.{names[values.index(None)]} is None and cannot be an ordering key"
        )
    return "/".join(map(str, values)).encode()


def _header_bytes(headers: Mapping[str, str | bytes]) -> Headers:
    return tuple((name, value.encode() if isinstance(value, str) else value) for name, value in headers.items())


def _due(delay: timedelta | None, at: datetime | None) -> timedelta | datetime | None:
    if delay is not None and at is not None:
        raise CaptureError("give a delay or an instant (at), not both")
    if at is not None and at.tzinfo is None:
        raise CaptureError(f"at={at.isoformat()} has no time zone, so it is not an instant: give it one")
    return at if delay is None else delay


# --- to a session ------------------------------------------------------------------------------------------------


def _say(session: AnySession, event: object, due: timedelta | datetime | None, **options: Any) -> str:
    envelope = _Envelope.at_emit(**options)
    unit_of_work.add(_sync(session), Emission(complete=envelope.freeze(event), due=due))
    return envelope.id


def _sync(session: AnySession) -> Session:
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        session = session.sync_session
    if not isinstance(session, Session):
        raise CaptureError(f"expected a Session or an AsyncSession, got {type(session).__qualname__}")
    return session


def _outbox_of(entity: OutboxMixin) -> Outbox:
    found = getattr(type(entity), "__outbox__", None)
    if not isinstance(found, Outbox):
        raise CaptureError(f"{type(entity).__qualname__} needs __outbox__ = Outbox(topic=…, key=…)")
    return found


def _take(state: InstanceState[Any], emission: Emission) -> None:
    session = object_session(state.obj())
    if session is not None:
        unit_of_work.add(session, emission)
    elif state.transient:
        state.info.setdefault(_PARKED, []).append(emission)  # until the object joins a session
    else:
        raise CaptureError(
            f"{state.class_.__qualname__} is detached: its session has ended, so no transaction can take the event; "
            "add or merge the object first and emit from what that returns",
        )


@sqlalchemy_event.listens_for(Session, "transient_to_pending")
def _unpark(session: Session, instance: object) -> None:
    for emission in inspect(instance).info.pop(_PARKED, ()):
        unit_of_work.add(session, emission)
