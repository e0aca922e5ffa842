"""Event types: the name, version and schema that a class of the application has on the wire. Pure.

*Event* is only the user's object; once written it is a message.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final, TypeVar

from outboxkit.errors import CaptureError, ConfigurationError

__all__ = [
    "EventType",
    "Rollout",
    "Upcast",
    "check_share",
    "event",
    "event_type",
    "is_event",
    "versions_of",
]

T = TypeVar("T", bound=type)

_ATTRIBUTE: Final = "__outboxkit_event__"


@dataclass(frozen=True, slots=True)
class Rollout:
    """A new version that only a share of the keys gets, so that a mistake meets few consumers first.

    Attributes:
        previous: the event class of the version that all other keys get.
        share: of the keys, 0.0 to 1.0; or a function that says it, so that it grows without a deploy.

    Raises:
        ConfigurationError: the share is not between 0 and 1.
    """

    previous: type
    share: float | Callable[[], float]

    def __post_init__(self) -> None:
        if not isinstance(self.previous, type):
            raise ConfigurationError(f"Rollout(previous=…) takes an event class, got {self.previous!r}")
        if not callable(self.share):
            check_share(self.share)


def check_share(share: object) -> None:
    """Refuses a share that is not a number between 0 and 1.

    Raises:
        ConfigurationError: it is not.
    """
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 <= share <= 1.0:
        raise ConfigurationError(f"a share is a number between 0 and 1, not {share!r}")


@dataclass(frozen=True, slots=True)
class Upcast:
    """A pure function that makes an event of the version before into one of this version.

    Attributes:
        previous: the event class of the version before, which may have an upcast of its own.
        function: of one such event; without I/O, clock or chance.
    """

    previous: type
    function: Callable[[Any], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """Facts about an event class that the wire needs.

    Attributes:
        name: the type on the wire, for people and routing: ``order.placed``.
        version: of its contract, from 1.
        cls: the class; ``dict`` for events without one.
        schema: an ``.avsc`` file (path), or the schema itself as parsed JSON; None for codecs without schemas, and for
            Avro when the class is the contract.
        codec: name of the codec, ``json`` or ``avro``; or a codec, as in ``AvroCodec(frame=…)``.
        rollout: who gets this version, while not all do.
        upcast: how messages of the version before become this one, for handlers.
    """

    name: str
    version: int = 1
    cls: type = dict
    schema: str | Path | Mapping[str, Any] | None = None
    codec: object = "json"
    rollout: Rollout | None = None
    upcast: Upcast | None = None

    @property
    def readable(self) -> tuple[EventType, ...]:
        """This version and those that can become it, the newest first."""
        return (self, *(event_type(self.upcast.previous).readable if self.upcast else ()))

    @property
    def dataschema(self) -> str:
        """The CloudEvents ``dataschema`` URI of this version."""
        return f"urn:outboxkit:{self.name}:{self.version}"


def event(
    name: str,
    *,
    version: int = 1,
    schema: str | Path | Mapping[str, Any] | None = None,
    codec: object = None,
    rollout: Rollout | None = None,
    upcast: Callable[[Any], object] | None = None,
) -> Callable[[T], T]:
    """Gives any class a name and version on the wire: a dataclass, a msgspec Struct, a pydantic model.

    Args:
        name: stable name, ``order.placed``.
        version: of the contract, from 1.
        schema: Avro schema: a path to an ``.avsc`` file or the parsed schema.
        codec: a codec's name, or a codec made for this event; ``avro`` when there is a schema, else ``json``.
        rollout: ``Rollout(OrderPlacedV1, share=0.05)``: 5 % of the keys get this version, the rest the previous one.
        upcast: makes an event of an earlier version into one of this: ``def from_v1(old: OrderPlacedV1) -> …``. A
            handler of this version then gets earlier messages, too, unless they have a handler of their own. The
            annotation says which version it takes; it is a pure function.

    Raises:
        ConfigurationError: the name is empty, too long or cannot be printed; the version is not a whole number from 1;
            there is no such codec; the previous version of a rollout or an upcast is not an earlier one; an upcast is
            not a function of one event; or the class cannot be an event, because no handler could read it back.
        CaptureError: the previous version of a rollout or an upcast is not an event.
    """
    _check_name(name, version)
    _check_contract(schema, codec)
    older = None if upcast is None else _upcast(upcast)
    for earlier in (*([_previous(rollout)] if rollout else ()), *([event_type(older.previous)] if older else ())):
        if earlier.name != name or earlier.version >= version:
            what = f"{earlier.name} {earlier.version}"
            raise ConfigurationError(f"the previous version of {name} {version} cannot be {what}")

    def declare(cls: T) -> T:
        _check_class(cls)
        found = EventType(
            name=name,
            version=version,
            cls=cls,
            schema=schema,
            codec=codec or ("avro" if schema is not None else "json"),
            rollout=rollout,
            upcast=older,
        )
        setattr(cls, _ATTRIBUTE, found)
        return cls

    return declare


def event_type(value: object) -> EventType:
    """Finds the event type of an event or of its class.

    Raises:
        CaptureError: the class was not declared by `event`.
    """
    cls = value if isinstance(value, type) else type(value)
    found = cls.__dict__.get(_ATTRIBUTE)
    if not isinstance(found, EventType):
        raise CaptureError(
            f"{cls.__qualname__} is not an event: decorate the class with @event('some.name', version=1)"
        )
    if found.cls is not cls:  # a decorator above @event made the class anew, as @dataclass(slots=True) does
        found = replace(found, cls=cls)
        setattr(cls, _ATTRIBUTE, found)
    return found


def versions_of(contract: EventType) -> tuple[EventType, ...]:
    """Lists the versions that a producer of this event writes now: the newest, and the previous ones of rollouts."""
    return (contract, *(versions_of(event_type(contract.rollout.previous)) if contract.rollout else ()))


def is_event(value: object) -> bool:
    """True if the value is of a class that `event` declared, callable or not."""
    return isinstance(type(value).__dict__.get(_ATTRIBUTE), EventType)


# --- arguments ---------------------------------------------------------------------------------------------------

_MAX_NAME: Final = 249  # bytes: a type is a topic when no other is given
_CODECS: Final = ("avro", "json")


def _check_name(name: object, version: object) -> None:
    if not isinstance(name, str):
        raise ConfigurationError(f"an event needs a name: @event('order.placed', version=1), got {name!r}")
    if not name or not name.isprintable() or len(name.encode()) > _MAX_NAME:
        raise ConfigurationError(f"an event's name is printable text of 1 to {_MAX_NAME} bytes, got {name!r:.80}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ConfigurationError(f"the version of {name} is a whole number from 1, got {version!r}")


def _check_contract(schema: object, codec: object) -> None:
    if schema is not None and not isinstance(schema, str | Path | Mapping):
        raise ConfigurationError(f"a schema is a path to an .avsc file or the parsed schema, got {schema!r:.80}")
    if isinstance(codec, str) and codec not in _CODECS:
        known = sorted(point.name for point in entry_points(group="outboxkit.codecs"))
        if codec not in known:
            raise ConfigurationError(f"there is no codec {codec!r}; expected one of {', '.join(known)}")
    elif codec is not None and not isinstance(codec, str) and not callable(getattr(codec, "encode", None)):
        raise ConfigurationError(f"a codec has a method encode; {codec!r:.80} has none")


def _previous(rollout: object) -> EventType:
    if not isinstance(rollout, Rollout):
        raise ConfigurationError(f"expected Rollout(PreviousVersion, share=0.05), got {rollout!r:.80}")
    return event_type(rollout.previous)


def _upcast(function: object) -> Upcast:
    """Reads from the annotation which version a function takes."""
    name = getattr(function, "__qualname__", repr(function)[:80])
    parameters = list(inspect.signature(function).parameters.values()) if callable(function) else []
    if not callable(function) or len(parameters) != 1 or inspect.iscoroutinefunction(function):
        raise ConfigurationError(f"upcast is a plain function of one event of an earlier version, not {name}")
    taken = parameters[0].annotation
    if isinstance(taken, str):  # under `from __future__ import annotations`
        taken = getattr(function, "__globals__", {}).get(taken, taken)
    if not isinstance(taken, type) or taken is inspect.Parameter.empty:
        raise ConfigurationError(
            f"{name}: annotate its parameter with the event class of the earlier version, at the top of a module"
        )
    event_type(taken)
    return Upcast(taken, function)


def _check_class(cls: object) -> None:
    """Refuses classes whose instances no handler could get back as what they were."""
    if not isinstance(cls, type):
        raise ConfigurationError(f"an event is a class, not {cls!r:.80}")
    bases = {base.__qualname__ for base in cls.__mro__ if base.__module__.startswith("pydantic.")}
    why = (
        "a NamedTuple is written as a list"
        if issubclass(cls, tuple)
        else "a RootModel has no named fields"
        if "RootModel" in bases
        else "a TypedDict has no instances of its own"
        if typing.is_typeddict(cls)
        else "it has no named fields"
        if issubclass(cls, Enum | str | bytes | int | float | list | dict | set | frozenset)
        else ""
    )
    if why:
        raise ConfigurationError(
            f"{cls.__qualname__} cannot be an event: {why}, so no handler could read it back; "
            "use a dataclass, a msgspec Struct or a pydantic model"
        )
