"""Looks through Avro bytes before any decoder does: is this a whole, finite, well-formed value of that schema?

A decoder written in C cannot be trusted with hostile bytes: recursion ends the process, and negative indexes, over-long
varints or left-over bytes are read as if they were data. `scanner` compiles a schema into closures (no generated code)
that step over the bytes once, without building values. They only say yes or no; on no, `locate` walks again, slowly,
and says where.

Limits: Avro Java 1.13 stops at 100 levels too (AVRO-4302).
"""

# ruff: noqa: ARG001, PLR2004  all steps have one signature; the numbers are those of the wire format

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Node, Primitive, Record, Ref, Schema, Union
from outboxkit.avro.model.sizes import recursive_names, zero_width, zero_width_weights

__all__ = ["MAX_LEVELS", "MAX_ZERO_WIDTH", "Refused", "long_at", "scanner"]

MAX_LEVELS: Final = 100
"""Nesting of records that hold themselves: the C decoder dies at about 4,600."""
MAX_ZERO_WIDTH: Final = 1_000_000
"""Weight of all items of one value that take no bytes: only these are not bounded by the message's size."""
_DAY_MS: Final = 86_400_000

State = list[int]
"""Levels left, zero-width weight left."""
Step = Callable[[bytes, int, State], int]


class Refused(Exception):
    """The bytes are no value of the schema; says why, not where."""


def scanner(schema: Schema) -> Callable[[bytes], None]:
    """Compiles a check of whole messages; it raises `Refused` or IndexError (cut short)."""
    step = _Compiler(schema).step(schema.root)

    def scan(data: bytes) -> None:
        end = step(data, 0, [MAX_LEVELS, MAX_ZERO_WIDTH])
        if end != len(data):
            raise Refused("left-over bytes" if end < len(data) else "cut short")

    return scan


def long_at(data: bytes, pos: int) -> tuple[int, int]:
    """Reads a zigzag varint of at most 64 bits and return it with the position after it."""
    value, shift = 0, 0
    while True:
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 63:
            raise Refused("a number is longer than 10 bytes")
    if value >> 64:
        raise Refused("a number has more than 64 bits")
    return (value >> 1) ^ -(value & 1), pos


