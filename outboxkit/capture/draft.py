"""Drafts: what is known of a message when it is emitted, and the message once the flush has told the rest."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import EllipsisType
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid5

from outboxkit import context
from outboxkit.capture import keys, rollout
from outboxkit.capture.keys import KeyValue
from outboxkit.capture.rollout import Versions
from outboxkit.capture.route import KeyOf, Outbox
from outboxkit.context import tracing
from outboxkit.errors import CaptureError
from outboxkit.events import EventType, event_type, is_event
from outboxkit.headers import check_limits
from outboxkit.message import Headers, Kind, Message, MessageLimits
from outboxkit.policy import duration

if sys.version_info >= (3, 14):
    from uuid import uuid7 as new_id
else:
    from uuid_utils import uuid7 as new_id  # its own class: making the standard library's would cost more than the id

__all__ = ["Draft", "Options", "make_draft"]

_UNIQUE: Final = UUID("6f7d4c1e-9d0b-5d3a-8f57-1c0e0b5c3a51")  # the namespace of ids that are made from a unique key
_MAX_SOURCE: Final = 1024  # bytes: inboxes keep it in an index


class Options(NamedTuple):
    """Options of one message, as they were given to a verb: see `outboxkit.capture.publish`."""

    type: str = ""
    key: KeyValue | EllipsisType | None = ...  # ...: not given, so that the model's is taken
    headers: Mapping[str, KeyValue] | None = None
    delay: timedelta | str | None = None
    at: datetime | None = None
    expires: timedelta | datetime | str | None = None
    unique_key: KeyValue | None = None
    source: str = ""
    limits: MessageLimits | None = None


_NOTHING: Final = Options()
_NO_ROUTE: Final = Outbox()  # of what a session says for itself


@dataclass(slots=True, kw_only=True)
class Draft:
    """Everything that is known of a message when it is emitted.

    Attributes:
        due: publish later: at an instant, or a time after the insert by the database's clock.
        entity: has the key; None when that is known.
        written: the encoded event; None when `make_event` makes it after the flush.
    """

    id: str
    kind: Kind
    topic: str
    type: str
    source: str
    occurred_at: datetime
    expires_at: datetime | None
    due: datetime | timedelta | None
    correlation_id: str
    causation_id: str
    headers: Headers
    limits: MessageLimits
    key: bytes | None
    entity: object
    key_of: KeyOf
    written: Versions | None
    make_event: Callable[[], object]

    def make(self) -> Message:
        """Makes the message, once the flush has given it its key."""
        written = self.written or _encode(self.make_event(), self.type)
        return self.message(written, self.key if self.entity is None else _key_of(self.entity, self.key_of))

    def message(self, written: Versions, key: bytes | None) -> Message:
        """Makes the message of a key.

        Raises:
            EncodeError: it is larger than its limits.
        """
        declared, encoded = written.version_for(self.id.encode() if key is None else key)
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


def make_draft(
    kind: Kind, topic: str, event: Any, told: Options = _NOTHING, *, route: Outbox = _NO_ROUTE, entity: object = None
) -> Draft:
    """Encodes an event now, so that it can no longer change; a function is called and encoded after the flush.

    Raises:
        CaptureError: an option is of another kind than it should be, or two contradict each other.
        ConfigurationError: a duration cannot be read.
        EncodeError: the event cannot be encoded or is too large.
    """
    now = datetime.now(UTC)
    later = callable(event) and not isinstance(event, type) and not is_event(event)
    if later and inspect.iscoroutinefunction(event):
        raise CaptureError("an event is made by a plain function, inside the flush; await what it needs before")
    of_model = isinstance(told.key, EllipsisType)
    source = _source(told.source) or route.source or context.source()
    draft = Draft(
        id=_id(told.unique_key, f"{source}\0{topic}"),
        kind=kind,
        topic=keys.name_of(topic, "the destination"),
        type=keys.name_of(told.type, "type") if told.type else "",
        source=source,
        occurred_at=now,
        expires_at=None if told.expires is None else _expiry(told.expires, now),
        due=None if told.delay is None and told.at is None else _due(told.delay, told.at),
        correlation_id=context.correlation_id(),
        causation_id=context.causation_id(),
        headers=(),
        limits=told.limits or route.limits,
        key=None if isinstance(told.key, EllipsisType) or told.key is None else keys.key_bytes(told.key),
        entity=entity if of_model and route.key is not None else None,
        key_of=route.key,
        written=None if later else _encode(event, told.type),
        make_event=event,
    )
    name = draft.type if draft.written is None else draft.written[0][0].name
    traced = tracing.created(destination=topic or name, type_name=name, message_id=draft.id)
    draft.headers = _headers(route, told, traced)
    if draft.written is not None:
        draft.message(draft.written, draft.key)  # what is too large is refused here
    return draft


def _encode(event: object, type_name: str) -> Versions:
    if not isinstance(event, Mapping):
        declared = event_type(event)
        if type_name and type_name != declared.name:
            raise CaptureError(f"type={type_name!r} was given for a {declared.name}; only a mapping takes a type")
    elif type_name:
        declared = EventType(name=type_name)
    else:
        raise CaptureError("an event that is a mapping needs its type: publish(session, {...}, type='order.placed')")
    return rollout.encode(event, declared)


def _headers(route: Outbox, told: Options, traced: Headers) -> Headers:
    if not told.headers:
        return (*route.pairs, *traced) if route.pairs else traced
    own = keys.header_pairs(told.headers)
    names = {name for name, _ in own}
    return (*route.pairs, *own, *[pair for pair in traced if pair[0] not in names])


def _key_of(entity: object, key: KeyOf) -> bytes | None:
    owner = type(entity).__qualname__
    if callable(key):
        found = key(entity)
        return None if found is None else keys.key_bytes(found, f"what the key function of {owner} returned")
    names = [key] if isinstance(key, str) else key or ()
    values = [getattr(entity, name) for name in names]
    if None in values:
        name = f"{owner}.{names[values.index(None)]}"
        raise CaptureError(f"the ordering key {name} is None after the flush: set it, or emit with key=None")
    if len(values) == 1:
        return keys.key_bytes(values[0], f"the ordering key {owner}.{names[0]}")
    return keys.joined(values, f"a part of the ordering key of {owner}")


def _id(unique_key: object, within: str) -> str:
    if unique_key is None:
        return str(new_id())
    unique = keys.key_bytes(unique_key, "unique_key").decode("utf-8", "surrogateescape")
    if not unique:
        raise CaptureError("unique_key is empty, so every message would have the same id: leave it out, or give one")
    return str(uuid5(_UNIQUE, f"{within}\0{unique}"))


def _source(source: str) -> str:
    given: object = source
    if not isinstance(given, str) or not given.isprintable() or len(given.encode()) > _MAX_SOURCE:
        raise CaptureError(f"source is printable text of at most {_MAX_SOURCE} bytes, not {given!r:.80}")
    return given


# --- when --------------------------------------------------------------------------------------------------------


def _due(delay: timedelta | str | None, at: datetime | None) -> datetime | timedelta | None:
    if at is not None:
        if delay is not None:
            raise CaptureError("a message is due after a delay or at an instant; got both")
        return _instant("at", at)
    if delay == timedelta(0):
        return None
    return duration(delay, name="delay")  # type: ignore[arg-type] # one of the two was given


def _expiry(expires: timedelta | datetime | str, now: datetime) -> datetime:
    return _instant("expires", expires) if isinstance(expires, datetime) else now + duration(expires, name="expires")


def _instant(name: str, instant: Any) -> datetime:
    if not isinstance(instant, datetime):
        raise CaptureError(f"{name} is a {type(instant).__qualname__}; expected a datetime with a time zone")
    if instant.tzinfo is None:
        raise CaptureError(f"{name}={instant.isoformat()} has no time zone, so it names no instant: give it one")
    try:
        return instant.astimezone(UTC)
    except OverflowError as error:
        raise CaptureError(f"{name}={instant.isoformat()} lies outside the years 1 to 9999 in UTC") from error
