"""The shape of one parsed schema: frozen nodes, full names, one table of named types.

A node never points at another named type directly: it holds a `Ref` with the full name, so that recursive schemas
stay finite and every node stays frozen. `Schema.follow` turns a reference into the type it names. Nodes compare by
identity: two equal texts at two places are two nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum as _Enum
from typing import Final

__all__ = [
    "ABSENT",
    "PRIMITIVES",
    "Array",
    "Enum",
    "Field",
    "Fixed",
    "Flaw",
    "Logical",
    "Map",
    "Named",
    "Node",
    "Primitive",
    "Record",
    "Ref",
    "Schema",
    "Union",
    "namespace_of",
    "short_name",
]

PRIMITIVES: Final = frozenset({"null", "boolean", "int", "long", "float", "double", "bytes", "string"})


class _Absent(_Enum):
    ABSENT = "absent"


ABSENT: Final = _Absent.ABSENT
"""Stands for "no default": ``None`` is a default (null)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Logical:
    """A valid, known logical type; unknown and invalid ones are ignored as the specification asks."""

    name: str
    precision: int = 0
    scale: int = 0

    def __str__(self) -> str:
        return f"decimal({self.precision},{self.scale})" if self.name == "decimal" else self.name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Primitive:
    """null, boolean, int, long, float, double, bytes or string."""

    type: str
    logical: Logical | None = None
    pointer: str = ""
    fragment: object = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ref:
    """A use of a named type, by its full name."""

    name: str
    pointer: str = ""
    fragment: object = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Array:
    """A list of items of one type."""

    items: Node
    pointer: str = ""
    fragment: object = None
    type: str = "array"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Map:
    """A mapping from strings to values of one type."""

    values: Node
    pointer: str = ""
    fragment: object = None
    type: str = "map"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Union:
    """One of several types."""

    branches: tuple[Node, ...]
    pointer: str = ""
    fragment: object = None
    type: str = "union"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Field:
    """A field of a record; `default` is the JSON value as written, or `ABSENT`."""

    name: str
    node: Node
    default: object = ABSENT
    aliases: tuple[str, ...] = ()
    order: str = "ascending"
    doc: str | None = None
    pointer: str = ""
    fragment: object = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Record:
    """A record (or an error, its twin); aliases are full names."""

    name: str
    fields: tuple[Field, ...]
    aliases: tuple[str, ...] = ()
    error: bool = False
    doc: str | None = None
    pointer: str = ""
    fragment: object = None
    type: str = "record"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Enum:
    """A named list of symbols; `default` is the symbol for unknown ones."""

    name: str
    symbols: tuple[str, ...]
    default: str | None = None
    aliases: tuple[str, ...] = ()
    doc: str | None = None
    pointer: str = ""
    fragment: object = None
    type: str = "enum"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fixed:
    """A named run of `size` bytes."""

    name: str
    size: int
    logical: Logical | None = None
    aliases: tuple[str, ...] = ()
    doc: str | None = None
    pointer: str = ""
    fragment: object = None
    type: str = "fixed"


Named = Record | Enum | Fixed
Node = Primitive | Ref | Array | Map | Union | Record | Enum | Fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Flaw:
    """A flaw that a parser may tolerate and a registration must not: a bad default, a record without finite value."""

    pointer: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Schema:
    """One parsed schema document.

    Attributes:
        root: the outermost node.
        names: every named type by full name, also those that came from references.
        source: the JSON value that was parsed.
        flaws: what a lenient parse let pass.
    """

    root: Node
    names: Mapping[str, Named]
    source: object
    flaws: tuple[Flaw, ...] = field(default=())

    def follow(self, node: Node) -> Primitive | Array | Map | Union | Named:
        """Returns the node itself, or the named type that a reference means."""
        return self.names[node.name] if isinstance(node, Ref) else node

    @property
    def name(self) -> str:
        """The full name of the outermost type, or its type name when it has no name."""
        root = self.follow(self.root)
        return root.name if isinstance(root, Record | Enum | Fixed) else root.type


def short_name(name: str) -> str:
    """Returns the part after the last dot: ``shop.Order`` is ``Order``."""
    return name.rpartition(".")[2]


def namespace_of(name: str) -> str:
    """Returns the part before the last dot: ``shop.Order`` lives in ``shop``."""
    return name.rpartition(".")[0]
