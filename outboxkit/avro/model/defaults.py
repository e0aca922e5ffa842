"""Tells whether a default is a value of its type: Avro specification 1.12, "Complex Types", table of default values.

A union default may match any branch (since 1.12; before, only the first). Bytes and fixed are strings of the code
points 0 to 255; a record default may leave out fields that have defaults themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from outboxkit.avro.model.nodes import ABSENT, Array, Enum, Fixed, Map, Named, Node, Primitive, Record, Ref, Union

__all__ = ["MAX_DEFAULT_DEPTH", "MAX_DEFAULT_PARTS", "default_fault"]

MAX_DEFAULT_PARTS: Final = 2_000
MAX_DEFAULT_DEPTH: Final = 64
"""Nesting of a default value: a recursive type could follow a hostile default without end."""


_SHOWN: Final = 60


def default_fault(names: Mapping[str, Named], node: Node, value: object) -> str | None:
    """Says why `value` is no default for `node`, or return None."""
    return _Check(names).fault(node, value, 0)


class _Check:
    """One check of one default; the budget ends defaults that use defaults that use defaults, twice at each level."""

    def __init__(self, names: Mapping[str, Named]) -> None:
        self.names = names
        self.left = MAX_DEFAULT_PARTS

    def fault(self, node: Node, value: object, depth: int) -> str | None:
        self.left -= 1
        if depth > MAX_DEFAULT_DEPTH or self.left < 0:
            return f"it has more than {MAX_DEFAULT_DEPTH} levels or {MAX_DEFAULT_PARTS} parts"
        if isinstance(node, Ref):
            node = self.names[node.name]
        if isinstance(node, Union):
            faults = [self.fault(branch, value, depth + 1) for branch in node.branches]
            return None if None in faults else f"{_shown(value)} matches no branch of the union"
        if isinstance(node, Array):
            return self._items(node.items, value, depth) if isinstance(value, list) else f"{_shown(value)} is no list"
        if isinstance(node, Map):
            if not isinstance(value, dict):
                return f"{_shown(value)} is no object"
            return self._items(node.values, value.values(), depth)
        if isinstance(node, Record):
            return self._record(node, value, depth)
        return _leaf_fault(node, value)

    def _items(self, node: Node, values: Iterable[object], depth: int) -> str | None:
        return next((fault for one in values if (fault := self.fault(node, one, depth + 1))), None)

    def _record(self, node: Record, value: object, depth: int) -> str | None:
        if not isinstance(value, dict):
            return f"{_shown(value)} is no object"
        for one in node.fields:
            given = value.get(one.name, one.default)
            fault = "no value and no default" if given is ABSENT else self.fault(one.node, given, depth + 1)
            if fault is not None:
                return f"field {one.name}: {fault}"
        return None


def _leaf_fault(node: Primitive | Enum | Fixed, value: object) -> str | None:
    if isinstance(node, Enum):
        return None if value in node.symbols else f"{_shown(value)} is not a symbol of {node.name}"
    if isinstance(node, Fixed):
        good = _is_bytes(value) and len(str(value)) == node.size
        return None if good else f"{_shown(value)} is not {node.size} bytes (code points 0-255)"
    return None if _PRIMITIVE[node.type](value) else f"{_shown(value)} is not a value of type {node.type}"


def _is_whole(value: object, bits: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_bytes(value: object) -> bool:
    return isinstance(value, str) and all(one <= "\xff" for one in value)


_PRIMITIVE: Final[Mapping[str, Callable[[object], bool]]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "int": lambda value: _is_whole(value, 32),
    "long": lambda value: _is_whole(value, 64),
    "float": _is_number,
    "double": _is_number,
    "bytes": _is_bytes,
    "string": lambda value: isinstance(value, str),
}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
