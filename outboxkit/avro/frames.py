"""Frames, by which a message names its writer's schema: reads every one in use, writes the configured one.

* Confluent: ``00`` and a 4-byte big-endian id, or ``01`` and a 16-byte GUID, before the body; or the same bytes in the
  record header ``__value_schema_id`` (``__key_schema_id`` for keys) with a bare body.
* Avro single object encoding: ``c3 01``, the CRC-64-AVRO fingerprint (little endian), the body.
* outboxkit: header ``outboxkit-schema`` with the fingerprint as 16 hex digits, and a bare body.

A topic that says which frame it uses is read with ``pinned`` and nothing is guessed.

Confluent's serializers write a schema that is nothing but ``bytes`` raw, without Avro's length: `body_of` and
`framed_body` do the same in Confluent frames, and nowhere else.
"""

# ruff: noqa: PLR2004  the numbers are those of the wire formats

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, NoReturn, Protocol, TypeVar
from uuid import UUID

from outboxkit.avro.binary.json_values import write_long
from outboxkit.avro.model.nodes import Primitive, Schema
from outboxkit.errors import DecodeError, EncodeError

__all__ = [
    "FRAMED",
    "SCHEMA_HEADER",
    "Carrier",
    "Frame",
    "FrameKind",
    "body_of",
    "frame_of",
    "framed_body",
    "name_of",
    "read_frame",
    "write_frame",
]

SCHEMA_HEADER: Final = "outboxkit-schema"
FRAMED: Final = "; frame="  # in the content type of a framed body, whose fingerprint travels in the header as well
_CONFLUENT_HEADERS: Final = {"value": "__value_schema_id", "key": "__key_schema_id"}
_SINGLE_OBJECT: Final = b"\xc3\x01"

Headers = Mapping[str, bytes] | Iterable[tuple[str, bytes | None]]
_T = TypeVar("_T")
Part = Literal["value", "key"]


class Carrier(Protocol):
    """A carrier of a frame: any message with a body, headers, a content type and, where it has one, a fingerprint."""

    @property
    def payload(self) -> bytes: ...

    @property
    def headers(self) -> Iterable[tuple[str, bytes]]: ...

    @property
    def content_type(self) -> str: ...

    @property
    def schema(self) -> str: ...


class FrameKind(Enum):
    """Place and form in which the schema is named."""

    CONFLUENT_ID = "confluent-id"
    CONFLUENT_GUID = "confluent-guid"
    CONFLUENT_ID_HEADER = "confluent-id-header"
    CONFLUENT_GUID_HEADER = "confluent-guid-header"
    SINGLE_OBJECT = "single-object"
    FINGERPRINT_HEADER = "fingerprint-header"
    BARE = "bare"


