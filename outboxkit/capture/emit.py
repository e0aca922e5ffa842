"""Capture: what an application says happened becomes a message in the transaction in which it happened.

Three verbs. `OutboxMixin.emit` speaks for an object, `publish` for a session (an event, any number of receivers),
`send` asks one receiver for something (a command). None of them does I/O: they encode, check and remember. The rows are
written by the same transaction, with the session's next flush (see `outboxkit.capture.session_hooks`).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypedDict
from uuid import UUID, uuid5

from sqlalchemy import event as listeners
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import InstanceState, Session, scoped_session
from sqlalchemy.orm.attributes import instance_state
from typing_extensions import Unpack

from outboxkit import codecs, context
from outboxkit.capture import rollout, session_hooks
from outboxkit.capture.rollout import EncodedVersion
from outboxkit.capture.session_hooks import Emission
from outboxkit.errors import CaptureError
from outboxkit.events import EventType, event_type, is_event
from outboxkit.headers import check_limits
from outboxkit.message import Headers, Kind, Limits, Message

if sys.version_info >= (3, 14):
    from uuid import uuid7 as new_id
else:
    from uuid_utils import uuid7 as new_id  # its own class: making the standard library's would cost more than the id

__all__ = ["AnySession", "MessageOptions", "Outbox", "OutboxMixin", "emission_of", "publish", "route_of", "send"]

AnySession = Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]
Key = str | Sequence[str] | Callable[[Any], object] | None
Due = datetime | timedelta | None

CAPTURING: Final[set[str]] = (
    set()
)  #: topics with captured changes; while it is empty `outboxkit.capture.change_capture` looks at nothing

_LIMITS: Final = Limits()
_UNIQUE: Final = UUID("6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51")  # the namespace of ids that are made from a unique key
_PARKED: Final = "outboxkit_parked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbox:
    """Where the events of a model go: ``__outbox__ = Outbox(topic="orders", key="id")``.

    Attributes:
        topic: the destination; the event's type when empty.
        key: the ordering key: a column's name, several (joined by ``/``), or a function of the object, read after the
            flush. None keeps no order.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        headers: added to every message.
        limits: bounds that every message must keep.
        bulk: what happens to a bulk UPDATE, DELETE or INSERT of the ORM, which emits nothing:
            see `outboxkit.capture.bulk`.
        capture: the changes that are events without `emit` (see `outboxkit.capture.change_capture`).
        name: what their types begin with: ``order`` for ``order.created``; the class's name in lower case when empty.
        include: the columns that they tell of; all when None.
        exclude: columns that they never tell of.
        coalesce: one event per object and ``transaction`` (a savepoint's begin and end cut it), or per ``flush``.
    """

    topic: str = ""
    key: Key = None
    source: str = ""
    headers: Mapping[str, str | bytes] = field(default_factory=dict)
    limits: Limits = _LIMITS
    bulk: Literal["raise", "warn", "allow"] = "raise"
    capture: Collection[Literal["created", "updated", "deleted"]] = ()
    name: str = ""
    include: Collection[str] | None = None
    exclude: Collection[str] = ()
    coalesce: Literal["transaction", "flush"] = "transaction"

    def __post_init__(self) -> None:
        if self.capture:
            CAPTURING.add(self.topic)


_NO_ROUTE: Final = Outbox()


class MessageOptions(TypedDict, total=False):
    """What every verb may say about one message.

    Attributes:
        type: the type of an event that is a mapping; others carry theirs.
        key: the ordering key: messages of one (topic, key) keep their order; None has no order.
        headers: added to the message.
        delay: publish that long after the insert, by the database's clock.
        at: publish at this instant.
        expires: do not publish after this time from now, or this instant.
        unique_key: the same key gives the same message id, so that receivers drop a second one.
        source: the producer's name; what `outboxkit.context.source` says when empty.
        limits: other bounds than the defaults.
    """

    type: str
    key: str | bytes | None
    headers: Mapping[str, str | bytes]
    delay: timedelta
    at: datetime
    expires: timedelta | datetime
    unique_key: str
    source: str
    limits: Limits


class OutboxMixin:
    """Gives a mapped class the verb `emit`. The class says where its events go by ``__outbox__``."""

    __outbox__: ClassVar[Outbox]

    def emit(self, event: object, *, topic: str = "", **options: Unpack[MessageOptions]) -> str:
        """Says that something happened to this object; the message is stored with the object's own changes.

        Transaction: joins that of the object's session; a new object's events wait until it is added to one.
        Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

        Args:
            event: an event, or a function without arguments that makes it after the flush, when keys are known.
            topic: another destination than the model's.
            options: see `MessageOptions`.

        Returns:
            The message's id.

        Raises:
            CaptureError: the object is detached, or its transaction cannot take the message.
            EncodeError: the event cannot be encoded or is too large; the path says where.
        """
        state: InstanceState[Any] = instance_state(self)
        message_id, emission = emission_of(state, event, topic=topic, options=options)
        _take(state, emission)
        return message_id


def publish(session: AnySession, event: object, *, topic: str = "", **options: Unpack[MessageOptions]) -> str:
    """Publishes an event with the session's transaction: something happened, any number of receivers may care.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is published if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        event: an event, or a function without arguments that makes it after the flush.
        topic: the destination; the event's type when empty.
        options: see `MessageOptions`.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message.
        EncodeError: the event cannot be encoded or is too large; the path says where.
    """
    return _say(session, _draft(Kind.EVENT, topic, event, options), options)


def send(session: AnySession, command: object, *, to: str, **options: Unpack[MessageOptions]) -> str:
    """Sends a command with the session's transaction: something is asked for, exactly one receiver does it.

    Transaction: joins the session's; begins it if the session begins by itself.
    Guarantee: the message is sent if and only if the transaction, and the savepoint, commit.

    Args:
        session: a Session, AsyncSession, or a scoped one.
        command: a command (declared like an event), or a function without arguments that makes it after the flush.
        to: the receiver: a queue or topic.
        options: see `MessageOptions`.

    Returns:
        The message's id.

    Raises:
        CaptureError: the session's transaction cannot take the message.
        EncodeError: the command cannot be encoded or is too large; the path says where.
    """
    return _say(session, _draft(Kind.COMMAND, to, command, options), options)


def emission_of(
    state: InstanceState[Any], event: object, *, topic: str, options: MessageOptions
) -> tuple[str, Emission]:
    """An object's event on its way to a row, and the id of its message.

    Raises:
        CaptureError: the class does not say where its events go, or the options contradict each other.
        EncodeError: the event cannot be encoded or is too large.
    """
    entity = state.obj()
    route = route_of(type(entity))
    draft = _draft(Kind.EVENT, topic or route.topic, event, options, route=route, entity=entity)
    return draft.id, Emission(draft.make, entity, state.mapper, _due(options))


# --- from an event to a message ----------------------------------------------------------------------------------


class _Draft(NamedTuple):  # a tuple, because one is made for every event
    """What is known of a message when it is emitted."""

    id: str
    kind: Kind
    topic: str
    type: str
    source: str
    occurred_at: datetime
    expires_at: datetime | None
    correlation_id: str
    causation_id: str
    headers: Headers
    limits: Limits
    key: bytes | None
    entity: object  # has the key, None when that is known
    key_of: Key
    event: Callable[[], object] | tuple[EncodedVersion, ...]

    def make(self) -> Message:
        """The message, once the flush has given it its key."""
        written = self.event if isinstance(self.event, tuple) else _encode(self.event(), self.type)
        return self.message(written, self.key if self.entity is None else _key_of(self.entity, self.key_of))

    def message(self, written: tuple[EncodedVersion, ...], key: bytes | None) -> Message:
        chooses = self.id.encode() if key is None else key
        declared, encoded = written[0] if len(written) == 1 else rollout.version_for(chooses, written)
        message = Message(
            id=self.id,
            type=declared.name,
            topic=self.topic or declared.name,
            payload=encoded.payload,
            key=key,
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


def _draft(
    kind: Kind,
    topic: str,
    event: object,
    options: MessageOptions,
    *,
    route: Outbox = _NO_ROUTE,
    entity: object = None,
) -> _Draft:
    """Encodes the event now, so that it can no longer change; a function is called and encoded after the flush."""
    now, headers, type_name = datetime.now(UTC), context.trace_headers(), options.get("type", "")
    if route.headers or "headers" in options:
        headers = (*_headers(route.headers), *_headers(options.get("headers", {})), *headers)
    source = options.get("source") or route.source or context.source()
    unique, expires, key = options.get("unique_key"), options.get("expires"), options.get("key")
    later = callable(event) and not isinstance(event, type) and not is_event(event)
    draft = _Draft(
        str(uuid5(_UNIQUE, f"{source}\0{topic}\0{unique}") if unique else new_id()),
        kind,
        topic,
        type_name,
        source,
        now,
        now + expires if isinstance(expires, timedelta) else _instant("expires", expires),
        context.correlation_id(),
        context.causation_id(),
        headers,
        options.get("limits", route.limits),
        key.encode() if isinstance(key, str) else key,
        None if route.key is None or "key" in options else entity,
        route.key,
        event if later else _encode(event, type_name),  # type: ignore[arg-type] # a function, as `later` has found
    )
    if isinstance(draft.event, tuple):
        draft.message(draft.event, draft.key)  # what is too large is refused here
    return draft


def _encode(event: object, type_name: str) -> tuple[EncodedVersion, ...]:
    if not isinstance(event, Mapping):
        declared = event_type(event)
    elif type_name:
        declared = EventType(name=type_name)
    else:
        raise CaptureError("an event that is a mapping needs its type: publish(session, {...}, type='order.placed')")
    written = (declared, codecs.codec_named(declared.codec).encode(event, declared))
    return (written,) if declared.rollout is None else tuple(rollout.all_versions(written))


def _key_of(entity: object, key: Key) -> bytes | None:
    if key is None:
        return None
    if callable(key):
        found = key(entity)
        return found if isinstance(found, bytes) or found is None else str(found).encode()
    if isinstance(key, str) and (value := getattr(entity, key)) is not None:
        return str(value).encode()
    names = [key] if isinstance(key, str) else key
    values = [getattr(entity, name) for name in names]
    if None in values:
        name = f"{type(entity).__qualname__}.{names[values.index(None)]}"
        raise CaptureError(f"the ordering key {name} is None after the flush: set it, or emit with key=None")
    return "/".join(map(str, values)).encode()


def _headers(headers: Mapping[str, str | bytes]) -> Headers:
    return tuple((name, value.encode() if isinstance(value, str) else value) for name, value in headers.items())


def _due(options: MessageOptions) -> Due:
    delay, at = options.get("delay"), options.get("at")
    if delay is not None and at is not None:
        raise CaptureError("a message is due after a delay or at an instant; got both")
    return delay if delay is not None else _instant("at", at)


def _instant(name: str, instant: datetime | None) -> datetime | None:
    if instant is not None and instant.tzinfo is None:
        raise CaptureError(f"{name}={instant.isoformat()} is no instant, because it has no time zone: give it one")
    return instant


# --- to a session ------------------------------------------------------------------------------------------------


def _say(session: AnySession, draft: _Draft, options: MessageOptions) -> str:
    session_hooks.add(_sync(session), Emission(draft.make, due=_due(options)))
    return draft.id


def _sync(session: AnySession) -> Session:
    if isinstance(session, scoped_session | async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        session = session.sync_session
    if not isinstance(session, Session):
        raise CaptureError(f"expected a Session or an AsyncSession, got {type(session).__qualname__}")
    return session


def route_of(cls: type) -> Outbox:
    """Where the events of a model go.

    Raises:
        CaptureError: it does not say.
    """
    found = getattr(cls, "__outbox__", None)
    if not isinstance(found, Outbox):
        raise CaptureError(f"{cls.__qualname__} does not say where its events go: __outbox__ = Outbox(topic=…, key=…)")
    return found


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
