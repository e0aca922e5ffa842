"""Ordering keys and header values: the kinds of value that have one text form, and that form. Pure.

Two messages keep their order when their keys are equal bytes, so a value has one form wherever it is given: in
``Outbox(key=…)``, in ``publish(key=…)``, and in a header. What has several texts (a float, a Decimal, a list) is
refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, date, datetime
from enum import Enum
from typing import Any, Final
from uuid import UUID

from outboxkit.errors import CaptureError, EncodeError
from outboxkit.headers import RESERVED_NAMES, is_reserved
from outboxkit.message import Headers

__all__ = ["KeyValue", "header_pairs", "joined", "key_bytes", "name_of"]

KeyValue = str | bytes | int | UUID | date | Enum

_EXPECTED: Final = "a str, bytes, int, UUID, date or datetime, or an Enum with such a value"
_MAX_NAME: Final = (
    249  # bytes: Kafka's bound for a topic; RabbitMQ's for an exchange, a queue or a header's name is 255
)


def key_bytes(value: object, what: str = "the ordering key") -> bytes:
    """The bytes of a key or of a header's value.

    Args:
        value: a text, bytes, a whole number, a UUID, a date, or an Enum with such a value.
        what: how an error names it.

    Raises:
        CaptureError: the value is of another kind.
    """
    if type(value) is str:
        return _encoded(value, what)  # as a rule
    if isinstance(value, Enum):
        return key_bytes(value.value, what)
    if isinstance(value, str):
        return _encoded(str.__str__(value), what)
    for kind, form in _FORMS.items():
        if isinstance(value, kind) and not isinstance(value, bool):  # "True", "true" or "1"? no two writers agree
            return form(value)
    if _is_fast_uuid(value):
        return str(value).encode()
    raise CaptureError(f"{what} is a {type(value).__qualname__}; expected {_EXPECTED}")


def _date(value: date) -> bytes:
    """ISO 8601; instants in UTC, so that equal instants are equal keys."""
    is_instant = isinstance(value, datetime) and value.tzinfo is not None
    return (value.astimezone(UTC) if is_instant else value).isoformat().encode()  # type: ignore[attr-defined]


_FORMS: Final[dict[type, Callable[[Any], bytes]]] = {
    bytes: bytes,
    int: lambda value: b"%d" % value,
    UUID: lambda value: str(value).encode(),
    date: _date,
    bytearray: bytes,
    memoryview: bytes,
}


def joined(values: Iterable[object], what: str) -> bytes:
    """Several values as one key."""
    return b"/".join([key_bytes(value, what) for value in values])


def header_pairs(headers: Mapping[str, KeyValue]) -> Headers:
    """An application's headers as a message has them.

    Raises:
        CaptureError: a name is not text, or too long; or a value has no text form.
        EncodeError: the library writes headers of this name itself.
    """
    if not isinstance(headers, Mapping):
        raise CaptureError(f"headers are a mapping of names to values, not a {type(headers).__qualname__}")
    return tuple([(_header_name(name), key_bytes(value, f"the header {name!r}")) for name, value in headers.items()])


def name_of(value: object, what: str) -> str:
    """A topic, a type or another name that brokers and databases keep: short text without control characters.

    Raises:
        CaptureError: it is not.
    """
    if not isinstance(value, str):
        raise CaptureError(f"{what} is a {type(value).__qualname__}; expected text")
    if len(value) * 4 > _MAX_NAME and len(_encoded(value, what)) > _MAX_NAME:
        raise CaptureError(f"{what} has {len(value.encode())} bytes in UTF-8; at most {_MAX_NAME} are allowed")
    if not value.isprintable():
        raise CaptureError(f"{what} {value!a} holds a character that cannot be printed")
    return str.__str__(value)


def _header_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise CaptureError(f"a header's name is text that is not empty, not {name!r}")
    if is_reserved(name):
        raise EncodeError(
            f"the header {name!r} is reserved: the library writes {RESERVED_NAMES} itself; choose another name"
        )
    return name_of(name, "a header's name")


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise CaptureError(f"{what} holds half of a surrogate pair, which is not text") from error


def _is_fast_uuid(value: Any) -> bool:
    """Whether it is an id of ``uuid_utils``, which is no ``uuid.UUID``."""
    module = sys.modules.get("uuid_utils")
    return module is not None and isinstance(value, module.UUID)
