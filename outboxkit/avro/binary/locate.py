"""Says where bytes stop being a value: the data path and the byte offset of the first fault.

The slow twin of `guard`: it walks the same bytes by the same rules, but keeps the path. It runs only after a refusal,
so it may take its time. ``leaf`` is called for every value that holds no others, with its bytes; what it raises is
reported at that place too (text that is not UTF-8, a date that the calendar does not know).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, NoReturn

from outboxkit.avro.binary.guard import MAX_LEVELS, MAX_ZERO_WIDTH, Refused, long_at, scanner
from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Node, Primitive, Record, Ref, Schema, Union
from outboxkit.avro.model.sizes import recursive_names, zero_width, zero_width_weights
from outboxkit.errors import DecodeError

__all__ = ["Leaf", "explain", "locate", "offset_of"]

Leaf = Callable[[Primitive | Enum | Fixed, bytes], None]

_MAX_MESSAGE: Final = 200
"""Characters of a foreign error text that are kept."""


def locate(schema: Schema, data: bytes, leaf: Leaf | None = None) -> DecodeError | None:
    """Walks `data` and return its first fault, None when there is none."""
    walk = _Walk(schema, data, leaf)
    try:
        walk.node(schema.root, "")
        if walk.pos != len(data):
            walk.refuse("", f"{len(data) - walk.pos} bytes are left over after the value")
    except DecodeError as error:
        return error
    return None


def offset_of(schema: Schema, data: bytes, path: str) -> int | None:
    """Returns the byte offset of the value at `path`, or of the innermost value around it."""
    walk = _Walk(schema, data, None)
    walk.target = path
    with suppress(DecodeError, RecursionError):
        walk.node(schema.root, "")
    return walk.seen


def explain(error: Exception) -> str:
    """Returns a foreign error as one short line; values are left out, since decode errors quote data."""
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8 ({error.reason} at byte {error.start})"
    return f"the value cannot be represented ({type(error).__name__})"[:_MAX_MESSAGE]


class _Walk:
    """One walk over one message."""

    def __init__(self, schema: Schema, data: bytes, leaf: Leaf | None) -> None:
        self.schema = schema
        self.data = data
        self.leaf = leaf
        self.pos = 0
        self.target: str | None = None
        self.seen: int | None = None
        self.levels = MAX_LEVELS
        self.zero_width = MAX_ZERO_WIDTH
        self.recursive = recursive_names(schema.names)
        self.weights = zero_width_weights(schema.names)

    def fault(self, path: str, why: str) -> DecodeError:
        return DecodeError(why, path=path, offset=self.pos)

    def refuse(self, path: str, why: str) -> NoReturn:
        raise self.fault(path, why)

    def node(self, node: Node, path: str) -> None:
        if self.target is not None and self.target.startswith(path):
            self.seen = self.pos
        if isinstance(node, Ref):
            node = self.schema.names[node.name]
        if isinstance(node, Record):
            self._record(node, path)
        elif isinstance(node, Union):
            self.node(node.branches[self._index(len(node.branches), path, "a union index")], path)
        elif isinstance(node, Array):
            self._array(node, path)
        elif isinstance(node, Map):
            for number in self._items(path):
                self._leaf(_KEY, f"{path}{{{number}}}")
                self.node(node.values, f"{path}{{{number}}}")
        else:
            self._leaf(node, path)

    def _record(self, node: Record, path: str) -> None:
        if node.name in self.weights:
            self._charge(self.weights[node.name], path)
            return
        nested = node.name in self.recursive
        if nested and self.levels == 0:
            self.refuse(path, f"records are nested deeper than {MAX_LEVELS} levels")
        self.levels -= nested
        for one in node.fields:
            self.node(one.node, f"{path}.{one.name}" if path else one.name)
        self.levels += nested

    def _array(self, node: Array, path: str) -> None:
        weight = zero_width(self.weights, node.items)
        if weight is not None:
            while (count := self._count(path)) > 0:
                self._charge(count * weight, path)
            return
        for number in self._items(path):
            self.node(node.items, f"{path}[{number}]")

    def _charge(self, weight: int, path: str) -> None:
        self.zero_width -= weight
        if self.zero_width < 0:
            self.refuse(path, "too many values that take no bytes")

    def _items(self, path: str) -> Iterator[int]:
        done = 0
        while (count := self._count(path)) > 0:
            if count > len(self.data) - self.pos:
                self.refuse(path, f"{count} items are announced, {len(self.data) - self.pos} bytes are left")
            yield from range(done, done + count)
            done += count

    def _count(self, path: str) -> int:
        count = self._long(path)
        if count < 0:
            if self._long(path) < 0:
                self.refuse(path, "a block has a negative size")
            return -count
        return count

    def _long(self, path: str) -> int:
        try:
            value, self.pos = long_at(self.data, self.pos)
        except IndexError:
            self.refuse(path, "the message is cut short")
        except Refused as error:
            self.refuse(path, str(error))
        return value

    def _index(self, size: int, path: str, what: str) -> int:
        start = self.pos
        index = self._long(path)
        if not 0 <= index < size:
            self.pos = start
            self.refuse(path, f"{what} of {index}, there are {size}")
        return index

    def _leaf(self, node: Primitive | Enum | Fixed, path: str) -> None:
        start = self.pos
        self.pos = min(self._end(node, path), len(self.data) + 1)
        if self.pos > len(self.data):
            self.pos = start
            self.refuse(path, f"the message is cut short inside a value of type {node.type}")
        part = self.data[start : self.pos]
        try:
            scanner(Schema(root=node, names={}, source=None))(part)
            if self.leaf is not None:
                self.leaf(node, part)
        except Refused as error:
            self.pos = start
            self.refuse(path, str(error))
        except Exception as error:
            # Whatever a decoder raises for a leaf is this leaf's fault.
            self.pos = start
            raise self.fault(path, explain(error)) from error

    def _end(self, node: Primitive | Enum | Fixed, path: str) -> int:
        """Returns where the value ends, by its type alone."""
        if isinstance(node, Fixed):
            return self.pos + node.size
        if node.type in _WIDTHS:
            return self.pos + _WIDTHS[node.type]
        start = self.pos
        number = self._long(path)
        end, self.pos = self.pos, start
        if node.type not in ("bytes", "string"):
            return end
        if number < 0:
            self.refuse(path, f"a length of {number}")
        return end + number


_KEY: Final = Primitive(type="string")
_WIDTHS: Final = {"null": 0, "boolean": 1, "float": 4, "double": 8}