class _Compiler:
    """Turns nodes into steps; a record's step is made once and found again by name."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.recursive = recursive_names(schema.names)
        self.weights = zero_width_weights(schema.names)
        self.steps: dict[str, Step] = {}

    def step(self, node: Node) -> Step:
        node = self.schema.follow(node) if isinstance(node, Ref) else node
        if isinstance(node, Record):
            return self._record(node)
        if isinstance(node, Union):
            return _union(tuple(self.step(branch) for branch in node.branches))
        if isinstance(node, Array | Map):
            return self._blocks(node)
        if isinstance(node, Enum):
            return _index(len(node.symbols), "enum index out of range")
        return _leaf(node)

    def _record(self, node: Record) -> Step:
        if node.name in self.steps:
            return self.steps[node.name]
        if node.name in self.weights:
            return _weighed(self.weights[node.name])
        made: list[Step] = []
        if node.name in self.recursive:
            self.steps[node.name] = _level(made)
        parts = tuple(self.step(one.node) for one in node.fields)
        made.append(parts[0] if len(parts) == 1 else _sequence(parts))
        return self.steps.setdefault(node.name, made[0])

    def _blocks(self, node: Array | Map) -> Step:
        if isinstance(node, Map):
            return _blocks(_sequence((_sized, self.step(node.values))))
        weight = zero_width(self.weights, node.items)
        return _blocks(self.step(node.items)) if weight is None else _counted(weight)


def _level(made: list[Step]) -> Step:
    def level(data: bytes, pos: int, state: State) -> int:
        if state[0] == 0:
            raise Refused("nested too deeply")
        state[0] -= 1
        pos = made[0](data, pos, state)
        state[0] += 1
        return pos

    return level


def _sequence(parts: tuple[Step, ...]) -> Step:
    # Most fields of most events are short texts: they are stepped over here, without a call.
    steps = tuple(None if part is _sized else part for part in parts)

    def sequence(data: bytes, pos: int, state: State) -> int:
        for step in steps:
            if step is not None:
                pos = step(data, pos, state)
            elif (byte := data[pos]) < 0x80 and not byte & 1:
                pos += 1 + (byte >> 1)
            else:
                pos = _sized(data, pos, state)
        return pos

    return sequence


def _union(branches: tuple[Step, ...]) -> Step:
    # Zigzag: index i is byte 2i while i < 64, so one look-up by byte serves nearly every union.
    table = {2 * index: branch for index, branch in enumerate(branches) if index < 64}

    def union(data: bytes, pos: int, state: State) -> int:
        branch = table.get(data[pos])
        if branch is None:
            index, pos = long_at(data, pos)
            if not 0 <= index < len(branches):
                raise Refused("union index out of range")
            return branches[index](data, pos, state)
        return branch(data, pos + 1, state)

    return union


def _index(size: int, why: str) -> Step:
    def index(data: bytes, pos: int, state: State) -> int:
        byte = data[pos]
        if byte < 0x80:
            number, pos = byte >> 1, pos + 1
            if byte & 1:
                raise Refused(why)
        else:
            number, pos = long_at(data, pos)
        if not 0 <= number < size:
            raise Refused(why)
        return pos

    return index


def _blocks(item: Step) -> Step:
    def blocks(data: bytes, pos: int, state: State) -> int:
        while True:
            count, pos = _count_at(data, pos)
            if count == 0:
                return pos
            if count > len(data) - pos:
                raise Refused("more items than bytes")
            for _ in range(count):
                pos = item(data, pos, state)

    return blocks


def _weighed(weight: int) -> Step:
    def weighed(data: bytes, pos: int, state: State) -> int:
        state[1] -= weight
        if state[1] < 0:
            raise Refused("too many values that take no bytes")
        return pos

    return weighed


def _counted(one: int) -> Step:
    def counted(data: bytes, pos: int, state: State) -> int:
        while True:
            count, pos = _count_at(data, pos)
            if count == 0:
                return pos
            state[1] -= count * one
            if state[1] < 0:
                raise Refused("too many values that take no bytes")

    return counted


def _count_at(data: bytes, pos: int) -> tuple[int, int]:
    byte = data[pos]
    if byte < 0x80 and not byte & 1:
        return byte >> 1, pos + 1
    count, pos = long_at(data, pos)
    if count >= 0:
        return count, pos
    # A negative count is followed by the size of the block in bytes, which decoders ignore as we do.
    size, pos = long_at(data, pos)
    if size < 0:
        raise Refused("a block has a negative size")
    return -count, pos


def _sized(data: bytes, pos: int, state: State) -> int:
    byte = data[pos]
    if byte < 0x80:
        if byte & 1:
            raise Refused("a negative length")
        return pos + 1 + (byte >> 1)
    size, pos = long_at(data, pos)
    if size < 0:
        raise Refused("a negative length")
    return pos + size


def _null(data: bytes, pos: int, state: State) -> int:
    return pos


def _boolean(data: bytes, pos: int, state: State) -> int:
    if data[pos] > 1:
        raise Refused("a boolean is 0 or 1")
    return pos + 1


def _int(data: bytes, pos: int, state: State) -> int:
    if data[pos] < 0x80:
        return pos + 1
    if data[pos + 1] < 0x80:
        return pos + 2
    if data[pos + 2] < 0x80:
        return pos + 3
    if data[pos + 3] < 0x80:
        return pos + 4
    if data[pos + 4] < 0x10:
        return pos + 5
    raise Refused("an int has more than 32 bits")


def _long(data: bytes, pos: int, state: State) -> int:
    end = pos
    while data[end] >= 0x80:
        end += 1
    if end - pos > 8 and (end - pos > 9 or data[end] > 1):
        raise Refused("a long has more than 64 bits")
    return end + 1


def _skip(size: int) -> Step:
    # Running past the end is noticed by the next look at a byte, or at the end of the message.
    def skip(data: bytes, pos: int, state: State) -> int:
        return pos + size

    return skip


def _time(limit: int) -> Step:
    def time(data: bytes, pos: int, state: State) -> int:
        value, pos = long_at(data, pos)
        if not 0 <= value < limit:
            raise Refused("a time of day out of range")
        return pos

    return time


def _decimal(precision: int, size: int | None) -> Step:
    bound = 10**precision
    # Leading sign bytes are legal but useless: a few are let pass, a long run of them only costs time.
    longest = bound.bit_length() // 8 + 9

    def decimal(data: bytes, pos: int, state: State) -> int:
        end = _sized(data, pos, state) if size is None else pos + size
        start = end - size if size is not None else long_at(data, pos)[1]
        if end > len(data):
            raise Refused("cut short")
        if size is None and not 0 < end - start <= longest:
            raise Refused("a decimal is empty, or longer than its precision")
        if abs(int.from_bytes(data[start:end], "big", signed=True)) >= bound:
            raise Refused("a decimal has more digits than its precision")
        return end

    return decimal


_LEAVES: Final[dict[str, Step]] = {
    "null": _null,
    "boolean": _boolean,
    "int": _int,
    "long": _long,
    "float": _skip(4),
    "double": _skip(8),
    "bytes": _sized,
    "string": _sized,
}


def _leaf(node: Primitive | Fixed) -> Step:
    logical = node.logical
    size = node.size if isinstance(node, Fixed) else None
    if logical is not None and logical.name == "decimal":
        return _decimal(logical.precision, size)
    if logical is not None and logical.name in ("time-millis", "time-micros"):
        return _time(_DAY_MS if logical.name == "time-millis" else _DAY_MS * 1000)
    return _LEAVES[node.type] if size is None else _skip(size)
