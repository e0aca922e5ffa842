"""Writes a row as AMQP frames. Pure.

Frames are written by hand: through the client's own encoder a message costs ten times as much. Header names are the
CloudEvents AMQP spelling on the wire (``cloudEvents:id``) and ours inside (``ce_id``).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

from outboxkit.brokers import CONTENT_ENCODING, REPLY_TO
from outboxkit.headers import CONTENT_TYPE, outgoing_columns
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.rows import Row

__all__ = ["SEQUENCE", "Unsendable", "publish_frames"]

SEQUENCE: Final = "ce_sequence"  #: the header by which a returned message is found

_OURS: Final = "ce_"
_AMQP: Final = "cloudEvents:"
_SHORT: Final = 255  # bytes of an AMQP short string
_PERSISTENT: Final = b"\x02"
_CONTENT: Final = struct.Struct(">HHQH")
_TIMESTAMP: Final = struct.Struct(">Q")
_size: Final = struct.Struct(">I").pack
# Headers that AMQP has properties for, in the order of the specification.
_PROPERTIES: Final = (
    CONTENT_TYPE,
    CONTENT_ENCODING,
    "ce_correlationid",
    REPLY_TO,
    "ce_id",
    "ce_type",
    "ce_source",
)
_FRAME_END: Final = b"\xce"
_FRAME_OVERHEAD: Final = 8


class Unsendable(Exception):
    """AMQP has no room for this message."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


def publish_frames(row: Row, channel: int, frame_max: int) -> bytes:
    """Basic.Publish with header and body, mandatory and persistent.

    Raises:
        Unsendable: a name is too long for AMQP, or the headers do not fit into one frame.
    """
    header = _content_header(row)
    if len(header) + _FRAME_OVERHEAD > frame_max:
        raise Unsendable(Failure.TOO_LARGE, f"its headers have {len(header):,} bytes, at most {frame_max:,} fit")
    payload = row.payload
    parts = [_method(row.topic, row.type, row.kind, channel), _frame(2, channel, header)]
    room = frame_max - _FRAME_OVERHEAD
    parts += [_frame(3, channel, payload[at : at + room]) for at in range(0, len(payload), room)]
    return b"".join(parts)


@lru_cache(maxsize=4096)
def _method(topic: str, message_type: str, kind: str, channel: int) -> bytes:
    command = kind == Kind.COMMAND
    exchange, routing_key = ("", topic) if command else (topic, message_type)
    mandatory = 1
    body = struct.pack(">HHH", 60, 40, 0) + _short(exchange) + _short(routing_key) + bytes((mandatory,))
    return _frame(1, channel, body)


class _Plan(NamedTuple):
    """Layout of a content header, as far as it follows from the names of the headers alone.

    Attributes:
        places: the index of the header behind each of `_PROPERTIES`, None where there is none.
        entries: of the table: the name with the type of a text, with the type of bytes, with the type of an array; and
            the indexes of its values.
    """

    places: tuple[int | None, ...]
    entries: tuple[tuple[bytes, bytes, bytes, tuple[int, ...]], ...]


@lru_cache(maxsize=1024)
def _plan(names: tuple[str, ...]) -> _Plan:
    grouped: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        grouped.setdefault(name, []).append(index)
    places = tuple(grouped.get(name, (None,))[0] for name in _PROPERTIES)
    wired = [(_wire_name(name), tuple(indexes)) for name, indexes in grouped.items()]
    return _Plan(places, tuple((name + b"S", name + b"x", name + b"A", indexes) for name, indexes in wired))


def _content_header(row: Row) -> bytes:
    names, values = outgoing_columns(row)
    plan = _plan(names)
    content_type, encoding, correlation, reply_to, message_id, kind, source = [
        b"" if place is None else _property(values[place]) for place in plan.places
    ]
    table = _table(plan, values, plan.places[0] if content_type else None)
    fields = (  # bit of the property flags, value; in the order of the specification
        (1 << 15, content_type),
        (1 << 14, encoding),
        (1 << 13, _size(len(table)) + table),
        (1 << 12, _PERSISTENT),
        (1 << 10, correlation),
        (1 << 9, reply_to),
        (1 << 7, message_id),
        (1 << 6, _TIMESTAMP.pack(row.recorded_us // 1_000_000)),
        (1 << 5, kind),
        (1 << 3, source),
    )
    flags = sum(bit for bit, value in fields if value)
    return _CONTENT.pack(60, 0, len(row.payload), flags) + b"".join([value for _, value in fields])


def _table(plan: _Plan, values: list[bytes], said: int | None) -> bytes:
    """All headers but the one that a property says."""
    parts: list[bytes] = []
    for text, raw, array, indexes in plan.entries:
        if len(indexes) > 1:  # a table cannot hold a name twice: what clients read is a dictionary
            value = b"".join([_value(values[index]) for index in indexes])
            parts += (array, _size(len(value)), value)
        elif indexes[0] != said:
            value = values[indexes[0]]
            parts += (text if value.isascii() or _is_text(value) else raw, _size(len(value)), value)
    return b"".join(parts)


def _property(value: bytes) -> bytes:
    """A property that repeats a header, empty when it does not fit: the header carries it anyway."""
    return bytes((len(value),)) + value if 0 < len(value) <= _SHORT and _is_text(value) else b""


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> bytes:
    return _short(_AMQP + name[len(_OURS) :] if name.startswith(_OURS) else name)


def _value(value: bytes) -> bytes:
    return (b"S" if _is_text(value) else b"x") + _size(len(value)) + value


def _is_text(value: bytes) -> bool:
    if value.isascii():
        return True
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _short(text: str) -> bytes:
    raw = text.encode()
    if len(raw) > _SHORT:
        raise Unsendable(Failure.INVALID, f"{text[:40]!r}… has {len(raw)} bytes, AMQP names have at most {_SHORT}")
    return bytes((len(raw),)) + raw


def _frame(kind: int, channel: int, body: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(body)) + body + _FRAME_END
