"""Event types: which name, version and schema a class of the application has on the wire. Pure.

*Event* is only the user's object; once written it is a message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from outboxkit.errors import CaptureError, ConfigurationError

__all__ = [
    "EventType",
    "Rollout",
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
        if not callable(self.share) and not 0.0 <= self.share <= 1.0:
            raise ConfigurationError(f"a share lies between 0 and 1, not {self.share}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """What the wire needs to know of an event class.

    Attributes:
        name: the type on the wire, for people and routing: ``order.placed``.
        version: of its contract, from 1.
        cls: the class; ``dict`` for events without one.
        schema: an ``.avsc`` file (path), or the schema itself as parsed JSON; None for codecs without schemas, and for
            Avro when the class is the contract.
        codec: name of the codec, ``json`` or ``avro``; or a codec, as in ``AvroCodec(frame=…)``.
        rollout: who gets this version, while not all do.
    """

    name: str
    version: int = 1
    cls: type = dict
    schema: str | Path | Mapping[str, Any] | None = None
    codec: object = "json"
    rollout: Rollout | None = None

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
) -> Callable[[T], T]:
    """Gives any class a name and version on the wire: a dataclass, a msgspec Struct, a pydantic model.

    Args:
        name: stable name, ``order.placed``.
        version: of the contract, from 1.
        schema: Avro schema: a path to an ``.avsc`` file or the parsed schema.
        codec: a codec's name, or a codec made for this event; ``avro`` when there is a schema, else ``json``.
        rollout: ``Rollout(OrderPlacedV1, share=0.05)``: 5 % of the keys get this version, the rest the previous one.

    Raises:
        ConfigurationError: an empty name, a version below 1, or a rollout whose previous version is no earlier one.
    """
    if not name or version < 1:
        raise ConfigurationError(f"an event needs a name and a version from 1, got {name!r} and {version}")

    earlier = None if rollout is None else event_type(rollout.previous)
    if earlier is not None and (earlier.name != name or earlier.version >= version):
        raise ConfigurationError(f"the previous version of {name} {version} cannot be {earlier.name} {earlier.version}")

    def declare(cls: T) -> T:
        found = EventType(
            name=name,
            version=version,
            cls=cls,
            schema=schema,
            codec=codec or ("avro" if schema is not None else "json"),
            rollout=rollout,
        )
        setattr(cls, _ATTRIBUTE, found)
        return cls

    return declare


def event_type(value: object) -> EventType:
    """The event type of an event or of its class.

    Raises:
        CaptureError: the class was not declared by `event`.
    """
    cls = value if isinstance(value, type) else type(value)
    found = cls.__dict__.get(_ATTRIBUTE)
    if not isinstance(found, EventType):
        raise CaptureError(
            f"{cls.__qualname__} is not an event: decorate the class with @event('some.name', version=1)"
        )
    return found


def versions_of(contract: EventType) -> tuple[EventType, ...]:
    """The versions that a producer of this event writes now: the newest, and the previous ones of its rollouts."""
    return (contract, *(versions_of(event_type(contract.rollout.previous)) if contract.rollout else ()))


def is_event(value: object) -> bool:
    """Whether the value is of a class that `event` declared; true for a callable one as well."""
    return isinstance(type(value).__dict__.get(_ATTRIBUTE), EventType)
