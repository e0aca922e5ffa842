"""JSON: stable UTF-8 text, readable by anybody, refused before it can mean two things.

Datetimes are RFC 3339, UUIDs and Decimals are strings, bytes are base64, an Enum is its value, a set is sorted.
Objects of pydantic and msgspec are what their classes make of them. NaN, Infinity, a key twice, keys that are not text,
decimals of more than a thousand digits and unknown types are refused with the path of the field; nothing is guessed.
Reading is as strict, but for a byte order mark, which some writers put before the text.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NoReturn
from uuid import UUID

from outboxkit.codecs import Codec, Encoded, classes
from outboxkit.codecs.plain import NumberText, decimal_of
from outboxkit.errors import DecodeError, EncodeError
from outboxkit.events import EventType
from outboxkit.message import Message

__all__ = ["codec"]

_CONTENT_TYPE: Final = "application/json"
_AS_IT_IS: Final = frozenset((str, int, bool, type(None)))
_MAX_DEPTH: Final = 100  # far below the parser's own limit, so that the refusal is ours on every interpreter

_ENCODE: Final = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
).encode  # made once: json.dumps with options makes an encoder for every call


class _Json:
    def encode(self, value: object, event_type: EventType) -> Encoded:  # noqa: ARG002 # the port has it
        plain = _plain(value, "", 0)
        try:
            return Encoded(_ENCODE(plain).encode(), _CONTENT_TYPE)
        except UnicodeEncodeError as error:
            path = _surrogate(plain, "")
            raise _refusal(path, "holds half of a surrogate pair, which is not text") from error
        except ValueError as error:  # the interpreter's limit on digits
            raise _refusal("", "holds a number with too many digits") from error

    def decode(self, message: Message, event_type: EventType, resolve: Callable[[str], str]) -> object:
        del resolve
        return _parse(message.payload, exact=event_type.cls is not dict)

    def schema_text(self, event_type: EventType) -> str | None:
        del event_type
        return None


def codec() -> Codec:
    """The JSON codec."""
    return _Json()


# --- the way out -------------------------------------------------------------------------------------------------


def _plain(value: object, path: str, depth: int) -> object:
    kind: type = type(value)
    if kind in _AS_IT_IS:
        return value
    if depth > _MAX_DEPTH:
        raise _refusal(path, f"is nested deeper than {_MAX_DEPTH} levels, or contains itself")
    if (scalar := _SCALARS.get(kind)) is not None:
        return scalar(value, path)
    dumps, names = _form(kind, path)
    if dumps:
        return _plain(_dumped(value, path, depth), path, depth + 1)
    if names is not None:
        return _object([(name, getattr(value, name)) for name in names], path, depth + 1)
    return _inner(value, path, depth + 1)


def _dumped(value: object, path: str, depth: int) -> object:
    """Dumps an object by its class, which another library made."""
    cls: type = type(value)
    try:
        if classes.is_pydantic(cls):
            return classes.dump_pydantic(value)
        return classes.dump_struct(value, lambda inner: _plain(inner, path, depth + 1))
    except (TypeError, ValueError) as error:
        if isinstance(error, EncodeError):
            raise
        raise _refusal(path, f"cannot be written by its class {cls.__qualname__}: {error}") from error


def _inner(value: object, path: str, depth: int) -> object:
    match value:
        case Mapping():
            return _object([(_key(key, path), item) for key, item in value.items()], path, depth)
        case list() | tuple():
            return [_plain(item, f"{path}[{at}]", depth) for at, item in enumerate(value)]
        case AbstractSet():  # a set has no order, but the same event must give the same bytes
            return sorted((_plain(item, f"{path}[]", depth) for item in value), key=_sort_key)
        case Enum():
            return _plain(value.value, path, depth)
    for base, scalar in _SCALARS.items():
        if isinstance(value, base):
            return scalar(value, path)
    raise _refusal(
        path,
        f"is of type {type(value).__qualname__}, which JSON cannot hold; expected text, numbers, dates, UUID, Decimal, "
        "bytes, Enum, lists, mappings or event classes",
    )


def _object(fields: list[tuple[str, object]], path: str, depth: int) -> dict[str, object]:
    found = {
        name: item if type(item) in _AS_IT_IS else _plain(item, f"{path}.{name}" if path else name, depth)
        for name, item in fields
    }
    if len(found) != len(fields):
        raise _refusal(path, f"has two keys that are both written as {_first_twice(fields)!r}")
    return found


def _first_twice(pairs: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    return next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _form(cls: type, path: str) -> tuple[bool, tuple[str, ...] | None]:
    """Whether its class dumps a value, else the fields of a dataclass, None for anything else."""
    dumps, names, why = _known_form(cls)
    if why:
        raise _refusal(path, f"cannot be read back as a {cls.__qualname__}: {why}")
    return dumps, names


@functools.cache
def _known_form(cls: type) -> tuple[bool, tuple[str, ...] | None, str]:
    dumps = classes.is_pydantic(cls) or classes.is_struct(cls)
    names = tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else None
    return dumps, names, classes.unreadable(cls)


def _key(key: object, path: str) -> str:
    if isinstance(key, Enum):
        key = key.value
    if not isinstance(key, str):
        raise _refusal(path, f"has the key {key!r}; the keys of a JSON object are text")
    return key


def _float(value: Any, path: str) -> float:
    if not math.isfinite(value):
        raise _refusal(path, f"is {value}, which is not a JSON number")
    return float(value)


def _decimal(value: Any, path: str) -> str:
    text = str(value)
    try:
        decimal_of(text)
    except ValueError as error:
        raise _refusal(path, f"is {text:.40}, which is not a finite number of at most a thousand digits") from error
    return text


def _duration(value: Any, _path: str) -> str:
    whole = abs(value)
    return f"{'-' if value < timedelta() else ''}P{whole.days}DT{whole.seconds}.{whole.microseconds:06d}S"


def _base64(value: Any, _path: str) -> str:
    return base64.b64encode(value).decode()


_SCALARS: Final[dict[type, Callable[[Any, str], object]]] = {
    float: _float,
    datetime: lambda value, _: value.isoformat(),
    date: lambda value, _: value.isoformat(),
    time: lambda value, _: value.isoformat(),
    timedelta: _duration,
    UUID: lambda value, _: str(value),
    Decimal: _decimal,
    bytes: _base64,
    bytearray: _base64,
    str: lambda value, _: str.__str__(value),
    int: lambda value, _: int(value),
}


def _sort_key(plain: object) -> str:
    return json.dumps(plain, sort_keys=True)


def _surrogate(plain: object, path: str) -> str | None:
    """The path of the first text that is not Unicode."""
    if isinstance(plain, str):
        return path if any("\ud800" <= character <= "\udfff" for character in plain) else None
    if isinstance(plain, Mapping):
        named = [
            (f"{path}.{key!a}".lstrip(".").replace("'", ""), part)
            for key, item in plain.items()
            for part in (key, item)
        ]
        return next((found for at, part in named if (found := _surrogate(part, at)) is not None), None)
    if isinstance(plain, list):
        indexed = (_surrogate(item, f"{path}[{at}]") for at, item in enumerate(plain))
        return next((found for found in indexed if found is not None), None)
    return None


def _refusal(path: str | None, why: str) -> EncodeError:
    return EncodeError(f"{path or 'the event'} {why}", path=path or "")


# --- the way in --------------------------------------------------------------------------------------------------


def _parse(data: bytes, *, exact: bool) -> object:
    """Parses strictly; `exact` keeps the text of numbers with a fraction, for fields that are Decimals."""
    skipped = len(BOM_UTF8) if data.startswith(BOM_UTF8) else 0
    try:
        text = data[skipped:].decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"not UTF-8 at byte {skipped + error.start}", offset=skipped + error.start) from error
    number = _exact_number if exact else _number
    try:
        plain: object = json.loads(
            text, parse_constant=_no_constant, parse_float=number, object_pairs_hook=_object_of_pairs
        )
    except json.JSONDecodeError as error:
        offset = skipped + len(text[: error.pos].encode())
        raise DecodeError(f"not JSON at byte {offset}: {error.msg}", offset=offset) from error
    except RecursionError as error:
        raise DecodeError(f"nested deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:  # the interpreter's limit on digits
        raise DecodeError("a number has too many digits") from error
    _refuse_depth(plain)
    return plain


def _object_of_pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = _first_twice(pairs)
        raise DecodeError(f"the key {twice!r:.80} is there twice in one object, with two meanings")
    return found


def _number(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise DecodeError(f"the number {digits:.40} is too large")
    return value


def _exact_number(digits: str) -> float:
    _number(digits)
    return NumberText(digits)


def _no_constant(name: str) -> NoReturn:
    raise DecodeError(f"{name} is not a JSON number")


def _refuse_depth(plain: object) -> None:
    level = [plain]
    for _ in range(_MAX_DEPTH + 1):
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise DecodeError(f"nested deeper than {_MAX_DEPTH} levels")
