"""Random schemas, related pairs and data, from one seeded source: a failing seed is the whole reproduction.

Pairs are made by changing a copy of a schema as people do (add, remove, rename, promote, reorder, …), because two
independent schemas are nearly never compatible. Data are in Avro JSON encoding.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

from outboxkit.avro import Schema
from outboxkit.avro.compatibility.examples import branch_name, smallest_values
from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Node, Primitive, Record, Union

__all__ = ["pair", "schema", "value"]

Json = Any

_PRIMITIVES = ("null", "boolean", "int", "long", "float", "double", "bytes", "string")
_LOGICAL: tuple[dict[str, Json], ...] = (
    {"type": "int", "logicalType": "date"},
    {"type": "int", "logicalType": "time-millis"},
    {"type": "long", "logicalType": "time-micros"},
    {"type": "long", "logicalType": "timestamp-millis"},
    {"type": "long", "logicalType": "timestamp-micros"},
    {"type": "long", "logicalType": "local-timestamp-millis"},
    {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2},
    {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2},
    {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 4},
    {"type": "string", "logicalType": "uuid"},
    {"type": "string", "logicalType": "no-such-type"},
)
_SPACES = ("", "a", "b", "a.c")
_SYMBOLS = ("RED", "GREEN", "BLUE", "BLACK")
_FIELDS = ("id", "name", "total", "lines", "note", "old", "kind")


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0
        self.done: list[str] = []
        self.open: list[str] = []

    def node(self, depth: int) -> Json:
        dice = self.rng.random()
        if depth <= 0 or dice < 0.35:
            return self._leaf()
        if dice < 0.6:
            return self._record(depth)
        if dice < 0.7:
            return {"type": "array", "items": self.node(depth - 1)}
        if dice < 0.77:
            return {"type": "map", "values": self.node(depth - 1)}
        if dice < 0.93:
            return self._union(depth)
        return self._enum() if dice < 0.97 else self._fixed()

    def _leaf(self) -> Json:
        dice = self.rng.random()
        if dice < 0.62:
            return self.rng.choice(_PRIMITIVES)
        if dice < 0.78:
            return dict(self.rng.choice(_LOGICAL))
        if dice < 0.84 and self.done:
            return self.rng.choice(self.done)
        spaced = [name for name in self.open if "." in name]
        if dice < 0.88 and spaced:
            # A record that holds itself stays finite behind a union, an array or a map. Types without namespace cannot
            # be named from inside a namespace.
            name = self.rng.choice(spaced)
            return self.rng.choice((["null", name], {"type": "array", "items": name}, {"type": "map", "values": name}))
        return self._enum() if dice < 0.95 else self._fixed()

    def _name(self, word: str) -> tuple[str, str]:
        self.count += 1
        return f"{word}{self.count}", self.rng.choice(_SPACES)

    def _head(self, kind: str, word: str) -> tuple[dict[str, Json], str]:
        name, space = self._name(word)
        return {"type": kind, "name": name, "namespace": space}, f"{space}.{name}" if space else name

    def _record(self, depth: int) -> Json:
        head, full = self._head("record", "R")
        self.open.append(full)
        names = self.rng.sample(_FIELDS, self.rng.randint(0, 4))
        head["fields"] = [{"name": name, "type": self.node(depth - 1)} for name in names]
        self.open.remove(full)
        if "." in full:
            self.done.append(full)
        return head

    def _enum(self) -> Json:
        head, full = self._head("enum", "E")
        head["symbols"] = list(self.rng.sample(_SYMBOLS, self.rng.randint(1, 4)))
        if self.rng.random() < 0.3:
            head["default"] = head["symbols"][0]
        if "." in full:
            self.done.append(full)
        return head

    def _fixed(self) -> Json:
        head, full = self._head("fixed", "F")
        head["size"] = self.rng.choice((0, 1, 4, 12))
        if head["size"] == 4 and self.rng.random() < 0.5:
            head |= {"logicalType": "decimal", "precision": self.rng.choice((4, 6)), "scale": self.rng.choice((0, 2))}
        if "." in full:
            self.done.append(full)
        return head

    def _union(self, depth: int) -> Json:
        made: dict[str, Json] = {}
        for _ in range(self.rng.randint(1, 4)):
            branch = self.node(depth - 1)
            if not isinstance(branch, list):
                made.setdefault(_label(branch), branch)
        return list(made.values()) or ["null"]


def _label(node: Json) -> str:
    if isinstance(node, dict):
        name = node.get("name")
        space = node.get("namespace")
        return node["type"] if name is None else f"{space}.{name}" if space else name
    return str(node)


def schema(rng: random.Random, depth: int = 4) -> Json:
    """A random schema as JSON; mostly a record."""
    maker = _Maker(rng)
    return maker._record(depth) if rng.random() < 0.8 else maker.node(depth)


def pair(rng: random.Random, depth: int = 4) -> tuple[Json, Json]:
    """A random writer and a reader that was made from it by up to three changes."""
    writer = schema(rng, depth)
    reader = copy.deepcopy(writer)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
        reader = _changed(rng, reader)
    return writer, reader


def _nodes(node: Json, found: list[Json]) -> list[Json]:
    if isinstance(node, list):
        found.append(node)
        for branch in node:
            _nodes(branch, found)
    elif isinstance(node, dict):
        found.append(node)
        for key in ("items", "values"):
            if key in node:
                _nodes(node[key], found)
        for one in node.get("fields", ()):
            found.append(one)
            _nodes(one["type"], found)
    return found


def _changed(rng: random.Random, root: Json) -> Json:
    if rng.random() < 0.06 or not isinstance(root, dict | list):
        return _retyped(rng, root)
    node = rng.choice(_nodes(root, []))
    if isinstance(node, list):
        _change_union(rng, node)
        return root
    for key, change in _CHANGES:
        if key in node:
            change(rng, node)
            break
    return root


def _change_child(rng: random.Random, node: dict[str, Json]) -> None:
    key = "items" if "items" in node else "values"
    node[key] = _retyped(rng, node[key])


def _change_fixed(rng: random.Random, node: dict[str, Json]) -> None:
    rng.choice((_change_name, _change_size))(rng, node)


def _retyped(rng: random.Random, node: Json) -> Json:
    dice = rng.random()
    if isinstance(node, str) and node in _PRIMITIVES and dice < 0.6:
        wider = {
            "int": ("long", "float", "double"),
            "long": ("float", "double", "int"),
            "float": ("double", "long"),
            "string": ("bytes",),
            "bytes": ("string",),
        }
        return rng.choice(wider.get(node, _PRIMITIVES))
    if dice < 0.75 and not isinstance(node, list):
        return rng.choice((["null", node], [node, "null"])) if node != "null" else ["null", "int"]
    if isinstance(node, list) and len(node) == 1:
        return node[0]
    if isinstance(node, dict | list) or "." in node:
        return node
    return rng.choice(_PRIMITIVES)


def _change_union(rng: random.Random, node: list[Json]) -> None:
    dice = rng.random()
    if dice < 0.35 and len(node) > 1 and all(isinstance(one, str) and "." not in one for one in node):
        node.pop(rng.randrange(len(node)))
    elif dice < 0.7:
        new = rng.choice(_PRIMITIVES)
        if new not in [_label(one) for one in node]:
            node.insert(rng.randrange(len(node) + 1), new)
    elif all(isinstance(one, str) for one in node):
        rng.shuffle(node)


def _change_record(rng: random.Random, node: dict[str, Json]) -> None:
    fields: list[Json] = node["fields"]
    dice = rng.random()
    if dice < 0.3:
        _add_field(rng, fields)
    elif dice < 0.45 and fields and isinstance(fields[-1]["type"], str):
        fields.pop()
    elif dice < 0.55:
        simple = [one for one in fields if isinstance(one["type"], str) and "." not in one["type"]]
        if simple:
            fields.remove(moved := rng.choice(simple))
            fields.insert(0, moved)
    elif dice < 0.75 and fields:
        _change_field(rng, rng.choice(fields))
    elif dice < 0.85 and len(fields) > 1:
        # A name that another field still has, as an alias: the old one was not removed yet.
        one, other = rng.sample(fields, 2)
        one["aliases"] = [*one.get("aliases", ()), other["name"]]
        if rng.random() < 0.6:
            _drop(fields, other)
    else:
        _change_name(rng, node)


def _drop(fields: list[Json], one: Json) -> None:
    # Only a plain type can go: others may be defined here and used further down.
    if isinstance(one["type"], str):
        fields.remove(one)


def _add_field(rng: random.Random, fields: list[Json]) -> None:
    free = [name for name in _FIELDS if name not in [one["name"] for one in fields]]
    if not free:
        return
    kind, default = rng.choice((
        ("int", 7),
        (["null", "string"], None),
        (["int", "string"], "text"),
        ({"type": "array", "items": "int"}, [1]),
        ("bytes", "\u00ff"),
        ({"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}, "\u0001"),
        ("double", "not a number"),
    ))
    new: dict[str, Json] = {"name": rng.choice(free), "type": kind}
    if rng.random() < 0.75:
        new["default"] = default
    if rng.random() < 0.15 and fields:
        new["aliases"] = [rng.choice(fields)["name"]]
    fields.insert(rng.randrange(len(fields) + 1), new)


def _change_field(rng: random.Random, node: dict[str, Json]) -> None:
    dice = rng.random()
    if dice < 0.3:
        if rng.random() < 0.7:
            node["aliases"] = [*node.get("aliases", ()), node["name"]]
        node["name"] = f"{node['name']}_new"
    else:
        node["type"] = _retyped(rng, node["type"])
        node.pop("default", None)


def _change_name(rng: random.Random, node: dict[str, Json]) -> None:
    # References by full name would dangle: only types without namespace, which nobody refers to, get a new name.
    if node.get("namespace"):
        return
    old = node["name"]
    if rng.random() < 0.5:
        node["name"] = f"{old}New"
        if rng.random() < 0.6:
            node["aliases"] = [old]
    else:
        node["namespace"] = "moved"


def _change_enum(rng: random.Random, node: dict[str, Json]) -> None:
    dice = rng.random()
    symbols: list[str] = node["symbols"]
    if dice < 0.4 and len(symbols) > 1:
        symbols.pop()
        if node.get("default") not in symbols:
            node.pop("default", None)
    elif dice < 0.6:
        node["symbols"] = [*symbols, "LATE"] if "LATE" not in symbols else symbols
    elif dice < 0.8:
        node["default"] = symbols[0]
    else:
        _change_name(rng, node)


def _change_size(rng: random.Random, node: dict[str, Json]) -> None:
    node["size"] = rng.choice((1, 4, 12))


def _change_logical(rng: random.Random, node: dict[str, Json]) -> None:
    dice = rng.random()
    if dice < 0.3:
        node.pop("logicalType")
    elif node["logicalType"] == "decimal":
        node |= rng.choice(({"precision": 9}, {"precision": 6}, {"scale": 3}))
    else:
        fits = [one for one in _LOGICAL if one["type"] == node["type"] and one["logicalType"] != "decimal"]
        node |= rng.choice(fits)


# The first key that a node has tells what it is.
_CHANGES: tuple[tuple[str, Callable[[random.Random, dict[str, Json]], None]], ...] = (
    ("fields", _change_record),
    ("symbols", _change_enum),
    ("size", _change_fixed),
    ("name", _change_field),
    ("logicalType", _change_logical),
    ("items", _change_child),
    ("values", _change_child),
)


def value(rng: random.Random, made: Schema, node: Node | None = None, depth: int = 6) -> Json:
    """A random value of a parsed schema, in Avro JSON encoding; at depth 0 the smallest one."""
    node = made.follow(made.root if node is None else node)
    if depth <= 0:
        small = smallest_values(made).of(node)
        assert small.found
        return small.value
    if isinstance(node, Record):
        return {one.name: value(rng, made, one.node, depth - 1) for one in node.fields}
    if isinstance(node, Array):
        return [value(rng, made, node.items, depth - 2) for _ in range(rng.choice((0, 1, 2, 3)))]
    if isinstance(node, Map):
        return {f"k{n}": value(rng, made, node.values, depth - 2) for n in range(rng.choice((0, 1, 2)))}
    if isinstance(node, Union):
        branch = rng.choice(node.branches)
        name = branch_name(made, branch)
        return None if name == "null" else {name: value(rng, made, branch, depth - 1)}
    if isinstance(node, Enum):
        return rng.choice(node.symbols)
    return _leaf_value(rng, node)


def _leaf_value(rng: random.Random, node: Primitive | Fixed) -> Json:
    if node.logical is not None and node.logical.name == "decimal":
        limit = 10**node.logical.precision - 1
        size = node.size if isinstance(node, Fixed) else 8
        return rng.randint(-limit, limit).to_bytes(size, "big", signed=True).decode("latin-1")
    if isinstance(node, Fixed):
        return rng.randbytes(node.size).decode("latin-1")
    if node.logical is not None and node.logical.name == "uuid":
        digits = rng.randbytes(16).hex()
        return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    if node.logical is not None and node.logical.name.startswith("time-"):
        return rng.randrange(86_400_000)
    return _plain_value(rng, node.type)


def _plain_value(rng: random.Random, kind: str) -> Json:
    # Numbers stay inside the years 1 to 9999 in every unit: what Python's dates cannot hold is no question of schemas.
    if kind == "int":
        return rng.choice((0, 1, -1, rng.randint(-719_000, 2_932_000)))
    if kind == "long":
        return rng.choice((0, 1, -1, rng.randint(-62_135_000_000_000, 253_402_000_000_000)))
    if kind in ("float", "double"):
        return rng.choice((0.0, -1.5, 0.25, "NaN", "Infinity", float(rng.randint(-9999, 9999))))
    if kind == "bytes":
        return "".join(rng.choice("ab\x00\x7f") for _ in range(rng.randrange(6)))
    if kind == "string":
        return "".join(rng.choice("aé🙂\x00z") for _ in range(rng.randrange(6)))
    return rng.random() < 0.5 if kind == "boolean" else None
