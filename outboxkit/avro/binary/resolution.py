"""Reads a writer's bytes as the reader's schema wants them, decided once per pair of schemas.

A decoder library is asked only for what it does well: bytes to values under *one* schema, the wire schema. It has the
writer's layout, with the reader's field names, the reader's logical types, and no names that could clash. What the
library would do wrong between two schemas (aliases, union branches, promotions, defaults, short names) is done here by
closures over the decoded values, and only in those parts of a value where the two schemas differ.

Pairs of nodes match as in the compatibility check: what `check` calls an error fails here, and nothing else does (but
bytes that are read as text must be UTF-8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from outboxkit.avro.binary.promotions import PROMOTIONS, Unreadable
from outboxkit.avro.compatibility.logical_change import logical_change
from outboxkit.avro.compatibility.matching import FieldMatch, choose_branch, match_fields, match_names, promotes
from outboxkit.avro.model.canonical import identity
from outboxkit.avro.model.nodes import (
    ABSENT,
    Array,
    Enum,
    Field,
    Fixed,
    Map,
    Named,
    Node,
    Primitive,
    Record,
    Ref,
    Schema,
    Union,
)
from outboxkit.errors import DecodeError

__all__ = ["Leaves", "Resolution", "resolve"]

Project = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaves:
    """Functions that the decoder library lends: conversions of single values, and fresh defaults.

    Attributes:
        convert: turns a raw value into the Python type of a logical type.
        default: returns a function that makes a fresh Python value of a field's default.
    """

    convert: Callable[[Primitive, object], object]
    default: Callable[[Schema, Field], Callable[[], object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """A way to read: decode under `wire`, then apply `project` (None: the decoded value is the answer).

    Attributes:
        wire: the schema for the decoder library and the guard.
        project: turns a decoded value into the reader's.
        original: names of the wire schema's fields that are not the reader's, and what they stand for in paths.
    """

    wire: Schema
    project: Project | None
    original: Mapping[str, str]


def resolve(reader: Schema, writer: Schema, leaves: Leaves) -> Resolution:
    """Compiles the reading of `writer`'s data as `reader`."""
    if identity(reader) == identity(writer):
        # As in Avro Java, aliases do not count between equal schemas.
        return Resolution(wire=writer, project=None, original={})
    pairs = _Pairs(reader, writer, leaves)
    node, project = pairs.pair(reader.root, writer.root)
    if not pairs.changes:
        # Nothing differs: then pairs that hold themselves need no projection either, and unions no tags.
        pairs = _Pairs(reader, writer, leaves, same=True)
        node, project = pairs.pair(reader.root, writer.root)
    wire = Schema(root=node, names=pairs.names, source=None)
    return Resolution(wire=wire, project=project, original=pairs.original)


_Plan = tuple[Node, Project | None]


