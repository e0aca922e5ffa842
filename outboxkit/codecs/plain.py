"""Plain data: an event as dicts, lists and scalars, and back into its class as the annotations want it. Pure."""

from __future__ import annotations

import base64
import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final, Union
from uuid import UUID

from outboxkit.errors import DecodeError

__all__ = [
    "from_plain",
    "to_plain",
]


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
    """An event from plain data: the inverse of `to_plain`, and of what JSON made of dates, UUIDs and the like.

    Fields that the class does not know are ignored, so that a producer may add some.

    Raises:
        DecodeError: the class does not take these fields; the path says which.
    """
    if cls is dict:
        return data
    try:
        return _made(cls, data, "")
    except DecodeError as error:
        raise DecodeError(f"{cls.__qualname__} does not take this data: {error}", path=error.path) from error


def _made(cls: type, data: object, path: str) -> Any:
    try:
        if callable(validate := getattr(cls, "model_validate", None)):  # pydantic, which takes all text but base64
            return validate(_with_bytes(cls, data, path))
        if not isinstance(data, Mapping):
            raise _unfit(path, "fields", data)
        hints = _hints(cls)
        known = {name: item for name, item in data.items() if name in hints}
        return cls(**{name: _fit(hints[name], item, _inside(path, name)) for name, item in known.items()})
    except (TypeError, ValueError) as error:  # a field is missing, or the class itself refuses
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"{path or cls.__qualname__}: {error}", path=path or _missing(cls, data)) from error


def _with_bytes(hint: Any, value: Any, path: str, facts: Collection[object] = ()) -> Any:
    """Plain data as a pydantic model takes it: what we wrote in base64 is bytes again, and names are its aliases."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _with_bytes(inner[0], value, path, inner[1:])
    if origin in (Union, types.UnionType):
        others = [one for one in inner if one is not type(None)]
        return _with_bytes(others[0], value, path, facts) if others and str not in others else value
    if hint is bytes and isinstance(value, str) and not any(hasattr(fact, "encoder") for fact in facts):
        return _fit_scalar(bytes, value, path)  # what has an encoder, as Base64Bytes, decodes by itself
    if isinstance(value, Mapping):
        return _fields_with_bytes(hint, inner, value, path)
    if isinstance(value, list) and inner:
        each = inner if origin is tuple and Ellipsis not in inner else (inner[0],) * len(value)
        return [
            _with_bytes(one, item, f"{path}[{at}]") for at, (one, item) in enumerate(zip(each, value, strict=False))
        ]
    return value


def _fields_with_bytes(hint: Any, inner: tuple[Any, ...], value: Mapping[Any, Any], path: str) -> Any:
    fields: Mapping[str, Any] | None = getattr(hint, "model_fields", None)
    if fields is None:
        return {
            name: _with_bytes(inner[-1] if inner else Any, item, _inside(path, str(name)))
            for name, item in value.items()
        }
    found = {}
    for name, item in value.items():
        field = fields.get(name)
        if field is None:
            found[name] = item
            continue
        alias = field.validation_alias or field.alias
        found[alias if isinstance(alias, str) else name] = _with_bytes(
            field.annotation, item, _inside(path, name), field.metadata
        )
    return found


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The fields that may be given, with what they are annotated; Any where that cannot be resolved."""
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls) if field.init]
    else:
        names = list(getattr(cls, "__struct_fields__", ())) or list(inspect.signature(cls).parameters)
    try:
        hints = typing.get_type_hints(cls, include_extras=False)
    except (NameError, TypeError):  # annotations that only exist while type checking
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def _missing(cls: type, data: object) -> str:
    return next((name for name in _hints(cls) if isinstance(data, Mapping) and name not in data), "")


def _fit(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _fit_one_of(arguments, value, path)
    if isinstance(origin, type):
        return _fit_many(origin, arguments, value, path)
    if not isinstance(hint, type) or hint is object or (isinstance(value, hint) and not _is_false_number(hint, value)):
        return value
    if dataclasses.is_dataclass(hint) or hasattr(hint, "__struct_fields__") or hasattr(hint, "model_validate"):
        return _made(hint, value, path)
    return _fit_scalar(hint, value, path)


def _fit_scalar(hint: Any, value: Any, path: str) -> Any:
    try:
        if issubclass(hint, Enum):
            return hint(value)
        if hint in _FROM_TEXT and isinstance(value, str):
            return _FROM_TEXT[hint](value)
    except (ValueError, ArithmeticError) as error:
        raise _unfit(path, hint.__name__, value) from error
    if hint is float and type(value) is int:
        return float(value)
    if hint in _STRICT:
        raise _unfit(path, hint.__name__, value)
    return value


def _fit_one_of(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    problems: list[DecodeError] = []
    for hint in hints:
        if hint is type(None):
            if value is None:
                return None
            continue
        try:
            return _fit(hint, value, path)
        except DecodeError as error:
            problems.append(error)
    raise problems[0] if problems else _unfit(path, "None", value)


def _fit_many(origin: type, hints: tuple[Any, ...], value: Any, path: str) -> Any:
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _unfit(path, "a mapping", value)
        key, item = hints or (Any, Any)
        return {_fit(key, name, path): _fit(item, part, _inside(path, str(name))) for name, part in value.items()}
    if not issubclass(origin, Collection):
        return value
    if not isinstance(value, list | tuple | set | frozenset):
        raise _unfit(path, "a list", value)
    if issubclass(origin, tuple) and Ellipsis not in hints:
        if len(hints) != len(value):
            raise _unfit(path, f"{len(hints)} items", value)
        return tuple(
            _fit(hint, part, f"{path}[{at}]") for at, (hint, part) in enumerate(zip(hints, value, strict=True))
        )
    parts = [_fit(hints[0] if hints else Any, part, f"{path}[{at}]") for at, part in enumerate(value)]
    return origin(parts) if origin in (tuple, set, frozenset) else parts


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(-?)P(\d+)DT(\d+)\.(\d{6})S", text)
    if found is None:
        raise ValueError(text)
    sign, days, seconds, micros = found.groups()
    whole = timedelta(days=int(days), seconds=int(seconds), microseconds=int(micros))
    return -whole if sign else whole


_FROM_TEXT: Final[dict[Any, Callable[[str], Any]]] = {
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    timedelta: _duration,
    UUID: UUID,
    Decimal: Decimal,
    bytes: lambda text: base64.b64decode(text, validate=True),
}


_STRICT: Final = {*_FROM_TEXT, int, str, float, bool}  # anything else is the class's own business


def _is_false_number(hint: type, value: object) -> bool:
    return isinstance(value, bool) and hint is int


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unfit(path: str, expected: str, value: object) -> DecodeError:
    return DecodeError(f"{path or 'the event'}: expected {expected}, got {type(value).__name__}", path=path)
