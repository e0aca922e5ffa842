"""A record of the client as values of ours. Pure."""

from __future__ import annotations

from datetime import UTC, datetime
from operator import methodcaller
from typing import TYPE_CHECKING, Final

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from confluent_kafka import Message

    from outboxkit.message import Headers

# The client returns a list although it has failed. A call in quickened bytecode does not notice, and the error comes up
# somewhere else, later; this call notices.
_headers: Final = methodcaller("headers")

__all__ = ["headers_of", "place_of", "timestamp_of"]


def place_of(message: Message) -> tuple[str, int, int]:
    """Topic, partition and offset."""
    return message.topic(), message.partition(), message.offset()  # type: ignore[return-value]  # it was read there


def timestamp_of(message: Message) -> datetime | None:
    """The record's timestamp, None when it has none or it is not a time."""
    kind, milliseconds = message.timestamp()
    if kind == TIMESTAMP_NOT_AVAILABLE:
        return None
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):  # a producer may write any number
        return None


def headers_of(message: Message) -> tuple[Headers, str | None]:
    """The record's headers, and why they cannot be read. A null value becomes an empty one."""
    try:
        raw: Iterable[tuple[str, bytes | None]] = _headers(message) or ()
    except (SystemError, UnicodeDecodeError):  # the client has no form for such a name, and gives no bytes
        return (), "the name of a header is not UTF-8"
    return tuple((name, value or b"") for name, value in raw), None