@dataclass(slots=True)
class _Pairs:
    """The pairs of records met so far; a pair that is still open is read through a closure that finds it later."""

    reader: Schema
    writer: Schema
    leaves: Leaves
    same: bool = False
    names: dict[str, Named] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)
    done: dict[tuple[int, int], _Plan] = field(default_factory=dict)
    raw_names: dict[str, str] = field(default_factory=dict)
    changes: int = 0

    def pair(self, reader: Node, writer: Node) -> _Plan:
        reader, writer = self.reader.follow(reader), self.writer.follow(writer)
        if isinstance(writer, Union):
            return self._writer_union(reader, writer)
        if isinstance(reader, Union):
            choice = choose_branch(self.reader, reader, writer)
            if choice is None:
                return self._never(writer, f"the reader's union has no branch for {writer.type}")
            return self.pair(reader.branches[choice.index], writer)
        if isinstance(reader, Record) and isinstance(writer, Record):
            return self._record(reader, writer)
        if isinstance(reader, Enum) and isinstance(writer, Enum):
            return self._enum(reader, writer)
        if isinstance(reader, Array) and isinstance(writer, Array):
            node, project = self.pair(reader.items, writer.items)
            return Array(items=node), None if project is None else _each(project)
        if isinstance(reader, Map) and isinstance(writer, Map):
            node, project = self.pair(reader.values, writer.values)
            return Map(values=node), None if project is None else _each_value(project)
        return self._leaf(reader, writer)

    def _named(self, node: Named) -> Named:
        self.names[node.name] = node
        return node

    def _fresh_name(self) -> str:
        return f"T{len(self.names)}"

    def _never(self, writer: Node, why: str) -> _Plan:
        self.changes += 1
        return self._raw(writer), _refusal(why)

    def _raw(self, node: Node) -> Node:
        """The writer's node without logical types: for values that are thrown away."""
        node = self.writer.follow(node)
        if isinstance(node, Primitive):
            return Primitive(type=node.type)
        if isinstance(node, Array):
            return Array(items=self._raw(node.items))
        if isinstance(node, Map):
            return Map(values=self._raw(node.values))
        if isinstance(node, Union):
            return Union(branches=tuple(self._raw(branch) for branch in node.branches))
        return self._raw_named(node)

    def _raw_named(self, node: Named) -> Node:
        if node.name in self.raw_names:
            return Ref(name=self.raw_names[node.name])
        name = self.raw_names[node.name] = self._reserve()
        if isinstance(node, Record):
            parts = tuple(Field(name=one.name, node=self._raw(one.node)) for one in node.fields)
            return self._named(Record(name=name, fields=parts))
        if isinstance(node, Enum):
            return self._named(Enum(name=name, symbols=node.symbols))
        return self._named(Fixed(name=name, size=node.size))

    def _reserve(self) -> str:
        """Takes a type name before its definition is known."""
        name = self._fresh_name()
        self.names[name] = Fixed(name=name, size=0)
        return name

    def _writer_union(self, reader: Node, writer: Union) -> _Plan:
        plans = [self.pair(reader, branch) for branch in writer.branches]
        nodes = tuple(node for node, _ in plans)
        projects = [project for _, project in plans]
        if not any(projects):
            return Union(branches=nodes), None
        nulls = [isinstance(node, Primitive) and node.type == "null" for node in nodes]
        if nulls.count(False) == 1 and any(nulls) and projects[nulls.index(True)] is None:
            only = projects[nulls.index(False)]
            return Union(branches=nodes), None if only is None else _unless_null(only)
        # A record with one field takes no bytes of its own: it tells the branches apart after decoding.
        wrapped = tuple(self._wrapped(node, number) for number, node in enumerate(nodes))
        return Union(branches=wrapped), _by_branch({f"_{number}": one for number, one in enumerate(projects)})

    def _wrapped(self, node: Node, number: int) -> Node:
        self.original[f"_{number}"] = ""
        name = self._reserve()
        return self._named(Record(name=name, fields=(Field(name=f"_{number}", node=node),)))

    def _record(self, reader: Record, writer: Record) -> _Plan:
        key = (id(reader), id(writer))
        if key in self.done:
            return self.done[key]
        if match_names(reader, writer) is None:
            return self._never(writer, f"the writer's record is {writer.name}, the reader's {reader.name}")
        name = self._reserve()
        later: list[Project | None] = []
        self.done[key] = Ref(name=name), None if self.same else _later(later)
        matches = match_fields(reader, writer)
        sources = {one.writers[0].name: one for one in matches if _is_fed(one)}
        parts, projects = self._fields(writer, sources)
        project = self._record_project(matches, parts, projects)
        later.append(project)
        node = self._named(Record(name=name, fields=tuple(parts)))
        self.done[key] = Ref(name=name), project
        return node, project

    def _fields(
        self, writer: Record, sources: Mapping[str, FieldMatch]
    ) -> tuple[list[Field], dict[str, Project | None]]:
        parts: list[Field] = []
        projects: dict[str, Project | None] = {}
        taken = {match.reader.name for match in sources.values()}
        for number, one in enumerate(writer.fields):
            match = sources.get(one.name)
            if match is None:
                name = next(free for tail in range(10**9) if (free := f"_skip{number}_{tail}") not in taken)
                self.original[name] = one.name
                parts.append(Field(name=name, node=self._raw(one.node)))
            else:
                node, projects[match.reader.name] = self.pair(match.reader.node, one.node)
                parts.append(Field(name=match.reader.name, node=node))
        return parts, projects

    def _record_project(
        self, matches: tuple[FieldMatch, ...], parts: list[Field], projects: Mapping[str, Project | None]
    ) -> Project | None:
        moves = [self._move(match, projects) for match in matches]
        same = [one.name for one in parts] == [match.reader.name for match in matches]
        if same and all(_is_fed(match) for match in matches):
            return _moved(moves) if any(projects.values()) else None
        self.changes += 1
        return _moved(moves)

    def _move(self, match: FieldMatch, projects: Mapping[str, Project | None]) -> tuple[str, Project]:
        one = match.reader
        if len(match.writers) > 1 or match.rival is not None:
            return one.name, _refusal("more than one field of the writer is meant, by alias")
        if match.writers:
            return one.name, _taken(one.name, projects[one.name])
        if one.default is ABSENT:
            return one.name, _refusal("the writer has no such field, and the reader no default")
        if any(flaw.pointer == f"{one.pointer}/default" for flaw in self.reader.flaws):
            return one.name, _refusal("the reader's default is invalid")
        make = self.leaves.default(self.reader, one)
        return one.name, lambda _: make()

    def _enum(self, reader: Enum, writer: Enum) -> _Plan:
        if match_names(reader, writer) is None:
            return self._never(writer, f"the writer's enum is {writer.name}, the reader's {reader.name}")
        node = self._named(replace(writer, name=self._reserve(), aliases=(), default=None))
        if set(writer.symbols) <= set(reader.symbols):
            return node, None
        self.changes += 1
        known = {symbol: symbol if symbol in reader.symbols else reader.default for symbol in writer.symbols}
        return node, _symbol(known)

    def _leaf(self, reader: Node, writer: Node) -> _Plan:
        if isinstance(reader, Fixed) and isinstance(writer, Fixed):
            if match_names(reader, writer) is None or reader.size != writer.size:
                return self._never(writer, f"{writer.name} of {writer.size} bytes is read as {reader.name}")
            node, project = self._logical(reader, writer)
            return self._named(replace(node, name=self._reserve(), aliases=())), project
        if isinstance(reader, Primitive) and isinstance(writer, Primitive):
            if reader.type == writer.type:
                return self._logical(reader, writer)
            if promotes(writer.type, reader.type):
                return self._promoted(reader, writer)
        types = getattr(writer, "type", ""), getattr(reader, "type", "")
        return self._never(writer, f"{types[0]} is read as {types[1]}")

    def _logical(self, reader: Any, writer: Any) -> tuple[Any, Project | None]:
        change = logical_change(reader, writer)
        if change is not None and change.breaks and change.example is None:
            self.changes += 1
            return replace(writer, logical=None), _refusal(change.message)
        # The guard and the decoder hold every value against the reader's logical type.
        return replace(writer, logical=reader.logical), None

    def _promoted(self, reader: Primitive, writer: Primitive) -> _Plan:
        change = logical_change(reader, writer)
        if change is not None and change.breaks:
            return self._never(writer, change.message)
        convert = PROMOTIONS.get((writer.type, reader.type))
        if reader.logical is None:
            self.changes += convert is not None
            return Primitive(type=writer.type), convert
        self.changes += 1
        finish = self.leaves.convert
        return Primitive(type=writer.type), lambda value: finish(reader, value if convert is None else convert(value))


