"""Event classes of other libraries: what a pydantic model or a msgspec Struct itself makes of an instance.

Exclusions, aliases, serialisers, computed fields, renaming and tags are the class's business; asking for its own dump
and handing its own names back keeps us from having a second opinion. Neither library is imported here: a value of one
shows that it is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple
from uuid import UUID

__all__ = [
    "ReadField",
    "computed_names",
    "dump_pydantic",
    "dump_struct",
    "field_names",
    "is_pydantic",
    "is_struct",
    "read_fields",
    "tag_of",
    "unreadable",
    "validate",
]

_AS_THEY_ARE: Final = (bytes, bytearray, date, datetime, time, timedelta, Decimal, UUID)  # written in our own forms


@functools.cache
def is_pydantic(cls: type) -> bool:
    """True for pydantic models and pydantic dataclasses."""
    return "__pydantic_serializer__" in vars(cls)


@functools.cache
def is_struct(cls: type) -> bool:
    """True for msgspec Structs."""
    return hasattr(cls, "__struct_fields__")


def dump_struct(value: object, plain: Any) -> Any:
    """Dumps a msgspec Struct under its encoded names, with its tag.

    Args:
        value: the Struct.
        plain: called for what msgspec does not know.
    """
    msgspec = importlib.import_module("msgspec")
    return msgspec.to_builtins(value, builtin_types=_AS_THEY_ARE, order="deterministic", enc_hook=plain)


def dump_pydantic(value: object) -> Any:
    """Dumps a pydantic object by its aliases; as JSON if something in its class is written in another way there.

    Raises:
        ValueError: the class cannot be dumped.
    """
    cls: type = type(value)
    serializer: Any = cls.__dict__["__pydantic_serializer__"]
    plain = serializer.to_python(value, by_alias=True)
    if secret := _secret(plain):
        raise ValueError(f"holds a {secret}, which would be written masked and could not be read back")
    plain = _own_bytes(cls, plain)
    return _merged(plain, serializer.to_python(value, by_alias=True, mode="json")) if _has_json_form(cls) else plain


class ReadField(NamedTuple):
    """A field of a pydantic class, as it is read."""

    name: str
    annotation: Any
    facts: tuple[Any, ...]


@functools.cache
def read_fields(cls: type) -> Mapping[str, ReadField]:
    """Finds the field by every name under which it may come: as it is written, as it is read, and its own."""
    found: dict[str, ReadField] = {}
    for name, field in _fields(cls).items():
        validated = field.validation_alias or field.alias
        read = next((one for one in getattr(validated, "choices", [validated]) if isinstance(one, str)), name)
        known = ReadField(read, field.annotation, tuple(field.metadata))
        found |= dict.fromkeys((name, read, _written(name, field)), known)
    return found


@functools.cache
def computed_names(cls: type) -> frozenset[str]:
    """Names of what a pydantic class computes: it is written for others, and computed again when it is read."""
    computed = getattr(cls, "__pydantic_decorators__").computed_fields  # noqa: B009  a name of pydantic's
    return frozenset(name for known, one in computed.items() for name in (known, one.info.alias) if name)


def validate(cls: type, plain: Any) -> Any:
    """Makes a pydantic object of plain data; strict classes take texts as JSON only.

    Raises:
        ValueError: the class does not take it.
    """
    validator: Any = cls.__dict__["__pydantic_validator__"]
    if getattr(cls, "model_config", getattr(cls, "__pydantic_config__", {})).get("strict"):
        with contextlib.suppress(TypeError):
            return validator.validate_json(json.dumps(plain))
    return validator.validate_python(plain)


@functools.cache
def field_names(cls: type) -> Mapping[str, str]:
    """Maps the names under which a Struct is written to those of its fields."""
    return dict(zip(cls.__struct_encode_fields__, cls.__struct_fields__, strict=True))  # type: ignore[attr-defined]


def tag_of(cls: type) -> tuple[str, object] | None:
    """The tag field and the tag of a Struct, None when it has none."""
    config = getattr(cls, "__struct_config__", None)
    return None if config is None or config.tag is None else (config.tag_field, config.tag)


def unreadable(cls: type) -> str:
    """The reason why an instance, once written, cannot be read back as this class; empty when it can."""
    if is_pydantic(cls):
        lost = [name for name, field in _fields(cls).items() if field.exclude and field.is_required()]
        return f"{lost[0]} is excluded from what is written, but required to read it: give it a default" if lost else ""
    if not dataclasses.is_dataclass(cls):
        return ""
    written = {field.name for field in dataclasses.fields(cls) if field.init}
    for name, parameter in inspect.signature(cls).parameters.items():
        optional = parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
        if name not in written and parameter.default is parameter.empty and not optional:
            return f"its __init__ needs {name}, which is not a field and so is not written"
    return ""


def _fields(cls: type) -> Mapping[str, Any]:
    found: Any = getattr(cls, "__pydantic_fields__", None) or getattr(cls, "model_fields", None)
    return found if isinstance(found, Mapping) else {}


def _written(name: str, field: Any) -> str:
    found: str = field.serialization_alias or field.alias or name
    return found


def _own_bytes(cls: type, plain: Any) -> Any:
    """Turns into text what fields with an encoder of their own (`Base64Bytes`) dump: it is text in bytes."""
    if not isinstance(plain, dict) or not is_pydantic(cls):
        return plain
    for name, field in _fields(cls).items():
        item = plain.get(_written(name, field))
        if isinstance(item, bytes) and any(hasattr(fact, "encoder") for fact in field.metadata):
            plain[_written(name, field)] = item.decode("ascii")
        elif isinstance(field.annotation, type):
            _own_bytes(field.annotation, item)
    return plain


def _merged(plain: Any, dumped: Any) -> Any:
    """The dump for JSON, but for bytes: as text they could not be told from text, and not all of them are."""
    if isinstance(plain, bytes):
        return plain if isinstance(dumped, str) and dumped.encode() == plain else dumped
    if isinstance(plain, dict) and isinstance(dumped, dict) and len(plain) == len(dumped):
        return {name: _merged(one, other) for one, (name, other) in zip(plain.values(), dumped.items(), strict=True)}
    if isinstance(plain, list | tuple) and isinstance(dumped, list) and len(plain) == len(dumped):
        return [_merged(one, other) for one, other in zip(plain, dumped, strict=True)]
    return dumped


def _secret(plain: Any) -> str:
    """The class's name of the first secret in a dump."""
    if hasattr(plain, "get_secret_value"):
        return type(plain).__qualname__
    parts = plain.values() if isinstance(plain, Mapping) else plain if isinstance(plain, list | tuple | set) else ()
    return next(filter(None, map(_secret, parts)), "")


@functools.cache
def _has_json_form(cls: type) -> bool:
    """True if a serialiser in the class, or below it, makes something else of a value for JSON than for Python."""
    return _asks_for_json(cls.__dict__["__pydantic_core_schema__"])


def _asks_for_json(schema: Any) -> bool:
    if isinstance(schema, list | tuple):
        return any(map(_asks_for_json, schema))
    if not isinstance(schema, dict):
        return False
    how = schema.get("serialization")
    if isinstance(how, dict) and (how.get("info_arg") or str(how.get("when_used", "")).startswith("json")):
        return True
    return any(_asks_for_json(part) for part in schema.values())
