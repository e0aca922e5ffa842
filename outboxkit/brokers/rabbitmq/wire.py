"""Writes a row as AMQP frames. Pure.

Frames are written by hand: through the client's own encoder a message costs ten times as much. Header names are the
CloudEvents AMQP spelling on the wire (``cloudEvents:id``) and ours inside (``ce_id``).
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import CONTENT_ENCODING, REPLY_TO
from outboxkit.headers import CONTENT_TYPE, outgoing_headers
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outboxkit.rows import Row

__all__ = ["SEQUENCE", "Unsendable", "publish_frames"]

SEQUENCE: Final = "ce_sequence"  #: the header by which a returned message is found

_OURS: Final = "ce_"
_AMQP: Final = "cloudEvents:"
_SHORT: Final = 255  # bytes of an AMQP short string
_PERSISTENT: Final = b"\x02"
_NOTHING: Final = (b"",)
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


def _content_header(row: Row) -> bytes:
    grouped: dict[str, list[bytes]] = {}
    for name, value in outgoing_headers(row):
        grouped.setdefault(name, []).append(value)
    content_type = _property(grouped, CONTENT_TYPE)
    if content_type:
        del grouped[CONTENT_TYPE]  # the property says it
    table = b"".join([_entry(name, values) for name, values in grouped.items()])
    fields = (  # bit of the property flags, value; in the order of the specification
        (1 << 15, content_type),
        (1 << 14, _property(grouped, CONTENT_ENCODING)),
        (1 << 13, struct.pack(">I", len(table)) + table),
        (1 << 12, _PERSISTENT),
        (1 << 10, _property(grouped, "ce_correlationid")),
        (1 << 9, _property(grouped, REPLY_TO)),
        (1 << 7, _property(grouped, "ce_id")),
        (1 << 6, struct.pack(">Q", row.recorded_us // 1_000_000)),
        (1 << 5, _property(grouped, "ce_type")),
        (1 << 3, _property(grouped, "ce_source")),
    )
    flags = sum(bit for bit, value in fields if value)
    return struct.pack(">HHQH", 60, 0, len(row.payload), flags) + b"".join([value for _, value in fields])


def _property(grouped: Mapping[str, list[bytes]], name: str) -> bytes:
    """A property that repeats a header, empty when there is none or it does not fit: the header carries it anyway."""
    value = grouped.get(name, _NOTHING)[0]
    return bytes((len(value),)) + value if 0 < len(value) <= _SHORT and _is_text(value) else b""


def _entry(name: str, values: list[bytes]) -> bytes:
    # A table cannot hold a name twice: what clients read is a dictionary. Repeated headers travel as an array.
    if len(values) == 1:
        return _wire_name(name) + _value(values[0])
    array = b"".join([_value(value) for value in values])
    return _wire_name(name) + b"A" + struct.pack(">I", len(array)) + array


@lru_cache(maxsize=4096)
def _wire_name(name: str) -> bytes:
    return _short(_AMQP + name[len(_OURS) :] if name.startswith(_OURS) else name)


def _value(value: bytes) -> bytes:
    return (b"S" if _is_text(value) else b"x") + struct.pack(">I", len(value)) + value


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
