"""Canonical form, fingerprints, and an identity that sees what the canonical form strips.

Sources: Avro specification 1.12, "Parsing Canonical Form for Schemas" and "Schema Fingerprints" (CRC-64-AVRO: seed
0xC15D213AA4D7A795, reflected, 256 entries). A fingerprint says how to read *bytes*; two schemas with one fingerprint
can differ in defaults, aliases and decimal scale. `identity` tells those apart.
"""

from __future__ import annotations

import hashlib
import json
from typing import Final, Literal

from outboxkit.avro.model.nodes import ABSENT, Array, Enum, Fixed, Logical, Map, Node, Record, Ref, Schema, Union

__all__ = ["Algorithm", "canonical_form", "fingerprint", "full_form", "identity", "wire_form", "wire_name"]

Algorithm = Literal["CRC-64-AVRO", "MD5", "SHA-256"]

_SEED: Final = 0xC15D213AA4D7A795
_NO_DIGEST: Final = "the digest is one of CRC-64-AVRO, MD5, SHA-256"


def canonical_form(schema: Schema) -> str:
    """Returns the Parsing Canonical Form: equal texts read and write the same bytes."""
    return json.dumps(_Writer(schema, full=False).node(schema.root), separators=(",", ":"), ensure_ascii=False)


def full_form(schema: Schema) -> object:
    """Returns a JSON value with full names, defaults, aliases and logical types, without docs and unknown keys.

    Every parser understands it, whatever short cuts the original used.
    """
    return _Writer(schema, full=True).node(schema.root)


def wire_form(schema: Schema) -> object:
    """Returns the canonical form as a JSON value, with logical types: all that a decoder of bytes needs.

    Names are those of `wire_name`: inside a namespace, no parser but Avro Java finds a type that has none.
    """
    return _Writer(schema, full=False, wire=True).node(schema.root)


def wire_name(name: str) -> str:
    """Returns a name without namespace for each full name; different names stay different."""
    return name.replace("_", "_u").replace(".", "_d")


def fingerprint(schema: Schema, algorithm: Algorithm = "CRC-64-AVRO") -> bytes:
    """Returns the digest of the canonical form; CRC-64-AVRO in wire order (little endian), as frames carry it.

    ``fingerprint(schema).hex()`` is the 16-digit text used in headers and tables.
    """
    data = canonical_form(schema).encode()
    if algorithm == "CRC-64-AVRO":
        return _crc64(data).to_bytes(8, "little")
    if algorithm == "MD5":
        return hashlib.md5(data, usedforsecurity=False).digest()
    if algorithm == "SHA-256":
        return hashlib.sha256(data).digest()
    raise ValueError(_NO_DIGEST)


def identity(schema: Schema) -> str:
    """Returns a SHA-256 (hex) over the full form: equal only if also defaults, aliases and logical types agree."""
    text = json.dumps(full_form(schema), separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _Writer:
    """Writes each named type once, at its first use, then by name."""

    def __init__(self, schema: Schema, *, full: bool, wire: bool = False) -> None:
        self.schema = schema
        self.full = full
        self.wire = wire
        self.written: set[str] = set()

    def node(self, node: Node) -> object:
        if isinstance(node, Ref):
            if node.name in self.written:
                return wire_name(node.name) if self.wire else node.name
            node = self.schema.names[node.name]
        if isinstance(node, Record | Enum | Fixed):
            return self._named(node)
        if isinstance(node, Union):
            return [self.node(branch) for branch in node.branches]
        if isinstance(node, Array):
            return {"type": "array", "items": self.node(node.items)}
        if isinstance(node, Map):
            return {"type": "map", "values": self.node(node.values)}
        logical = self._logical(node.logical)
        return {"type": node.type, **logical} if logical else node.type

    def _named(self, node: Record | Enum | Fixed) -> dict[str, object]:
        # A type may be used inside its own definition: the name counts as written before its parts are.
        self.written.add(node.name)
        head: dict[str, object] = {"name": wire_name(node.name) if self.wire else node.name, "type": node.type}
        if self.full and "." not in node.name:
            head["namespace"] = ""
        if isinstance(node, Record):
            if self.full and node.error:
                head["type"] = "error"
            head["fields"] = [self._field(node, index) for index in range(len(node.fields))]
        elif isinstance(node, Enum):
            head["symbols"] = list(node.symbols)
            if self.full and node.default is not None:
                head["default"] = node.default
        else:
            head |= {"size": node.size, **self._logical(node.logical)}
        if self.full and node.aliases:
            head["aliases"] = list(node.aliases)
        return head

    def _field(self, record: Record, index: int) -> dict[str, object]:
        one = record.fields[index]
        made: dict[str, object] = {"name": one.name, "type": self.node(one.node)}
        if self.full and one.default is not ABSENT:
            made["default"] = one.default
        if self.full and one.aliases:
            made["aliases"] = list(one.aliases)
        if self.full and one.order != "ascending":
            made["order"] = one.order
        return made

    def _logical(self, logical: Logical | None) -> dict[str, object]:
        if not (self.full or self.wire) or logical is None:
            return {}
        made: dict[str, object] = {"logicalType": logical.name}
        return made | {"precision": logical.precision, "scale": logical.scale} if logical.name == "decimal" else made


def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (_SEED if value & 1 else 0)
        return value

    return tuple(entry(value) for value in range(256))


_TABLE: Final = _table()


def _crc64(data: bytes) -> int:
    value = _SEED
    for byte in data:
        value = (value >> 8) ^ _TABLE[(value ^ byte) & 0xFF]
    return value
