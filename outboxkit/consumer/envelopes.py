"""Envelopes: what wraps a payload. Content encodings, and CloudEvents in structured mode. Pure.

A structured event is turned into the binary mode that everything else reads: attributes become ``ce_`` headers, the
data becomes the payload, byte for byte as it stood in the envelope. Unpacking is bounded: a small message may be a
bomb.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import TYPE_CHECKING, Any, Final

from outboxkit.errors import DecodeError
from outboxkit.headers import CONTENT_TYPE

if TYPE_CHECKING:
    from outboxkit.brokers import Delivery
    from outboxkit.message import Headers

__all__ = ["MAX_UNPACKED", "is_structured", "unpacked", "unwrap"]

# --- content encodings -------------------------------------------------------------------------------------------

MAX_UNPACKED: Final = 16 * 1024 * 1024  #: bytes of a payload that was packed
_ENCODING: Final = "content-encoding"
_NOT_PACKED: Final = ("", "identity", "utf-8")
_WINDOWS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}  # zlib's way to name the container


def unpacked(delivery: Delivery) -> bytes:
    """Returns the payload as its producer encoded it.

    Raises:
        DecodeError: an encoding that is not read here, broken data, or more than `MAX_UNPACKED` bytes.
    """
    payload = delivery.payload or b""
    given = next((value for name, value in delivery.headers if name.lower() == _ENCODING), b"") or b""
    encoding = (delivery.content_encoding or given.decode("ascii", "replace")).strip().lower()
    if encoding in _NOT_PACKED or not payload:
        return payload
    if encoding not in _WINDOWS:
        known = ", ".join(_WINDOWS)
        raise DecodeError(f"the payload is packed as {encoding[:40]!r}; only {known} are read here")
    return _inflated(payload, encoding)


def _inflated(payload: bytes, encoding: str) -> bytes:
    machine = zlib.decompressobj(_WINDOWS[encoding])
    try:
        found = machine.decompress(payload, MAX_UNPACKED)
    except zlib.error as error:
        raise DecodeError(f"the payload is not {encoding}, as its content encoding says") from error
    if machine.unconsumed_tail:
        raise DecodeError(f"the payload unpacks to more than {MAX_UNPACKED:,} bytes")
    if not machine.eof:
        raise DecodeError(f"the payload ends in the middle of its {encoding} data")
    return found


# --- structured mode ---------------------------------------------------------------------------------------------

_PREFIX: Final = "application/cloudevents"
_JSON: Final = "application/cloudevents+json"
_BLANK: Final = " \t\r\n"
_decoder: Final = json.JSONDecoder()


def is_structured(headers: Headers) -> bool:
    """True if the payload is an envelope."""
    return _content_type(headers).startswith(_PREFIX)


def unwrap(headers: Headers, payload: bytes) -> tuple[Headers, bytes]:
    """Returns the headers and the payload that the same event has in binary mode.

    Raises:
        DecodeError: another format than JSON, a batch, or not an envelope.
    """
    kind = _content_type(headers).partition(";")[0].strip()
    if kind != _JSON:
        raise DecodeError(
            f"a CloudEvent in structured mode as {kind}: only {_JSON} can be read; let the producer use binary mode"
        )
    members = _members(payload)
    data = _data(members)
    attributes = {name: value for name, (value, _) in members.items() if name not in ("data", "data_base64")}
    told = str(attributes.pop("datacontenttype", "application/json"))
    ours = [(f"ce_{name}", _text(value).encode()) for name, value in attributes.items() if value is not None]
    rest = [(name, value) for name, value in headers if name.lower() != CONTENT_TYPE]
    return ((CONTENT_TYPE, told.encode()), *ours, *rest), data


def _content_type(headers: Headers) -> str:
    found = (value for name, value in headers if name.lower() == CONTENT_TYPE)
    return next(found, b"").decode("ascii", "replace").lower()


def _members(payload: bytes) -> dict[str, tuple[Any, str]]:
    """The members of a JSON object: each with its value and its text."""
    try:
        text = payload.decode("utf-8-sig")
        at, members = _skip(text, 0, "{"), {}
        while text[at] != "}":
            name, after = _decoder.raw_decode(text, at)
            start = _skip(text, after, ":")
            value, end = _decoder.raw_decode(text, start)
            members[str(name)] = (value, text[start:end])
            at = _skip(text, end, "," if text[_blank(text, end)] == "," else "")
    except (UnicodeDecodeError, ValueError, IndexError, RecursionError) as error:
        raise DecodeError("a CloudEvent in structured mode whose envelope is not a JSON object") from error
    return members


def _skip(text: str, at: int, expected: str) -> int:
    at = _blank(text, at)
    if not text.startswith(expected, at):
        raise ValueError(expected)
    return _blank(text, at + len(expected))


def _blank(text: str, at: int) -> int:
    while text[at] in _BLANK:
        at += 1
    return at


def _data(members: dict[str, tuple[Any, str]]) -> bytes:
    if "data_base64" in members:
        try:
            return base64.b64decode(str(members["data_base64"][0]), validate=True)
        except (binascii.Error, ValueError) as error:
            raise DecodeError("a CloudEvent in structured mode whose data_base64 is not base64") from error
    value, text = members.get("data", (None, ""))
    told = str(members.get("datacontenttype", ("json", ""))[0])
    return value.encode() if isinstance(value, str) and "json" not in told else text.encode()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
