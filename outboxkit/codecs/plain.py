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

from typing_extensions import TypeAliasType

from outboxkit.codecs import classes
from outboxkit.errors import DecodeError

__all__ = [
    "NumberText",
    "decimal_of",
    "from_plain",
]

_NOTHING: Final[Mapping[Any, Any]] = {}
_MARKS: Final = (typing.Annotated, typing.Required, typing.NotRequired, typing.Final, typing.ClassVar)


class NumberText(float):
    """A number of JSON with a fraction or an exponent: a float that remembers its text, for what needs it exactly."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


def from_plain(cls: type, data: object) -> Any:
    """Makes an event of plain data: the inverse of encoding it, of dates, UUIDs and the like in JSON, too.

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


def _made(cls: type, data: object, path: str, given: Mapping[Any, Any] = _NOTHING) -> Any:
    """Makes an object of a class; `given` are the types that stand for the type variables of a generic one."""
    dot = f"{path}." if path else ""
    try:
        if classes.is_pydantic(cls):
            return classes.validate(cls, _with_bytes(cls, data, path))
        if not isinstance(data, Mapping):
            raise _unfit(path, "fields", data)
        hints, named = _hints(cls), _by_field(cls, data, path) if classes.is_struct(cls) else data
        known = {
            name: item if type(item) is hints[name] else _fit(given.get(hints[name], hints[name]), item, f"{dot}{name}")
            for name, item in named.items()
            if name in hints
        }
        late = [(name, known.pop(name)) for name in _late_fields(cls) if name in known]
        made = cls(**known)
        for name, item in late:
            object.__setattr__(made, name, item)  # a field that __init__ does not take, perhaps of a frozen class
    except (TypeError, ValueError) as error:  # a field is missing, or the class itself refuses
        if isinstance(error, DecodeError):
            raise
        raise DecodeError(f"{path or cls.__qualname__}: {error}", path=path or _missing(cls, data)) from error
    return made


def _by_field(cls: type, data: Mapping[Any, Any], path: str) -> Mapping[Any, Any]:
    """The data of a Struct by the names of its fields: it may be written under others, with a tag of its own."""
    tag = classes.tag_of(cls)
    if tag is not None and data.get(*tag) != tag[1]:
        raise DecodeError(f"{_inside(path, tag[0])}: expected the tag {tag[1]!r} of {cls.__qualname__}", path=path)
    names = classes.field_names(cls)
    return {names.get(name, name): item for name, item in data.items()}


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
    if isinstance(value, NumberText):
        return decimal_of(value.text) if hint is Decimal else float(value)
    if isinstance(value, Mapping):
        return _fields_with_bytes(hint, inner, value, path)
    if isinstance(value, list) and inner:
        each = inner if origin is tuple and Ellipsis not in inner else (inner[0],) * len(value)
        return [
            _with_bytes(one, item, f"{path}[{at}]") for at, (one, item) in enumerate(zip(each, value, strict=False))
        ]
    return value


def _fields_with_bytes(hint: Any, inner: tuple[Any, ...], value: Mapping[Any, Any], path: str) -> Any:
    if not isinstance(hint, type) or not classes.is_pydantic(hint):
        item_hint = inner[-1] if inner else Any
        return {name: _with_bytes(item_hint, item, _inside(path, str(name))) for name, item in value.items()}
    fields, computed, found = classes.read_fields(hint), classes.computed_names(hint), {}
    for name, item in value.items():
        if (field := fields.get(name)) is not None:
            found[field.name] = _with_bytes(field.annotation, item, _inside(path, name), field.facts)
        elif name not in computed:
            found[name] = item
    return found


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """The fields that may be given, with what they are annotated; Any where that cannot be resolved."""
    if dataclasses.is_dataclass(cls):
        names = [field.name for field in dataclasses.fields(cls)]
    else:
        names = list(getattr(cls, "__struct_fields__", ())) or list(inspect.signature(cls).parameters)
    try:
        hints = typing.get_type_hints(cls, include_extras=False)
    except (NameError, TypeError):  # annotations that only exist while type checking
        hints = {}
    return {name: hints.get(name, Any) for name in names}


