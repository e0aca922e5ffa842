"""Turns a JSON value into Avro bytes: defaults (bare union values) and examples (tagged ones).

Sources: Avro specification 1.12, "Binary Encoding", "JSON Encoding" and, for defaults, "Complex Types".
"""

# ruff: noqa: PLR2004  the numbers are those of the wire format

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from outboxkit.avro.compatibility.examples import branch_name
from outboxkit.avro.model.defaults import default_fault
from outboxkit.avro.model.nodes import ABSENT, Array, Enum, Fixed, Map, Node, Record, Ref, Schema, Union
from outboxkit.errors import EncodeError

__all__ = ["encode_default", "encode_json", "write_long"]

_SPECIAL: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def encode_json(schema: Schema, value: object) -> bytes:
    """Encodes a value in Avro JSON encoding: a union is null or ``{"branch": value}``.

    Raises:
        EncodeError: the value does not fit the schema.
    """
    return _guarded(schema, schema.root, value, tagged=True)


def encode_default(schema: Schema, node: Node, value: object) -> bytes:
    """Encodes the default of a field: a union value stands alone, record defaults may leave out defaulted fields."""
    return _guarded(schema, node, value, tagged=False)


def write_long(value: int) -> bytes:
    """Returns the zigzag varint of a number of 64 bits."""
    rest = (value << 1) ^ (value >> 63)
    made = bytearray()
    while rest > 0x7F:
        made.append(rest & 0x7F | 0x80)
        rest >>= 7
    made.append(rest)
    return bytes(made)


def _guarded(schema: Schema, node: Node, value: object, *, tagged: bool) -> bytes:
    try:
        return _encode(schema, node, value, tagged=tagged)
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError, AttributeError, struct.error) as error:
        raise EncodeError(f"the value does not fit the schema ({type(error).__name__}: {error})") from error


# The value is any JSON value: a wrong one fails in the operation that it does not support, and `_guarded` says so.
def _encode(schema: Schema, node: Node, value: Any, *, tagged: bool) -> bytes:
    if isinstance(node, Ref):
        node = schema.names[node.name]
    if isinstance(node, Record):
        parts = (_encode(schema, one.node, _given(value, one.name, one.default), tagged=tagged) for one in node.fields)
        return b"".join(parts)
    if isinstance(node, Union):
        return _union(schema, node, value, tagged=tagged)
    if isinstance(node, Array):
        items = [_encode(schema, node.items, one, tagged=tagged) for one in value]
        return (write_long(len(items)) + b"".join(items) if items else b"") + b"\x00"
    if isinstance(node, Map):
        entries = [_text(key) + _encode(schema, node.values, one, tagged=tagged) for key, one in value.items()]
        return (write_long(len(entries)) + b"".join(entries) if entries else b"") + b"\x00"
    if isinstance(node, Enum):
        return write_long(node.symbols.index(value))
    if isinstance(node, Fixed):
        return _fixed(value, node.size)
    return _primitive(node.type, value)


def _given(value: Mapping[str, object], name: str, default: object) -> object:
    if default is ABSENT:
        return value[name]
    return value.get(name, default)


def _union(schema: Schema, node: Union, value: Any, *, tagged: bool) -> bytes:
    if not tagged:
        index = [default_fault(schema.names, branch, value) is None for branch in node.branches].index(True)
        return write_long(index) + _encode(schema, node.branches[index], value, tagged=tagged)
    name = "null" if value is None else next(iter(value))
    index = [branch_name(schema, branch) for branch in node.branches].index(name)
    return write_long(index) + _encode(
        schema, node.branches[index], None if value is None else value[name], tagged=tagged
    )


def _text(value: str) -> bytes:
    data = value.encode()
    return write_long(len(data)) + data


def _fixed(value: str, size: int) -> bytes:
    data = value.encode("latin-1")
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes for a fixed of {size}")
    return data


def _primitive(kind: str, value: Any) -> bytes:
    if kind == "null":
        return b""
    if kind == "boolean":
        return b"\x01" if value else b"\x00"
    if kind in ("int", "long"):
        return write_long(int(value))
    if kind in ("float", "double"):
        return struct.pack("<f" if kind == "float" else "<d", _SPECIAL.get(value, value))
    if kind == "bytes":
        return write_long(len(value)) + bytes(value, "latin-1")
    return _text(value)
