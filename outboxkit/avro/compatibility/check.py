"""Checks that a reader can read everything that a writer can write. Reports every fault, both places and a repair.

The pairs of nodes that a decoder can meet form a graph without alternatives (see `matching`). `check` walks it
breadth first, looks at each pair once, and collects the faults that pair has of its own: no memory of half-finished
verdicts, no problem listed twice, at most (reader nodes x writer nodes) pairs however types are shared.

Rules: Avro specification 1.12, "Schema Resolution"; logical types are compared too, because a changed decimal scale
or timestamp unit reads *other values* without any error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from outboxkit.avro.compatibility.examples import Example, Step, no_example, smallest_values
from outboxkit.avro.compatibility.logical_change import logical_change
from outboxkit.avro.compatibility.matching import FieldMatch, Match, choose_branch, match_fields, match_names, promotes
from outboxkit.avro.compatibility.problems import Problem, ProblemKind, Severity, fix_for
from outboxkit.avro.model.canonical import identity
from outboxkit.avro.model.nodes import (
    ABSENT,
    Array,
    Enum,
    Fixed,
    Map,
    Node,
    Primitive,
    Record,
    Ref,
    Schema,
    Union,
    short_name,
)

__all__ = ["check", "compatible"]


def compatible(reader: Schema, writer: Schema) -> bool:
    """Tells whether `reader` can read everything that `writer` can write."""
    return not any(problem.is_error for problem in check(reader, writer))


def check(reader: Schema, writer: Schema) -> list[Problem]:
    """Returns every reason why `reader` cannot read data of `writer`, and warnings where readers see other values.

    An empty list, or one with warnings only, means: all data can be read. The list is sorted by path.
    """
    if identity(reader) == identity(writer):
        # Aliases are for other schemas: a field may keep its old name as an alias while the old one lives on.
        return []
    walk = _Walk(reader, writer)
    found = {(one.kind, one.reader_path, one.writer_path, one.message): one for one in walk.problems()}
    return sorted(found.values(), key=lambda one: (one.reader_path, one.reader_pointer, one.kind.value, one.message))


@dataclass(frozen=True, slots=True)
class _Pair:
    """One reader node that meets one writer node, and how the walk came there."""

    reader: Node
    writer: Node
    reader_path: str
    writer_path: str
    parent: _Pair | None = None
    step: Step | None = None


class _Walk:
    """One comparison of two schemas."""

    def __init__(self, reader: Schema, writer: Schema) -> None:
        self.reader = reader
        self.writer = writer
        self.smallest = smallest_values(writer)

    def problems(self) -> Iterator[Problem]:
        start = _Pair(self.reader.root, self.writer.root, _root(self.reader), _root(self.writer))
        todo, seen = deque([start]), set[tuple[int, int]]()
        while todo:
            pair = self._followed(todo.popleft())
            # Nodes live as long as their schemas, so their ids are stable here.
            key = (id(pair.reader), id(pair.writer))
            if key in seen:
                continue
            seen.add(key)
            for one in self._visit(pair):
                if isinstance(one, Problem):
                    yield one
                else:
                    todo.append(one)

    def _followed(self, pair: _Pair) -> _Pair:
        return replace(pair, reader=self.reader.follow(pair.reader), writer=self.writer.follow(pair.writer))

    def _visit(self, pair: _Pair) -> Iterator[Problem | _Pair]:
        reader, writer = pair.reader, pair.writer
        if isinstance(writer, Union):
            yield from self._writer_union(pair, writer)
        elif isinstance(reader, Union):
            yield from self._reader_union(pair, reader)
        elif isinstance(reader, Record) and isinstance(writer, Record):
            yield from self._records(pair, reader, writer)
        elif isinstance(reader, Enum) and isinstance(writer, Enum):
            yield from self._enums(pair, reader, writer)
        elif isinstance(reader, Fixed) and isinstance(writer, Fixed):
            yield from self._fixeds(pair, reader, writer)
        elif isinstance(reader, Array) and isinstance(writer, Array):
            yield _down(pair, reader.items, writer.items, names=("[]", "[]"), step=Step(kind="item"))
        elif isinstance(reader, Map) and isinstance(writer, Map):
            yield _down(pair, reader.values, writer.values, names=("{}", "{}"), step=Step(kind="value"))
        else:
            yield from self._primitives(pair)

    def _writer_union(self, pair: _Pair, writer: Union) -> Iterator[_Pair]:
        for index, branch in enumerate(writer.branches):
            label = f"(union:{_label(self.writer, branch)})"
            yield _down(
                pair, pair.reader, branch, names=("", label), step=Step(kind="branch", index=index, node=writer)
            )

    def _reader_union(self, pair: _Pair, reader: Union) -> Iterator[Problem | _Pair]:
        choice = choose_branch(self.reader, reader, pair.writer)
        if choice is None:
            yield self._no_branch(pair, reader)
            return
        label = _label(self.reader, reader.branches[choice.index])
        if choice.rival is not None:
            other = _label(self.reader, reader.branches[choice.rival])
            why = f"{_name(pair.writer)} is read as {label}; readers that take the first match choose {other}"
            yield self._problem(pair, ProblemKind.UNION_BRANCH_SHADOWED, why, severity=Severity.WARNING)
        yield _down(pair, reader.branches[choice.index], pair.writer, names=(f"(union:{label})", ""))

    def _no_branch(self, pair: _Pair, reader: Union) -> Problem:
        labels = ", ".join(_label(self.reader, branch) for branch in reader.branches) or "no branch"
        why = f"the writer sends {_name(pair.writer)}, the reader's union has {labels}"
        return self._problem(pair, ProblemKind.MISSING_UNION_BRANCH, why, example=self.smallest.of(pair.writer))

    def _records(self, pair: _Pair, reader: Record, writer: Record) -> Iterator[Problem | _Pair]:
        yield from self._names(pair, reader, writer)
        for match in match_fields(reader, writer):
            yield from self._field(pair, match, writer)

    def _names(self, pair: _Pair, reader: Record | Enum | Fixed, writer: Record | Enum | Fixed) -> Iterator[Problem]:
        match = match_names(reader, writer)
        place = f"{reader.pointer}/name"
        if match is None:
            why = f"the writer's {writer.type} is {writer.name}, the reader's is {reader.name}"
            example = self.smallest.of(writer)
            yield self._problem(pair, ProblemKind.NAME_MISMATCH, why, pointer=place, part=reader.name, example=example)
        elif match is Match.SHORT_NAME:
            why = f"only the short names agree ({writer.name}, {reader.name}): some implementations refuse this"
            yield self._problem(
                pair, ProblemKind.NAMESPACE_MISMATCH, why, pointer=place, part=reader.name, severity=Severity.WARNING
            )

    def _field(self, pair: _Pair, match: FieldMatch, writer: Record) -> Iterator[Problem | _Pair]:
        one = match.reader
        here = replace(pair, reader_path=f"{pair.reader_path}.{one.name}")
        example = self.smallest.of(writer)
        report = partial(self._problem, here, pointer=one.pointer, part=one.fragment)
        if len(match.writers) > 1 or match.rival is not None:
            yield report(ProblemKind.AMBIGUOUS_ALIAS, _ambiguity(match), example=example)
            return
        if match.steals is not None:
            why = f"the writer's {one.name} goes to {match.steals} by alias; {one.name} gets its default"
            yield report(ProblemKind.ALIAS_STEALS_VALUE, why, severity=Severity.WARNING)
        if match.writers:
            source = match.writers[0]
            step = Step(kind="field", name=source.name, node=writer)
            yield _down(pair, one.node, source.node, names=(f".{one.name}", f".{source.name}"), step=step)
        elif one.default is ABSENT:
            why = f"{writer.name} of the writer has no field {one.name}, and the reader gives no default"
            yield report(ProblemKind.READER_FIELD_MISSING_DEFAULT_VALUE, why, example=example)
        else:
            for flaw in self.reader.flaws:
                if flaw.pointer == f"{one.pointer}/default":
                    yield report(ProblemKind.INVALID_DEFAULT, flaw.message, example=example)

    def _enums(self, pair: _Pair, reader: Enum, writer: Enum) -> Iterator[Problem]:
        yield from self._names(pair, reader, writer)
        missing = [symbol for symbol in writer.symbols if symbol not in reader.symbols]
        if missing and reader.default is None:
            why = f"the reader has no symbol {', '.join(missing)}, and no default for unknown ones"
            place = f"{reader.pointer}/symbols"
            yield self._problem(
                pair,
                ProblemKind.MISSING_ENUM_SYMBOLS,
                why,
                pointer=place,
                part=list(reader.symbols),
                example=Example(value=missing[0]),
            )

    def _fixeds(self, pair: _Pair, reader: Fixed, writer: Fixed) -> Iterator[Problem]:
        yield from self._names(pair, reader, writer)
        if reader.size != writer.size:
            why = f"the writer's {writer.name} has {writer.size} bytes, the reader's {reader.size}"
            example = self.smallest.of(writer)
            place = f"{reader.pointer}/size"
            yield self._problem(
                pair, ProblemKind.FIXED_SIZE_MISMATCH, why, pointer=place, part=reader.size, example=example
            )
            return
        yield from self._logical(pair)

    def _primitives(self, pair: _Pair) -> Iterator[Problem]:
        kinds = getattr(pair.writer, "type", ""), getattr(pair.reader, "type", "")
        if kinds[0] != kinds[1] and not promotes(*kinds):
            why = f"the writer sends {_name(pair.writer)}, the reader expects {_name(pair.reader)}"
            yield self._problem(pair, ProblemKind.TYPE_MISMATCH, why, example=self.smallest.of(pair.writer))
            return
        if kinds == ("bytes", "string"):
            why = "bytes are read as text: a value that is not UTF-8 cannot be read"
            yield self._problem(pair, ProblemKind.BYTES_AS_TEXT, why, severity=Severity.WARNING)
        yield from self._logical(pair)

    def _logical(self, pair: _Pair) -> Iterator[Problem]:
        if isinstance(pair.reader, Primitive | Fixed) and isinstance(pair.writer, Primitive | Fixed):
            change = logical_change(pair.reader, pair.writer)
            if change is not None:
                severity = Severity.ERROR if change.breaks else Severity.WARNING
                example = change.example or self.smallest.of(pair.writer)
                yield self._problem(
                    pair, ProblemKind.LOGICAL_TYPE_CHANGE, change.message, severity=severity, example=example
                )

    def _problem(
        self,
        pair: _Pair,
        kind: ProblemKind,
        message: str,
        *,
        severity: Severity = Severity.ERROR,
        pointer: str | None = None,
        part: object = None,
        example: Example | None = None,
    ) -> Problem:
        whole = severity is Severity.ERROR and example is not None
        seen = self._seen_from_root(pair, example) if whole and example is not None else no_example()
        return Problem(
            kind=kind,
            severity=severity,
            reader_path=pair.reader_path,
            reader_pointer=pair.reader.pointer if pointer is None else pointer,
            writer_path=pair.writer_path,
            writer_pointer=pair.writer.pointer,
            message=message,
            fix=fix_for(kind, writer_name=getattr(pair.writer, "name", "")),
            reader_fragment=pair.reader.fragment if pointer is None else part,
            writer_fragment=pair.writer.fragment,
            example=seen.value,
            has_example=seen.found,
        )

    def _seen_from_root(self, pair: _Pair, example: Example) -> Example:
        at: _Pair | None = pair
        while at is not None and example.found:
            if at.step is not None:
                example = self.smallest.around(at.step, example)
            at = at.parent
        return example


def _down(pair: _Pair, reader: Node, writer: Node, *, names: tuple[str, str], step: Step | None = None) -> _Pair:
    paths = pair.reader_path + names[0], pair.writer_path + names[1]
    return _Pair(reader, writer, *paths, parent=pair, step=step)


def _ambiguity(match: FieldMatch) -> str:
    if len(match.writers) > 1:
        names = " and ".join(one.name for one in match.writers)
        return f"the writer's fields {names} both mean the reader's {match.reader.name}"
    rival = "" if match.rival is None else match.rival.name
    return f"the reader's fields {match.reader.name} and {rival} claim the same field of the writer by alias"


def _root(schema: Schema) -> str:
    return short_name(schema.name)


def _label(schema: Schema, node: Node) -> str:
    node = schema.follow(node)
    return short_name(node.name) if isinstance(node, Record | Enum | Fixed) else node.type


def _name(node: Node) -> str:
    if isinstance(node, Record | Enum | Fixed):
        return f"{node.type} {node.name}"
    return node.name if isinstance(node, Ref) else node.type
