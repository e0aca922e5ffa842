"""Event types: which name, version and schema a class of the application has on the wire. Pure.

*Event* is only the user's object; once written it is a message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from outboxkit.errors import CaptureError, ConfigurationError, DecodeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["EventType", "event", "event_type", "from_plain", "is_event", "to_plain"]

T = TypeVar("T", bound=type)

_ATTRIBUTE: Final = "__outboxkit_event__"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventType:
    """What the wire needs to know of an event class.

    Attributes:
        name: the type on the wire, for people and routing: ``order.placed``.
        version: of its contract, from 1.
        cls: the class; ``dict`` for events without one.
        schema: an ``.avsc`` file (path), or the schema itself as parsed JSON; None for codecs without schemas.
        codec: name of the codec: ``json`` or ``avro``.
    """

    name: str
    version: int = 1
    cls: type = dict
    schema: str | Path | Mapping[str, Any] | None = None
    codec: str = "json"

    @property
    def dataschema(self) -> str:
        """The CloudEvents ``dataschema`` URI of this version."""
        return f"urn:outboxkit:{self.name}:{self.version}"


def event(
    name: str,
    *,
    version: int = 1,
    schema: str | Path | Mapping[str, Any] | None = None,
    codec: str | None = None,
) -> Callable[[T], T]:
    """Gives any class a name and version on the wire: a dataclass, a msgspec Struct, a pydantic model.

    Args:
        name: stable name, ``order.placed``.
        version: of the contract, from 1.
        schema: Avro schema: a path to an ``.avsc`` file or the parsed schema.
        codec: ``avro`` when there is a schema, else ``json``.

    Raises:
        ConfigurationError: an empty name, or a version below 1.
    """
    if not name or version < 1:
        raise ConfigurationError(f"an event needs a name and a version from 1, got {name!r} and {version}")

    def declare(cls: T) -> T:
        found = EventType(
            name=name,
            version=version,
            cls=cls,
            schema=schema,
            codec=codec or ("avro" if schema is not None else "json"),
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


def is_event(value: object) -> bool:
    """Whether the value is of a class that `event` declared; true for a callable one as well."""
    return isinstance(type(value).__dict__.get(_ATTRIBUTE), EventType)


def to_plain(value: object) -> object:
    """An event as plain data (dicts, lists, scalars) by the field names of its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return to_plain(dump())
    if fields := getattr(value, "__struct_fields__", None):
        return {name: to_plain(getattr(value, name)) for name in fields}
    return value


def from_plain(cls: type, data: object) -> Any:
    """An event from plain data; the inverse of `to_plain`.

    Raises:
        DecodeError: the class does not take these fields.
    """
    if cls is dict:
        return data
    try:
        if callable(validate := getattr(cls, "model_validate", None)):
            return validate(data)
        if not isinstance(data, Mapping):
            raise TypeError(f"expected fields, got {type(data).__name__}")
        if dataclasses.is_dataclass(cls):
            known = {field.name for field in dataclasses.fields(cls) if field.init}
            data = {name: item for name, item in data.items() if name in known}
        return cls(**data)
    except (TypeError, ValueError) as error:
        raise DecodeError(f"{cls.__qualname__} does not take this data: {type(error).__name__}") from error
