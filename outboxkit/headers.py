"""Wire headers: CloudEvents names, reading and writing them, and their packed form in one column. Pure.

Headers follow CloudEvents 1.0 in binary mode with the Kafka spelling (``ce_id``, ``ce_type`` …). An adapter for another
broker translates the names; nothing else knows them. `wire_headers` and `from_wire` are each other's inverse.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from operator import attrgetter
from typing import Final

from outboxkit.errors import DecodeError, EncodeError
from outboxkit.message import Headers, Message, MessageLimits
from outboxkit.rows import Row

__all__ = [
    "CONTENT_TYPE",
    "LETTER",
    "REPLAY_FOR",
    "RESERVED_NAMES",
    "RESERVED_PREFIXES",
    "SCHEMA",
    "are_packed",
    "check_limits",
    "format_instant",
    "from_wire",
    "is_reserved",
    "outgoing_columns",
    "outgoing_headers",
    "pack_headers",
    "packed_headers",
    "unpack_headers",
    "wire_headers",
]

CONTENT_TYPE: Final = "content-type"
LETTER: Final = "outboxkit-letter"  #: the number of the dead letter that is replayed with this message
REPLAY_FOR: Final = "outboxkit-replay-for"
SCHEMA: Final = "outboxkit-schema"
RESERVED_PREFIXES: Final = ("ce_", "cloudevents:", "cloudevents_", "outboxkit-")
RESERVED_NAMES: Final = "ce_…, cloudEvents:…, outboxkit-… and content-type"  #: as people read them
# The CloudEvents spellings that brokers use for the same attribute, by prefix, all read as ``ce_``.
_FOREIGN_PREFIXES: Final = ("cloudEvents:", "cloudEvents_")
# Attribute of `Message` -> wire header, for those whose value is plain text.
_TEXT: Final = {
    "id": "ce_id",
    "type": "ce_type",
    "source": "ce_source",
    "correlation_id": "ce_correlationid",
    "causation_id": "ce_causationid",
    "dataschema": "ce_dataschema",
    "schema": SCHEMA,
    "content_type": CONTENT_TYPE,
}
_TIMES: Final = {"occurred_at": "ce_time", "recorded_at": "ce_recordedtime", "expires_at": "ce_expirytime"}
_texts: Final = attrgetter(*_TEXT)
_times: Final = attrgetter(*_TIMES)
_SEQUENCE: Final = "ce_sequence"
_RECORDED: Final = _TIMES["recorded_at"]
_SEQUENCE_DIGITS: Final = 20
# The forms of packed headers, by their first byte.
_PAIRS: Final = b"\1"
_LENGTHS: Final = b"\2"
_NAMES_FIRST: Final = b"\3"
_END: Final = b"\0\0"  # of the names: none is empty
_DERIVED: Final = frozenset((*_TEXT.values(), *_TIMES.values(), _SEQUENCE, "ce_specversion", "ce_partitionkey"))
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def wire_headers(message: Message) -> Headers:
    """All headers of a message as they go to the broker (Kafka spelling), ours first."""
    ours: list[tuple[str, bytes]] = [("ce_specversion", b"1.0")]
    ours += [(name, text.encode()) for name, text in zip(_TEXT.values(), _texts(message), strict=True) if text]
    for name, instant in zip(_TIMES.values(), _times(message), strict=True):
        if instant is not None:
            ours.append((name, format_instant(instant).encode()))
    if message.key is not None:
        ours.append(("ce_partitionkey", message.key))
    if message.sequence is not None:
        ours.append((_SEQUENCE, _sequence_of(message.sequence)))
    return (*ours, *message.headers)


def packed_headers(message: Message) -> bytes:
    """`pack_headers` of `wire_headers` in one go: every message that is written needs it."""
    texts, times, key = _texts(message), _times(message), message.key
    names = _packed_names(tuple(map(bool, texts)), tuple(map(bool, times)), key is not None)
    values = ["1.0", *filter(None, texts), *map(format_instant, filter(None, times))]
    packed = "\0".join(values).encode()
    if message.headers or message.sequence is not None or packed.count(b"\0") >= len(values) or b"\0" in (key or b""):
        return pack_headers(wire_headers(message))
    return names + packed if key is None else names + packed + b"\0" + key


@lru_cache(maxsize=256)
def _packed_names(texts: tuple[bool, ...], times: tuple[bool, ...], keyed: bool) -> bytes:  # noqa: FBT001
    """All that stands before the values of our own headers, by which of them there are."""
    present = [name for name, there in zip((*_TEXT.values(), *_TIMES.values()), texts + times, strict=True) if there]
    names = ["ce_specversion", *present, *(["ce_partitionkey"] if keyed else [])]
    return _NAMES_FIRST + "\0".join(names).encode() + _END


def from_wire(topic: str, key: bytes | None, headers: Iterable[tuple[str, bytes | None]], payload: bytes) -> Message:
    """Reads a message from what a broker delivered. Foreign messages are welcome: missing attributes stay empty.

    Raises:
        DecodeError: an attribute of ours holds bytes that are not text, a time or a number.
    """
    seen: dict[str, bytes] = {}
    others: list[tuple[str, bytes]] = []
    for raw_name, value in headers:
        name = _canonical(raw_name)
        if name in _DERIVED and name not in seen:
            seen[name] = value or b""
        elif name not in _DERIVED:
            others.append((name, value or b""))
    times = {field: _instant(name, seen.get(name)) for field, name in _TIMES.items()}
    return Message(
        topic=topic,
        key=key,
        payload=payload,
        headers=tuple(others),
        sequence=_sequence(seen.get(_SEQUENCE)),
        **{field: _text(name, seen.get(name, b"")) for field, name in _TEXT.items()},  # type: ignore[arg-type]
        **times,  # type: ignore[arg-type]
    )


def _sequence_of(position: int) -> bytes:
    """Zero-padded: CloudEvents orders sequences as text."""
    return b"%020d" % position  # 20 digits hold every 64-bit position


def outgoing_headers(row: Row) -> list[tuple[str, bytes]]:
    """The wire headers of a stored row: those frozen at capture, and the two that only the database knew.

    Raises:
        DecodeError: they were packed by somebody else, or cut short.
    """
    return list(zip(*outgoing_columns(row), strict=True))


def outgoing_columns(row: Row) -> tuple[tuple[str, ...], list[bytes]]:
    """The same as names and values: rows of one kind have equal names, so what follows from them is worked out once.

    Raises:
        DecodeError: they were packed by somebody else, or cut short.
    """
    if row.headers[:1] == _NAMES_FIRST:
        packed, _, rest = row.headers.partition(_END)
        names, values = _outgoing_names(packed), rest.split(b"\0")
    else:
        headers = unpack_headers(row.headers)
        names = (*(name for name, _ in headers), _SEQUENCE, _RECORDED)
        values = [value for _, value in headers]
    seconds, microseconds = divmod(row.recorded_us, 1_000_000)
    values += (_sequence_of(row.position), b"%b.%06dZ" % (_second(seconds), microseconds))
    if len(names) != len(values):
        raise DecodeError("the headers are not packed as outboxkit packs them")
    return names, values


@lru_cache(maxsize=64)
def _second(seconds: int) -> bytes:
    """The beginning of an RFC 3339 time: messages of a batch were recorded within few seconds."""
    return (_EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%S").encode()


def format_instant(instant: datetime) -> str:
    """RFC 3339 in UTC with microseconds: ``2026-11-24T08:30:00.000000Z``."""
    utc = instant if instant.tzinfo is UTC else instant.astimezone(UTC)
    return utc.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def pack_headers(headers: Headers) -> bytes:
    """Headers as one value of a column.

    A relay unpacks every message it publishes, so the usual form is read by two calls: all names, split by NUL, then
    two NULs, then all values, split by NUL. Names repeat from message to message and are decoded once. Headers that
    hold a NUL themselves are written with lengths (big endian). A writer in SQL splits pairs by NUL. The first byte
    tells which form it is.
    """
    names = [name.encode() for name, _ in headers]
    values = [value for _, value in headers]
    if not names or b"" in names or b"\0" in b"".join(names + values):
        parts = [part for pair in zip(names, values, strict=True) for part in pair]
        return _LENGTHS + b"".join([struct.pack(">I", len(part)) + part for part in parts])
    return _NAMES_FIRST + b"\0".join(names) + _END + b"\0".join(values)


def unpack_headers(data: bytes) -> list[tuple[str, bytes]]:
    """The inverse of `pack_headers`.

    Raises:
        DecodeError: they were packed by somebody else, or cut short.
    """
    try:
        if data[:1] == _NAMES_FIRST:
            names, _, values = data.partition(_END)
            return list(zip(_names(names), values.split(b"\0"), strict=True))
        parts = _by_pairs(data) if data[:1] == _PAIRS else _by_lengths(data)
        return [(name.decode(), value) for name, value in zip(parts[::2], parts[1::2], strict=True)]
    except (ValueError, struct.error) as error:
        raise DecodeError("the headers are not packed as outboxkit packs them") from error


def are_packed(data: bytes) -> bool:
    """Whether `unpack_headers` can read them: quick, because a relay asks it of every message."""
    if data[:1] == _NAMES_FIRST:
        names, end, values = data.partition(_END)
        try:
            return bool(end) and len(_names(names)) == values.count(b"\0") + 1
        except ValueError:
            return False
    try:
        unpack_headers(data)
    except DecodeError:
        return False
    return True


@lru_cache(maxsize=256)
def _outgoing_names(packed: bytes) -> tuple[str, ...]:
    try:
        return (*_names(packed), _SEQUENCE, _RECORDED)
    except ValueError as error:
        raise DecodeError("the headers are not packed as outboxkit packs them") from error


@lru_cache(maxsize=256)
def _names(packed: bytes) -> tuple[str, ...]:
    return tuple(packed[1:].decode().split("\0"))


def _by_pairs(data: bytes) -> list[bytes]:
    form, *parts = data.split(b"\0")
    if form != _PAIRS:
        raise ValueError("no form of ours")
    return parts


def _by_lengths(data: bytes) -> list[bytes]:
    if data and data[:1] != _LENGTHS:
        raise ValueError("no form of ours")
    parts, at = [], 1
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        parts.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at > max(1, len(data)):
        raise ValueError("cut short")
    return parts


def check_limits(message: Message, limits: MessageLimits) -> None:
    """Refuses a message that some broker would refuse later.

    Raises:
        EncodeError: says which bound, its value, and the size found.
    """
    key = message.key or b""
    if len(message.payload) <= limits.payload and len(key) <= limits.key and not message.headers:
        return  # as a rule
    _bound(message, "payload", len(message.payload), limits.payload)
    _bound(message, "key", len(key), limits.key)
    _bound(message, "number of headers", len(message.headers), limits.header_count)
    size = sum(len(name) + len(value) for name, value in message.headers)
    _bound(message, "headers", size, limits.header_bytes)


def is_reserved(name: str) -> bool:
    """True if the library itself writes headers of this name, in any spelling: then no application may."""
    lower = name.lower()
    return lower.startswith(RESERVED_PREFIXES) or lower == CONTENT_TYPE


def _bound(message: Message, what: str, found: int, limit: int) -> None:
    if found > limit:
        raise EncodeError(
            f"{message.type}: the {what} has a size of {found:,}, at most {limit:,} is allowed; "
            "send a reference to the data, or raise the limit where the broker allows more",
        )


def _canonical(name: str) -> str:
    for prefix in _FOREIGN_PREFIXES:
        if name.startswith(prefix):
            return "ce_" + name[len(prefix) :]
    return name


def _text(name: str, value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the header {name} is not UTF-8", path=name, offset=error.start) from error


def _instant(name: str, value: bytes | None) -> datetime | None:
    if not value:
        return None
    try:
        instant = datetime.fromisoformat(_text(name, value))
    except ValueError as error:
        raise DecodeError(f"the header {name} is not an RFC 3339 time", path=name) from error
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _sequence(value: bytes | None) -> int | None:
    # Foreign producers may use any text as a sequence: only numbers are positions.
    return int(value) if value and value.isdigit() and len(value) <= _SEQUENCE_DIGITS else None