_CONFLUENT: Final = frozenset({
    FrameKind.CONFLUENT_ID,
    FrameKind.CONFLUENT_GUID,
    FrameKind.CONFLUENT_ID_HEADER,
    FrameKind.CONFLUENT_GUID_HEADER,
})
_PREFIXES: Final = frozenset({FrameKind.CONFLUENT_ID, FrameKind.CONFLUENT_GUID, FrameKind.SINGLE_OBJECT})
_TOLD: Final = {kind.value: kind for kind in _PREFIXES}
_HEADERS: Final = frozenset(set(FrameKind) - _PREFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A message taken apart; at most one of `schema_id`, `guid` and `fingerprint` is set.

    Attributes:
        kind: how the schema was named.
        payload: the Avro body alone.
        offset: where the body begins in the message.
        schema_id: the registry's number.
        guid: the registry's GUID.
        fingerprint: CRC-64-AVRO, 8 bytes in wire order.
    """

    kind: FrameKind
    payload: bytes
    offset: int = 0
    schema_id: int | None = None
    guid: UUID | None = None
    fingerprint: bytes | None = None


def read_frame(data: bytes, headers: Headers = (), *, pinned: FrameKind | None = None, part: Part = "value") -> Frame:
    """Takes a message apart.

    Headers win over prefixes, as in Confluent's own deserializer. With `pinned` only that place is looked at; without
    it an unframed message is refused. ``pinned=FrameKind.BARE`` returns it whole.

    Raises:
        DecodeError: no frame, an incomplete one, or another one than `pinned`.
    """
    if pinned is FrameKind.BARE:
        return Frame(kind=FrameKind.BARE, payload=data)
    frame = None if pinned in _PREFIXES else _from_headers(data, dict(headers), part)
    if frame is None and pinned not in _HEADERS:
        frame = _from_prefix(data)
    if frame is None:
        _refuse(f"no schema is named: the message has {_start(data)} and no schema header")
    if pinned is not None and frame.kind is not pinned:
        _refuse(f"this topic is pinned to {pinned.value} frames, the message is {frame.kind.value}")
    return frame


def write_frame(
    kind: FrameKind,
    payload: bytes,
    *,
    schema_id: int | None = None,
    guid: UUID | None = None,
    fingerprint: bytes | None = None,
    part: Part = "value",
) -> tuple[bytes, tuple[tuple[str, bytes], ...]]:
    """Returns the message bytes and the headers to add.

    Raises:
        EncodeError: the name that this kind of frame needs (id, GUID or fingerprint) was not given.
    """
    if kind is FrameKind.BARE:
        return payload, ()
    if kind in (FrameKind.CONFLUENT_ID, FrameKind.CONFLUENT_ID_HEADER):
        prefix = b"\x00" + _id_bytes(schema_id)
    elif kind in (FrameKind.CONFLUENT_GUID, FrameKind.CONFLUENT_GUID_HEADER):
        prefix = b"\x01" + _given(guid, kind).bytes
    else:
        prefix = _fingerprint_bytes(_given(fingerprint, kind))
    if kind is FrameKind.SINGLE_OBJECT:
        return _SINGLE_OBJECT + prefix + payload, ()
    if kind is FrameKind.FINGERPRINT_HEADER:
        return payload, ((SCHEMA_HEADER, prefix.hex().encode()),)
    if kind in (FrameKind.CONFLUENT_ID_HEADER, FrameKind.CONFLUENT_GUID_HEADER):
        return payload, ((_CONFLUENT_HEADERS[part], prefix),)
    return prefix + payload, ()


def body_of(frame: Frame, writer: Schema) -> bytes:
    """The Avro body of a message, with the length that Confluent frames leave out before top-level bytes."""
    return write_long(len(frame.payload)) + frame.payload if _is_raw(frame.kind, writer) else frame.payload


def framed_body(kind: FrameKind, body: bytes, writer: Schema) -> bytes:
    """Puts a body into its frame: the reverse of `body_of`."""
    if not _is_raw(kind, writer):
        return body
    end = next(at for at, byte in enumerate(body, 1) if byte < 0x80)
    return body[end:]


def frame_of(message: Carrier, part: Part = "value") -> Frame:
    """Takes a message apart: as its content type says, where it does, else by its headers and then by its prefix.

    Raises:
        DecodeError: it names no schema, or not completely.
    """
    _, _, told = message.content_type.partition(FRAMED)
    if told in _TOLD:
        return read_frame(message.payload, message.headers, pinned=_TOLD[told], part=part)
    headers: list[tuple[str, bytes | None]] = [*message.headers]
    if message.schema:
        headers.append((SCHEMA_HEADER, message.schema.encode()))
    return read_frame(message.payload, headers, part=part)


def name_of(frame: Frame) -> str:
    """The name under which a registry knows the schema of a frame: fingerprint, id or GUID."""
    if frame.fingerprint is not None:
        return frame.fingerprint.hex()
    return str(frame.schema_id if frame.guid is None else frame.guid)


def _is_raw(kind: FrameKind, writer: Schema) -> bool:
    return kind in _CONFLUENT and isinstance(writer.root, Primitive) and writer.root.type == "bytes"


def _from_headers(data: bytes, headers: Mapping[str, bytes | None], part: Part) -> Frame | None:
    name = _CONFLUENT_HEADERS[part]
    confluent = headers.get(name)
    if confluent is not None:
        if len(confluent) == 5 and confluent[0] == 0:
            number = _known_id(int.from_bytes(confluent[1:], "big"))
            return Frame(kind=FrameKind.CONFLUENT_ID_HEADER, payload=data, schema_id=number)
        if len(confluent) == 17 and confluent[0] == 1:
            return Frame(kind=FrameKind.CONFLUENT_GUID_HEADER, payload=data, guid=UUID(bytes=confluent[1:]))
        _refuse(f"the header {name} is neither 00 and 4 bytes nor 01 and 16 bytes")
    ours = headers.get(SCHEMA_HEADER) if part == "value" else None
    if ours is None:
        return None
    try:
        digest = bytes.fromhex(ours.decode("ascii")) if len(ours) == 16 else b""
    except ValueError:
        digest = b""
    if len(digest) != 8:
        _refuse(f"the header {SCHEMA_HEADER} is not 16 hex digits")
    return Frame(kind=FrameKind.FINGERPRINT_HEADER, payload=data, fingerprint=digest)


def _from_prefix(data: bytes) -> Frame | None:
    if data[:1] == b"\x00":
        _long_enough(data, 5, "a Confluent id frame")
        number = _known_id(int.from_bytes(data[1:5], "big"))
        return Frame(kind=FrameKind.CONFLUENT_ID, payload=data[5:], offset=5, schema_id=number)
    if data[:1] == b"\x01":
        _long_enough(data, 17, "a Confluent GUID frame")
        return Frame(kind=FrameKind.CONFLUENT_GUID, payload=data[17:], offset=17, guid=UUID(bytes=data[1:17]))
    if data[:2] == _SINGLE_OBJECT:
        _long_enough(data, 10, "an Avro single object")
        return Frame(kind=FrameKind.SINGLE_OBJECT, payload=data[10:], offset=10, fingerprint=data[2:10])
    return None


def _known_id(number: int) -> int:
    # Registries count from 1 in a signed 32-bit number; 0 and "negative" ids are damage or an attack.
    if not 0 < number < 2**31:
        _refuse(f"{number} is not a schema id (1 to 2^31-1)")
    return number


def _long_enough(data: bytes, size: int, what: str) -> None:
    if len(data) < size:
        raise DecodeError(f"{what} has at least {size} bytes, this message has {len(data)}", offset=len(data))


def _start(data: bytes) -> str:
    return f"the first bytes {data[:2].hex(' ')}" if data else "no bytes"


def _refuse(why: str) -> NoReturn:
    raise DecodeError(why, offset=0)


def _id_bytes(schema_id: int | None) -> bytes:
    if schema_id is None or not 0 < schema_id < 2**31:
        raise EncodeError(f"a Confluent id frame needs a schema id from 1 to 2^31-1, not {schema_id}")
    return schema_id.to_bytes(4, "big")


def _given(value: _T | None, kind: FrameKind) -> _T:
    if value is None:
        raise EncodeError(f"a {kind.value} frame needs its GUID or fingerprint")
    return value


def _fingerprint_bytes(value: bytes) -> bytes:
    if len(value) != 8:
        raise EncodeError(f"a CRC-64-AVRO fingerprint has 8 bytes, not {len(value)}")
    return value
