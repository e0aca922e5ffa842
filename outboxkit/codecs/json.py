"""JSON: stable UTF-8 text, readable by anybody, refused before it can mean two things.

Datetimes are RFC 3339, UUIDs and Decimals are strings, bytes are base64, an Enum is its value. NaN, Infinity, keys that
are not text and unknown types are refused with the path of the field; nothing is ever guessed by ``str()``.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Set
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, NoReturn
from uuid import UUID

from outboxkit.codecs import Codec, Encoded
from outboxkit.errors import DecodeError, EncodeError

if TYPE_CHECKING:
    from outboxkit.events import EventType
    from outboxkit.message import Message

__all__ = ["codec"]

_CONTENT_TYPE: Final = "application/json"
_MAX_DEPTH: Final = 100  # far below the parser's own limit, so that the refusal is ours on every interpreter


class _Json:
    def encode(self, value: object, event_type: EventType) -> Encoded:
        plain = _plain(value, event_type.name, 0)
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))
        try:
            return Encoded(text.encode(), _CONTENT_TYPE)
        except UnicodeEncodeError as error:
            found = _surrogate(plain, event_type.name)
            raise EncodeError(f"{found} holds half of a surrogate pair, which is not text", path=found) from error

    def decode(self, message: Message, event_type: EventType, resolve: Callable[[str], str]) -> object:
        del event_type, resolve
        return _parse(message.payload)

    def schema_text(self, event_type: EventType) -> str | None:
        del event_type
        return None


def codec() -> Codec:
    """The JSON codec."""
    return _Json()


# --- the way out -------------------------------------------------------------------------------------------------


def _plain(value: object, path: str, depth: int) -> object:
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if depth > _MAX_DEPTH:
        raise EncodeError(f"{path} is nested deeper than {_MAX_DEPTH} levels, or contains itself", path=path)
    if kind is float:
        return _finite(value, path)
    if (scalar := _SCALARS.get(kind)) is not None:
        return scalar(value)
    return _other(value, path, depth)


def _other(value: object, path: str, depth: int) -> object:
    if (fields := _fields(value)) is not None:
        return {name: _plain(item, f"{path}.{name}", depth + 1) for name, item in fields}
    if isinstance(value, Mapping):
        return {_key(key, path): _plain(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{at}]", depth + 1) for at, item in enumerate(value)]
    if isinstance(value, Set):  # a set has no order, but the same event must give the same bytes
        return sorted((_plain(item, f"{path}{{}}", depth + 1) for item in value), key=_text)
    if isinstance(value, Enum):
        return _plain(value.value, path, depth + 1)
    for base, scalar in _SCALARS.items():
        if isinstance(value, base):
            return scalar(value)
    if isinstance(value, float):
        return _finite(value, path)
    raise EncodeError(
        f"{path} is a {type(value).__name__}, which JSON cannot hold; expected text, numbers, dates, UUID, Decimal, "
        "bytes, Enum, lists, mappings or event classes",
        path=path,
    )


def _fields(value: object) -> list[tuple[str, object]] | None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    names = getattr(type(value), "__struct_fields__", None)  # msgspec.Struct
    if names is None:
        names = getattr(type(value), "model_fields", None)  # pydantic.BaseModel
    return None if names is None else [(name, getattr(value, name)) for name in names]


def _finite(value: Any, path: str) -> float:
    if not math.isfinite(value):
        raise EncodeError(f"{path} is {value}, which is not a JSON number", path=path)
    return float(value)


def _key(key: object, path: str) -> str:
    if isinstance(key, Enum):
        key = key.value
    if not isinstance(key, str):
        raise EncodeError(f"{path} has the key {key!r}; keys of a JSON object are text", path=path)
    return key


def _duration(value: timedelta) -> str:
    sign = "-" if value < timedelta() else ""
    whole = abs(value)
    return f"{sign}P{whole.days}DT{whole.seconds}.{whole.microseconds:06d}S"


def _text(plain: object) -> str:
    return json.dumps(plain, sort_keys=True)


_SCALARS: Final[dict[type, Callable[[Any], object]]] = {
    datetime: datetime.isoformat,
    date: date.isoformat,
    time: time.isoformat,
    timedelta: _duration,
    UUID: str,
    Decimal: str,
    bytes: lambda value: base64.b64encode(value).decode(),
    bytearray: lambda value: base64.b64encode(value).decode(),
    str: lambda value: str.__str__(value),
    int: int,
}


def _surrogate(plain: object, path: str) -> str:
    """The path of the first text that is not Unicode."""
    if isinstance(plain, str):
        return path if any("\ud800" <= character <= "\udfff" for character in plain) else ""
    if isinstance(plain, Mapping):
        children = [
            (f"{path}.{key!a}" if _surrogate(key, path) else f"{path}.{key}", key, item) for key, item in plain.items()
        ]
        return next((at for at, key, item in children if _surrogate(key, at) or _surrogate(item, at)), "")
    if isinstance(plain, list):
        return next((found for at, item in enumerate(plain) if (found := _surrogate(item, f"{path}[{at}]"))), "")
    return ""


# --- the way in --------------------------------------------------------------------------------------------------


def _parse(data: bytes) -> object:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"not UTF-8 at byte {error.start}", offset=error.start) from error
    try:
        plain: object = json.loads(text, parse_constant=_no_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        raise DecodeError(f"not JSON at byte {offset}: {error.msg}", offset=offset) from error
    except RecursionError as error:
        raise DecodeError(f"nested deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:  # digits without end: the interpreter's own limit
        raise DecodeError("a number is too long") from error
    if _depth(plain, _MAX_DEPTH) > _MAX_DEPTH:
        raise DecodeError(f"nested deeper than {_MAX_DEPTH} levels")
    return plain


def _no_constant(name: str) -> NoReturn:
    raise DecodeError(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise DecodeError(f"the number {digits[:40]} is too large")
    return value


def _depth(plain: object, limit: int) -> int:
    """How deep the value is nested; counts no further than one past the limit."""
    level, depth = [plain], 0
    while level and depth <= limit:
        inner: list[object] = []
        for item in level:
            inner.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        level = inner
        depth += 1
    return depth - 1 if not level else depth
