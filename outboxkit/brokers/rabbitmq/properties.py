"""Reads the properties of a delivered message: everything that any client may have written. Pure.

The client library gives up a whole connection for one value that it cannot express: a timestamp in nanoseconds, a
property that is not UTF-8, a table in a thousand tables. Here a value that has no better form is its bytes or digits.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import CONTENT_ENCODING, REPLY_TO
from outboxkit.headers import CONTENT_TYPE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from outboxkit.message import Headers

__all__ = ["RAW_PROPERTIES", "Properties", "read_properties"]

RAW_PROPERTIES: Final = "amqp-properties"  #: the header that keeps the bytes of what cannot be read

_OURS: Final = "ce_"
_FOREIGN: Final = ("cloudEvents:", "cloudEvents_")
_TEXT, _TABLE, _OCTET, _TIME = "text", "table", "octet", "time"
# Bit of the property flags, name, form; in the order of the specification.
_LAYOUT: Final = (
    (15, "content_type", _TEXT),
    (14, "content_encoding", _TEXT),
    (13, "headers", _TABLE),
    (12, "delivery_mode", _OCTET),
    (11, "priority", _OCTET),
    (10, "correlation_id", _TEXT),
    (9, "reply_to", _TEXT),
    (8, "expiration", _TEXT),
    (7, "message_id", _TEXT),
    (6, "timestamp", _TIME),
    (5, "type", _TEXT),
    (4, "user_id", _TEXT),
    (3, "app_id", _TEXT),
    (2, "cluster_id", _TEXT),
)
# Property -> the header that says the same, for messages of foreign producers.
_IMPLIED: Final = {
    "content_type": CONTENT_TYPE,
    "correlation_id": "ce_correlationid",
    "message_id": "ce_id",
    "type": "ce_type",
    "app_id": "ce_source",
    "content_encoding": CONTENT_ENCODING,
    "reply_to": REPLY_TO,
    "expiration": "expiration",
    "user_id": "user-id",
}
_FLAGS: Final = struct.Struct(">H")
_LENGTH: Final = struct.Struct(">I")
_BYTES: Final = b"Sx"  # tags of a text and of bytes
_DEPTH: Final = 32  # tables in tables; what is deeper stays bytes
_MILLISECONDS: Final = 1 << 32  # above, a number of seconds is of the year 2106: some clients write milliseconds


@dataclass(frozen=True, slots=True)
class Properties:
    """Content of one message's properties.

    Attributes:
        headers: in our spelling; what only a property says comes first.
        timestamp: None when there is none or it is no time.
        reply_to: see `outboxkit.brokers.Delivery`.
        content_encoding: likewise.
        fault: why they cannot be read; then ``headers`` keeps their bytes.
    """

    headers: Headers
    timestamp: datetime | None = None
    reply_to: str | None = None
    content_encoding: str | None = None
    fault: str | None = None


def read_properties(raw: bytes) -> Properties:
    """Reads the flags and values of a content header. Never raises."""
    try:
        values, carried = _values(raw)
    except (struct.error, IndexError, ValueError) as error:
        kept = ((RAW_PROPERTIES, raw),)
        return Properties(kept, fault=f"the AMQP properties cannot be read: {error}")
    names = {name for name, _ in carried}
    implied = [(_IMPLIED[name], value) for name, value in values.items() if value and name in _IMPLIED]
    return Properties(
        (*(pair for pair in implied if pair[0] not in names), *carried),
        _instant(int.from_bytes(values["timestamp"], "big")) if "timestamp" in values else None,
        _text(values.get("reply_to")),
        _text(values.get("content_encoding")),
    )


def _values(raw: bytes) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """The properties by name, as bytes, and the headers of the table in our spelling."""
    values: dict[str, bytes] = {}
    headers: list[tuple[str, bytes]] = []
    (flags,) = _FLAGS.unpack_from(raw, 0)
    at = 2
    while _FLAGS.unpack_from(raw, at - 2)[0] & 1:  # further words of flags: AMQP defines none
        at += 2
    for bit, name, form in _LAYOUT:
        if not flags >> bit & 1:
            continue
        if form is _TABLE:
            end = _end(raw, at)
            headers = _headers(raw, at + 4, end)
        else:
            start = at + 1 if form is _TEXT else at
            end = start + (raw[at] if form is _TEXT else 8 if form is _TIME else 1)
            values[name] = raw[start:end]
        at = end
    if at > len(raw):
        raise ValueError("they are cut short")
    return values, headers


def _headers(raw: bytes, at: int, end: int) -> list[tuple[str, bytes]]:
    headers: list[tuple[str, bytes]] = []
    while at < end:
        start = at + 1
        at = start + raw[at]
        name = _spelled_ours(raw[start:at])
        if raw[at] in _BYTES:  # nearly all are: the short way
            start, at = at + 5, _end(raw, at + 1)
            headers.append((name, raw[start:at]))
        else:
            value, at = _value(raw, at, 0)
            headers += [(name, _to_bytes(single)) for single in (value if isinstance(value, list) else (value,))]
    return headers


def _end(raw: bytes, at: int) -> int:
    """Returns the end of the sized value whose length stands here."""
    end: int = at + 4 + _LENGTH.unpack_from(raw, at)[0]
    if end > len(raw):
        raise ValueError("a length points behind their end")
    return end


def _entries(raw: bytes, at: int, end: int, depth: int) -> Iterator[tuple[str, object]]:
    while at < end:
        start = at + 1
        at = start + raw[at]
        name = _name(raw[start:at])
        value, at = _value(raw, at, depth)
        yield name, value


def _items(raw: bytes, at: int, end: int, depth: int) -> Iterator[object]:
    while at < end:
        value, at = _value(raw, at, depth)
        yield value


def _value(raw: bytes, at: int, depth: int) -> tuple[object, int]:
    """A field value and where the next one begins."""
    tag = raw[at : at + 1]
    at += 1
    if tag in b"Sx":
        end = _end(raw, at)
        return raw[at + 4 : end], end
    if tag in b"FA":
        end = _end(raw, at)
        if depth >= _DEPTH:
            return raw[at + 4 : end], end
        if tag == b"A":
            return list(_items(raw, at + 4, end, depth + 1)), end
        return dict(_entries(raw, at + 4, end, depth + 1)), end
    known = _FIXED.get(tag)
    if known is None:
        raise ValueError(f"a header has the unknown type {tag!r}")
    form, meaning = known
    return meaning(*form.unpack_from(raw, at)), at + form.size


def _instant_or_digits(seconds: int) -> datetime | int:
    return _instant(seconds) or seconds


def _instant(seconds: int) -> datetime | None:
    try:
        return datetime.fromtimestamp(seconds / 1000 if seconds >= _MILLISECONDS else seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return None


def _decimal(scale: int, unscaled: int) -> Decimal:
    return Decimal(unscaled).scaleb(-scale)


def _nothing() -> None:
    return None


def _same(value: object) -> object:
    return value


# Type tag of a field -> how it is stored, and what it means. RabbitMQ's errata, and what clients write beside it.
_FIXED: Final[dict[bytes, tuple[struct.Struct, Callable[..., object]]]] = {
    b"t": (struct.Struct(">?"), _same),
    b"b": (struct.Struct(">b"), _same),
    b"B": (struct.Struct(">B"), _same),
    b"s": (struct.Struct(">h"), _same),
    b"U": (struct.Struct(">h"), _same),
    b"u": (struct.Struct(">H"), _same),
    b"I": (struct.Struct(">i"), _same),
    b"i": (struct.Struct(">I"), _same),
    b"l": (struct.Struct(">q"), _same),
    b"L": (struct.Struct(">q"), _same),
    b"f": (struct.Struct(">f"), _same),
    b"d": (struct.Struct(">d"), _same),
    b"D": (struct.Struct(">BI"), _decimal),
    b"T": (struct.Struct(">Q"), _instant_or_digits),
    b"V": (struct.Struct(""), _nothing),
    b"\0": (struct.Struct(""), _nothing),
}


@lru_cache(maxsize=4096)
def _spelled_ours(name: bytes) -> str:
    text = _name(name)
    prefix = next((prefix for prefix in _FOREIGN if text.startswith(prefix)), "")
    return _OURS + text[len(prefix) :] if prefix else text


def _name(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _to_bytes(value: object) -> bytes:
    match value:
        case bytes():
            return value
        case None:
            return b""
        case datetime():
            return value.isoformat().encode()
        case bool() | dict() | list():
            return json.dumps(value, default=_in_json).encode()
        case _:
            return str(value).encode()


def _in_json(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else _to_bytes(value).decode()


def _text(value: bytes | None) -> str | None:
    return value.decode("utf-8", "replace") if value else None