@functools.cache
def _late_fields(cls: type) -> tuple[str, ...]:
    """Fields of a dataclass that its __init__ does not take."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return tuple(field.name for field in fields if not field.init)


def _missing(cls: type, data: object) -> str:
    return next((name for name in _hints(cls) if isinstance(data, Mapping) and name not in data), "")


def _fit(hint: Any, value: Any, path: str) -> Any:
    hint = _bare(hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _fit_one_of(arguments, value, path)
    if isinstance(origin, type):
        return _fit_many(origin, arguments, value, path)
    if not isinstance(hint, type) or hint is Any or hint is object:
        return value
    if typing.is_typeddict(hint):
        return _fit_typed(hint, value, path)
    if isinstance(value, hint) and not _is_false_number(hint, value):
        return value
    if _has_fields(hint):
        return _made(hint, value, path)
    if issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return _fit_named(hint, value, path)
    return _fit_scalar(hint, value, path)


def _bare(hint: Any) -> Any:
    """The type behind a NewType, an alias, or marks around it."""
    while True:
        if hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        elif isinstance(hint, TypeAliasType):
            hint = hint.__value__
        elif typing.get_origin(hint) in _MARKS:
            hint = typing.get_args(hint)[0]
        else:
            return hint


def _has_fields(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or classes.is_struct(cls) or classes.is_pydantic(cls)


def _fit_typed(cls: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _unfit(path, "fields", value)
    hints = typing.get_type_hints(cls)
    marked = typing.get_type_hints(cls, include_extras=True)  # the class itself takes marks for text in some modules
    optional = {name for name, mark in marked.items() if typing.get_origin(mark) is typing.NotRequired}
    if missing := sorted(cls.__required_keys__ - optional - value.keys()):
        raise DecodeError(f"{_inside(path, missing[0])} is missing", path=_inside(path, missing[0]))
    return {name: _fit(hints.get(name, Any), item, _inside(path, str(name))) for name, item in value.items()}


def _fit_named(cls: Any, value: Any, path: str) -> Any:
    if not isinstance(value, list | tuple) or len(value) != len(cls._fields):
        raise _unfit(path, f"a list of {len(cls._fields)} items", value)
    hints = typing.get_type_hints(cls)
    return cls._make(
        _fit(hints.get(name, Any), part, _inside(path, name)) for name, part in zip(cls._fields, value, strict=True)
    )


def _fit_scalar(hint: Any, value: Any, path: str) -> Any:
    try:
        if issubclass(hint, Enum):
            return _member(hint, value, path)
        if hint in _FROM_TEXT and isinstance(value, str):
            return _FROM_TEXT[hint](value)
        if hint is Decimal and isinstance(value, NumberText | int) and not isinstance(value, bool):
            return decimal_of(value.text if isinstance(value, NumberText) else str(value))
    except (ValueError, ArithmeticError) as error:
        raise _unfit(path, hint.__name__, value) from error
    if hint is float and type(value) is int:
        return float(value)
    if hint in _STRICT:
        raise _unfit(path, hint.__name__, value)
    return value


def _member(cls: type[Enum], value: Any, path: str) -> Enum:
    """The member of a value as it is written: that of a date or a UUID is text by then."""
    try:
        return cls(value)
    except ValueError:
        for member in cls:
            try:
                found = _fit(type(member.value), value, path)
            except DecodeError:
                continue
            if found == member.value:
                return member
        raise


def _fit_one_of(hints: tuple[Any, ...], value: Any, path: str) -> Any:
    problems: list[DecodeError] = []
    by_fit = sorted(hints, key=lambda hint: _strangers(hint, value)) if isinstance(value, Mapping) else hints
    for hint in by_fit:
        if hint is type(None):
            if value is None:
                return None
            continue
        try:
            return _fit(hint, value, path)
        except DecodeError as error:
            problems.append(error)
    raise problems[0] if problems else _unfit(path, "None", value)


def _strangers(hint: Any, value: Mapping[Any, Any]) -> float:
    """Counts the names of the data that a class does not know: it would ignore them, and another class may be meant."""
    cls = _bare(hint)
    cls = typing.get_origin(cls) or cls
    if not isinstance(cls, type) or not _has_fields(cls):
        return 0.5  # a mapping takes all; a class that knows every name is closer
    if classes.is_pydantic(cls):
        return len(value.keys() - classes.read_fields(cls).keys() - classes.computed_names(cls))
    names = classes.field_names(cls) if classes.is_struct(cls) else {}
    return len({names.get(name, name) for name in value} - _hints(cls).keys())


def _fit_many(origin: type, hints: tuple[Any, ...], value: Any, path: str) -> Any:
    if _has_fields(origin):
        return _made(origin, value, path, dict(zip(getattr(origin, "__parameters__", ()), hints, strict=False)))
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


_DURATION: Final = re.compile(
    r"(-?)P(?:(\d{1,9})D)?(?:T(?:(\d{1,9})H)?(?:(\d{1,12})M)?(?:(\d{1,14})(?:\.(\d{1,9}))?S)?)?", re.ASCII
)


def _duration(text: str) -> timedelta:
    """ISO 8601 without years and months, which have no length."""
    found = _DURATION.fullmatch(text)
    if found is None or text[-1] in "PT":
        raise ValueError(text)
    sign, days, hours, minutes, seconds, fraction = found.groups(default="0")
    whole = timedelta(
        days=int(days),
        hours=int(hours),
        minutes=int(minutes),
        seconds=int(seconds),
        microseconds=int(fraction.ljust(6, "0")[:6]),
    )
    return -whole if sign == "-" else whole


_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,6})?", re.ASCII)
_MAX_DIGITS: Final = 1000  # of a decimal written out: what is longer is a mistake, or an attack on whoever calculates


def decimal_of(text: str) -> Decimal:
    """Reads a Decimal, digit for digit.

    Raises:
        ValueError: the text is not a finite number of at most a thousand digits, written out.
    """
    if len(text) > 2 * _MAX_DIGITS or _NUMBER.fullmatch(text) is None:
        raise ValueError(f"not a number: {text:.40}")
    found = Decimal(text)
    _, digits, exponent = found.as_tuple()
    if len(digits) + abs(int(exponent)) > _MAX_DIGITS:
        raise ValueError(f"more than {_MAX_DIGITS} digits: {text:.40}")
    return found


_FROM_TEXT: Final[dict[Any, Callable[[str], Any]]] = {
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    timedelta: _duration,
    UUID: UUID,
    Decimal: decimal_of,
    bytes: lambda text: base64.b64decode(text, validate=True),
}


_STRICT: Final = {*_FROM_TEXT, int, str, float, bool}  # anything else is the class's own business


def _is_false_number(hint: type, value: object) -> bool:
    return isinstance(value, bool) and hint is int


def _inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unfit(path: str, expected: str, value: object) -> DecodeError:
    return DecodeError(f"{path or 'the event'}: expected {expected}, got {type(value).__name__}", path=path)
