"""Handlers: the user's functions, which message goes to which, and what they are given.

What a handler wants is read from its annotations, once, at registration: the event, the session, the context.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args, get_origin

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit.avro.frames import frame_of, name_of
from outboxkit.codecs import codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import ConfigurationError, DecodeError
from outboxkit.events import EventType, Upcast, event_type
from outboxkit.policy import duration
from outboxkit.signals import DeadLetterRequested, RetryRequested

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from outboxkit.message import Headers, Message

__all__ = [
    "Handler",
    "Handlers",
    "MessageContext",
    "Want",
    "decode",
    "is_framed",
    "named_by_frame",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageContext:
    """Facts about the message that a handler may ask for, besides the event.

    Attributes:
        id: identity of the message; derive idempotency keys for other systems from it.
        type: name of the event.
        topic: where it came from.
        key: its ordering key.
        headers: those that are not ours, in order.
        attempt: which try this is, from 1.
        first_seen: when this consumer first tried it.
        deadline: when the handler's time is over: after the consumer's time-out, or when the message expires.
        correlation_id: names the whole conversation.
        partition: of the broker's log; None where there is none.
        offset: in that partition; None where there is none.
        timestamp: when the producer or the broker stamped it; None when nobody did.
        routing_key: the name under which it was routed (RabbitMQ); None elsewhere.
        reply_to: where an answer is expected; None when nowhere.
        content_encoding: how the payload came; what a handler gets is unpacked.
        redelivered: the broker knows that it was handed out before.
        is_tombstone: it came without a payload, which is not an empty one.
    """

    id: str
    type: str
    topic: str
    key: bytes | None
    headers: Headers
    attempt: int
    first_seen: datetime
    deadline: datetime
    correlation_id: str
    partition: int | None = None
    offset: int | None = None
    timestamp: datetime | None = None
    routing_key: str | None = None
    reply_to: str | None = None
    content_encoding: str | None = None
    redelivered: bool = False
    is_tombstone: bool = False

    def remaining(self) -> timedelta:
        """Returns how much of the handler's time is left, for time-outs of calls to others; never below zero."""
        return max(self.deadline - datetime.now(UTC), timedelta(0))

    def dead_letter(self, why: str) -> NoReturn:
        """Gives the message up: its transaction is rolled back and it becomes a dead letter with this reason."""
        raise DeadLetterRequested(why)

    def retry_after(self, delay: timedelta | str) -> NoReturn:
        """Rolls back and tries again after the delay, as often as the consumer's policy allows."""
        raise RetryRequested(duration(delay))

    def later(self, after: timedelta | str) -> NoReturn:
        """Rolls back and tries again after the delay without spending a try, for example when a service says 429.

        The message becomes a failed one when it is older than the consumer's ``patience``.
        """
        raise RetryRequested(duration(after), is_free=True)


class Want(StrEnum):
    """Kinds of values that a handler's parameter may be given."""

    MESSAGE = "message"  #: the event; a raw handler gets the `Message`
    MESSAGES = "messages"  #: a list of them: up to `Consumer(batch=…)` first deliveries, in order
    SESSION = "session"
    ASYNC_SESSION = "async session"
    CONTEXT = "context"


_ANY: Final = "*"
_DIGITS: Final = 10
_LISTS: Final = ("list", "Sequence")
_INJECTED: Final = {Want.ASYNC_SESSION: AsyncSession, Want.SESSION: Session, Want.CONTEXT: MessageContext}


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """One registered function.

    Attributes:
        function: the user's.
        topic: topic or queue it listens to.
        pattern: type name, or a pattern of them for raw handlers.
        event_type: the contract; None for raw handlers.
        wants: what each parameter is given, in order.
    """

    function: Callable[..., Any]
    topic: str
    pattern: str
    event_type: EventType | None
    wants: tuple[tuple[str, Want], ...]

    @property
    def takes_list(self) -> bool:
        """Whether it handles several messages by one call."""
        return any(want is Want.MESSAGES for _, want in self.wants)

    def call(self, given: dict[Want, object]) -> Any:
        """Calls the function; the result of a coroutine function is its coroutine."""
        return self.function(**{name: given[want] for name, want in self.wants})


