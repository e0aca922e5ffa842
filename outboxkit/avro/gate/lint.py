"""Lints schemas: habits that make the next change hard, or that implementations disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from outboxkit.avro.model.logical_types import logical_fault
from outboxkit.avro.model.nodes import (
    ABSENT,
    Array,
    Enum,
    Field,
    Fixed,
    Map,
    Node,
    Primitive,
    Record,
    Schema,
    Union,
    short_name,
)
from outboxkit.avro.model.sizes import children, recursive_names, zero_width, zero_width_weights

__all__ = ["Remark", "lint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """One piece of advice: a stable rule name, where, and why."""

    rule: str
    pointer: str
    message: str


_WIDER: Final = (("int", "double"), ("int", "float"), ("long", "double"), ("long", "float"), ("string", "bytes"))


def lint(schema: Schema) -> list[Remark]:
    """Returns advice on one schema, by place."""
    remarks = [Remark(rule="flaw", pointer=one.pointer, message=one.message) for one in schema.flaws]
    own = list(_own(schema.root))
    if not isinstance(schema.root, Record):
        remarks += _node(schema, schema.root)
    for node in own:
        remarks += _node(schema, node, top=True)
    remarks += _names(schema, [node.name for node in own])
    return sorted(set(remarks), key=lambda one: (one.pointer, one.rule, one.message))


def _own(node: Node) -> Iterator[Record | Enum | Fixed]:
    """The named types that this document defines: those of referenced documents are somebody else's."""
    if isinstance(node, Record | Enum | Fixed):
        yield node
    for child in children(node):
        yield from _own(child)


def _node(schema: Schema, node: Node, *, top: bool = False) -> Iterator[Remark]:
    if isinstance(node, Record) and top:
        yield from _record(schema, node)
    elif isinstance(node, Enum) and node.default is None:
        why = f"{node.name} has no default symbol: no symbol can ever be added without breaking readers"
        yield Remark(rule="enum-default", pointer=node.pointer, message=why)
    elif isinstance(node, Array | Map):
        yield from _collection(schema, node)
    elif isinstance(node, Union):
        yield from _union(schema, node)
    elif isinstance(node, Primitive | Fixed) and isinstance(node.fragment, Mapping):
        fault = logical_fault(node.type, node.fragment)
        if fault is not None:
            yield Remark(rule="logical-type", pointer=node.pointer, message=f"{fault}; it is ignored")


def _record(schema: Schema, node: Record) -> Iterator[Remark]:
    own = {one.name for one in node.fields}
    if "." not in node.name:
        why = f"{node.name} has no namespace: types of other teams will meet it"
        yield Remark(rule="namespace", pointer=node.pointer, message=why)
    for one in node.fields:
        yield from _field(one)
        for alias in own & set(one.aliases) - {one.name}:
            why = f"its alias {alias} is a field too: in another version that field's value goes to {one.name}"
            yield Remark(rule="alias-is-a-field", pointer=one.pointer, message=why)
        yield from _node(schema, one.node)


def _field(one: Field) -> Iterator[Remark]:
    if one.doc is None:
        yield Remark(rule="doc", pointer=one.pointer, message=f"{one.name} has no doc")
    if isinstance(one.node, Union) and one.default is ABSENT and _is_optional(one.node):
        why = f"{one.name} may be null but has no default: it cannot be added or removed without breaking readers"
        yield Remark(rule="optional-default", pointer=one.pointer, message=why)


def _is_optional(node: Union) -> bool:
    return any(isinstance(branch, Primitive) and branch.type == "null" for branch in node.branches)


def _collection(schema: Schema, node: Array | Map) -> Iterator[Remark]:
    inner = node.items if isinstance(node, Array) else node.values
    if isinstance(node, Array) and zero_width(zero_width_weights(schema.names), inner) is not None:
        why = "the items take no bytes: five bytes can announce a billion of them"
        yield Remark(rule="zero-width-items", pointer=node.pointer, message=why)
    yield from _node(schema, inner)


def _union(schema: Schema, node: Union) -> Iterator[Remark]:
    types = [schema.follow(branch) for branch in node.branches]
    shorts = [short_name(one.name) for one in types if isinstance(one, Record | Enum | Fixed)]
    if len(set(shorts)) < len(shorts):
        why = "two branches have one short name: implementations choose differently between them"
        yield Remark(rule="short-names", pointer=node.pointer, message=why)
    for narrow, wide in _WIDER:
        kinds = [one.type for one in types]
        if narrow in kinds and wide in kinds and kinds.index(wide) < kinds.index(narrow):
            why = f"{wide} stands before {narrow}: some readers turn every {narrow} into a {wide}"
            yield Remark(rule="branch-order", pointer=node.pointer, message=why)
    for branch in node.branches:
        yield from _node(schema, branch)


def _names(schema: Schema, names: list[str]) -> Iterator[Remark]:
    for name in recursive_names(schema.names) & set(names):
        why = f"{name} can hold itself without end: readers stop at 100 levels, some crash"
        yield Remark(rule="recursive", pointer=schema.names[name].pointer, message=why)
    shorts = [short_name(name) for name in names]
    for name in names:
        if shorts.count(short_name(name)) > 1:
            why = f"another type is called {short_name(name)} too, in another namespace"
            yield Remark(rule="short-names", pointer=schema.names[name].pointer, message=why)