def _is_fed(match: FieldMatch) -> bool:
    return len(match.writers) == 1 and match.rival is None


def _refusal(why: str) -> Project:
    def refuse(_: object) -> object:
        raise Unreadable(why)

    return refuse


def _at(error: DecodeError, step: str) -> DecodeError:
    joint = "" if not error.path or error.path.startswith("[") or error.path.startswith("{") else "."
    error.path = f"{step}{joint}{error.path}"
    return error


def _each(project: Project) -> Project:
    def each(values: list[Any]) -> list[Any]:
        made: list[Any] = []
        try:
            made.extend(map(project, values))
        except DecodeError as error:
            raise _at(error, f"[{len(made)}]") from None
        return made

    return each


def _each_value(project: Project) -> Project:
    def each(values: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        try:
            for key, value in values.items():
                made[key] = project(value)
        except DecodeError as error:
            raise _at(error, f"{{{len(made)}}}") from None
        return made

    return each


def _unless_null(project: Project) -> Project:
    return lambda value: None if value is None else project(value)


def _by_branch(table: Mapping[str, Project | None]) -> Project:
    def branch(value: dict[str, Any]) -> Any:
        ((key, inner),) = value.items()
        project = table[key]
        return inner if project is None else project(inner)

    return branch


def _later(made: list[Project | None]) -> Project:
    def project(value: Any) -> Any:
        found = made[0]
        return value if found is None else found(value)

    return project


def _taken(name: str, project: Project | None) -> Project:
    if project is None:
        return lambda value: value[name]
    return lambda value: project(value[name])


def _moved(moves: list[tuple[str, Project]]) -> Project:
    def move(value: dict[str, Any]) -> dict[str, Any]:
        made, name = {}, ""
        try:
            for name, get in moves:
                made[name] = get(value)
        except DecodeError as error:
            raise _at(error, name) from None
        return made

    return move


def _symbol(known: Mapping[str, str | None]) -> Project:
    def symbol(value: str) -> str:
        found = known[value]
        if found is None:
            raise Unreadable("the reader's enum has no such symbol, and no default")
        return found

    return symbol