class Handlers:
    """The handlers of one consumer, by topic and type."""

    def __init__(self) -> None:
        self._exact: dict[tuple[str, str], dict[int, Handler]] = {}  # by the version of the contract
        self._patterns: list[Handler] = []

    def __iter__(self) -> Iterator[Handler]:
        return iter([*(handler for versions in self._exact.values() for handler in versions.values()), *self._patterns])

    @property
    def contracts(self) -> list[EventType]:
        """Of the handlers of event classes, with the earlier versions that they can take."""
        return [one for handler in self if handler.event_type is not None for one in handler.event_type.readable]

    def add(self, function: Callable[..., Any], topic: str, what: EventType | str) -> Handler:
        """Registers a function.

        Raises:
            ConfigurationError: the type has a handler already, or a parameter cannot be given anything.
        """
        contract = what if isinstance(what, EventType) else None
        pattern = contract.name if contract else str(what)
        handler = Handler(
            function=function,
            topic=topic,
            pattern=pattern,
            event_type=contract,
            wants=_wants(function, contract),
        )
        for other in self:
            if other.topic == topic and _overlap(handler, other):
                raise ConfigurationError(
                    f"{topic}: {pattern} has a handler already, {other.function.__qualname__} for {other.pattern}; "
                    "one type has one handler, another reaction is another consumer",
                )
        if contract:
            self._exact.setdefault((topic, pattern), {})[contract.version] = handler
        else:
            self._patterns.append(handler)
        return handler

    def find(self, topic: str, type_name: str, dataschema: str = "") -> Handler | None:
        """Returns the handler of a type, or None: that of the message's version, or of the latest one known here.

        A pattern comes after a contract, and ``*``, which takes what nobody else does, last.
        """
        if versions := self._exact.get((topic, type_name)):
            return versions.get(_version_of(dataschema)) or versions[max(versions)]
        raw = [one for one in self._patterns if one.topic == topic and fnmatchcase(type_name, one.pattern)]
        return min(raw, key=lambda handler: handler.pattern == _ANY, default=None)


def _overlap(one: Handler, other: Handler) -> bool:
    """True if a message could go to either. Versions of one contract are told apart, and ``*`` takes what is left."""
    if one.event_type is not None and other.event_type is not None and one.pattern == other.pattern:
        return one.event_type.version == other.event_type.version
    if (one.pattern == _ANY) != (other.pattern == _ANY):
        return False
    return fnmatchcase(one.pattern, other.pattern) or fnmatchcase(other.pattern, one.pattern)


def _version_of(dataschema: str) -> int:
    """The version in our own ``ce_dataschema``; 0 for that of others."""
    number = dataschema.rpartition(":")[2] if dataschema.startswith("urn:outboxkit:") else ""
    return int(number) if number.isascii() and number.isdigit() and len(number) < _DIGITS else 0


def named_by_frame(message: Message, handlers: Sequence[Handler], resolve: Callable[[str], str]) -> Handler | None:
    """Returns the handler whose contract has the record that the payload's frame names; None when none has it.

    Raises:
        DecodeError: the payload has no frame, or its schema is no record.
        SchemaNotFound: nobody knows the schema.
        RegistryUnavailable: the registry is away.
    """
    names = _record_names(resolve(name_of(frame_of(message))))
    if not names:
        raise DecodeError("the frame of the payload names a schema that is not a record")
    for handler in handlers:
        contract = handler.event_type
        own = None if contract is None else codec_named(contract.codec).schema_text(contract)
        if own is not None and names & _record_names(own):
            return handler
    return None


def is_framed(message: Message) -> bool:
    """True if the payload says which schema wrote it."""
    try:
        frame_of(message)
    except DecodeError:
        return False
    return True


