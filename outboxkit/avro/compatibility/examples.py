"""Smallest values of a schema, and a value that reaches one given place: the proof that a problem is real.

Values are in Avro JSON encoding (specification 1.12, "JSON Encoding"): a union is null or ``{"branch": value}``, bytes
are strings of the code points 0 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Node, Primitive, Record, Ref, Schema, Union
from outboxkit.avro.model.sizes import height, heights

__all__ = ["Example", "SmallestValues", "Step", "branch_name", "no_example", "smallest_values"]

MAX_NODES: Final = 2_000
"""Parts of one smallest value: types used twice at each of many levels would double it at each of them."""

_SMALLEST: Final[Mapping[str, object]] = {
    "null": None,
    "boolean": False,
    "int": 0,
    "long": 0,
    "float": 0.0,
    "double": 0.0,
    "bytes": "",
    "string": "",
}
_LOGICAL: Final[Mapping[str, object]] = {"uuid": "00000000-0000-0000-0000-000000000000"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A value, or the fact that none could be built."""

    value: object = None
    found: bool = True


def no_example() -> Example:
    """Returns the example that is none."""
    return Example(found=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step from a writer's node down to a part of it."""

    kind: Literal["field", "item", "value", "branch"]
    name: str = ""
    index: int = 0
    node: Record | Union | None = None


def branch_name(schema: Schema, node: Node) -> str:
    """Returns the name of a union branch in JSON encoding: the full name of a named type, else the type."""
    node = schema.follow(node)
    return node.name if isinstance(node, Record | Enum | Fixed) else node.type


def smallest_values(schema: Schema) -> SmallestValues:
    """Prepares the smallest values of a schema's types."""
    return SmallestValues(schema, heights(schema.names))


class SmallestValues:
    """Builds small values; every call returns fresh ones."""

    def __init__(self, schema: Schema, known: Mapping[str, int]) -> None:
        self.schema = schema
        self.known = known

    def of(self, node: Node) -> Example:
        """Returns the smallest value of a node, if it has a finite one of reasonable size."""
        budget = [MAX_NODES]
        if height(self.known, node) is None:
            return no_example()
        try:
            value = self._value(node, budget)
        except RecursionError:
            return no_example()
        return Example(value=value) if budget[0] >= 0 else no_example()

    def around(self, step: Step, inner: Example) -> Example:
        """Returns the smallest value that holds `inner` at the end of `step`."""
        if step.kind == "item":
            return Example(value=[inner.value])
        if step.kind == "value":
            return Example(value={"": inner.value})
        if isinstance(step.node, Union):
            return Example(value=self._tagged(step.node.branches[step.index], inner.value))
        return self._record(step, inner)

    def _record(self, step: Step, inner: Example) -> Example:
        fields = step.node.fields if isinstance(step.node, Record) else ()
        parts = {one.name: inner if one.name == step.name else self.of(one.node) for one in fields}
        if not all(part.found for part in parts.values()):
            return no_example()
        return Example(value={name: part.value for name, part in parts.items()})

    def _tagged(self, branch: Node, value: object) -> object:
        name = branch_name(self.schema, branch)
        return None if name == "null" else {name: value}

    def _value(self, node: Node, budget: list[int]) -> object:
        budget[0] -= 1
        if budget[0] < 0:
            return None
        if isinstance(node, Ref):
            node = self.schema.names[node.name]
        if isinstance(node, Fixed):
            budget[0] -= node.size
            return "\x00" * node.size if budget[0] >= 0 else ""
        if isinstance(node, Record):
            return {one.name: self._value(one.node, budget) for one in node.fields}
        if isinstance(node, Union):
            branch = min(node.branches, key=self._height)
            return self._tagged(branch, self._value(branch, budget))
        if isinstance(node, Array | Map):
            return [] if isinstance(node, Array) else {}
        if isinstance(node, Enum):
            return node.symbols[0]
        return self._leaf(node)

    def _height(self, node: Node) -> float:
        found = height(self.known, node)
        return float("inf") if found is None else found

    def _leaf(self, node: Primitive) -> object:
        if node.logical is not None and node.logical.name in _LOGICAL:
            return _LOGICAL[node.logical.name]
        # An empty byte string is no number: the smallest decimal is one zero byte.
        return "\x00" if node.logical is not None and node.type == "bytes" else _SMALLEST[node.type]
