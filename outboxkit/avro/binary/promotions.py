"""Promotes plain values: the changes of a primitive type that Avro 1.12 allows and a decoder library may get wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from outboxkit.errors import DecodeError

__all__ = ["PROMOTIONS", "Unreadable"]


class Unreadable(DecodeError):
    """A value that this reader cannot take; the path grows while it travels up."""


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"bytes are read as text, but are not UTF-8 (at byte {error.start})") from None


def _float32(value: float) -> float:
    # A reader of float sees 32 bits; the decoder library would hand over 64.
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


#: (writer's type, reader's type) -> what turns the value.
PROMOTIONS: Final[Mapping[tuple[str, str], Callable[[Any], Any]]] = {
    ("int", "float"): _float32,
    ("int", "double"): float,
    ("long", "float"): _float32,
    ("long", "double"): float,
    ("string", "bytes"): str.encode,
    ("bytes", "string"): _text,
}