def _record_names(schema: str) -> set[str]:
    """The full name of a record, and its aliases."""
    try:
        found = json.loads(schema)
    except ValueError:
        return set()
    if not isinstance(found, dict) or found.get("type") != "record":
        return set()
    space, names = found.get("namespace") or "", [found.get("name", ""), *found.get("aliases", ())]
    return {name if "." in name or not space else f"{space}.{name}" for name in names}


def decode(message: Message, contract: EventType, resolve: Callable[[str], str]) -> object:
    """The event of a message, as its handler's contract sees it; an earlier version becomes this one by its upcast.

    Raises:
        DecodeError: the bytes or the fields are not what they should be, or an upcast cannot take them.
        SchemaError: the reader cannot read this writer's schema, or the schema is unknown.
    """
    if contract.upcast is not None and 0 < _version_of(message.dataschema) < contract.version:
        return _upcast(decode(message, event_type(contract.upcast.previous), resolve), contract, contract.upcast)
    told = next((name for name in ("json", "avro") if name in message.content_type), "")
    own = contract.codec if not told or (told == "avro" and not isinstance(contract.codec, str)) else told
    codec = codec_named(own)
    return from_plain(contract.cls, codec.decode(message, contract, resolve))


def _upcast(earlier: object, contract: EventType, upcast: Upcast) -> object:
    name = upcast.function.__qualname__
    try:
        found = upcast.function(earlier)
    except Exception as error:
        raise DecodeError(f"the upcast {name} raised {type(error).__qualname__}") from error
    if not isinstance(found, contract.cls):
        raise DecodeError(
            f"the upcast {name} returned {type(found).__qualname__}, expected {contract.cls.__qualname__}"
        )
    return found


def _wants(function: Callable[..., Any], contract: EventType | None) -> tuple[tuple[str, Want], ...]:
    parameters = inspect.signature(function).parameters.values()
    event = contract.cls.__name__ if contract else "Message"
    wants = tuple((parameter.name, _want(function, parameter, event)) for parameter in parameters)
    kinds = [want for _, want in wants]
    if Want.MESSAGES in kinds and Want.CONTEXT in kinds:
        raise ConfigurationError(f"{function.__qualname__} takes a list of messages, and a MessageContext is of one")
    if kinds.count(Want.MESSAGE) + kinds.count(Want.MESSAGES) != 1:
        raise ConfigurationError(
            f"{function.__qualname__} needs one parameter for the {event}; it has {len(wants)} in all"
        )
    return wants


def _want(function: Callable[..., Any], parameter: inspect.Parameter, event: str) -> Want:
    annotation = _evaluated(function, parameter.annotation)
    for want, cls in _INJECTED.items():
        if annotation == cls.__name__ or (isinstance(annotation, type) and issubclass(annotation, cls)):
            return want
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if parameter.annotation is parameter.empty or name.partition("[")[0] in (event, "dict", "Mapping"):
        return Want.MESSAGE
    if _is_list_of(annotation, event):
        return Want.MESSAGES
    raise ConfigurationError(
        f"{function.__qualname__}: nothing to give for {parameter.name}: {name}; expected {event}, list[{event}], "
        "AsyncSession, Session or MessageContext",
    )


def _is_list_of(annotation: object, event: str) -> bool:
    if isinstance(annotation, str):
        kind, _, inner = annotation.removesuffix("]").partition("[")
        return kind.rpartition(".")[2] in _LISTS and inner.rpartition(".")[2] == event
    (inner_type, *_), kind_type = (*get_args(annotation), None), get_origin(annotation)
    name = inner_type if isinstance(inner_type, str) else getattr(inner_type, "__name__", "")
    return getattr(kind_type, "__name__", "") in _LISTS and name == event


def _evaluated(function: Callable[..., Any], annotation: object) -> object:
    # Under `from __future__ import annotations` a name may live in a function or under TYPE_CHECKING only: then its
    # text must do, and the last part of a dotted name says enough.
    if not isinstance(annotation, str):
        return annotation
    names = vars(sys.modules.get(function.__module__, inspect))
    value: object = names
    for part in annotation.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    return annotation.rpartition(".")[2] if value is None else value
