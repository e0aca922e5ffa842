"""How small and how deep can a value of a type be: finite or endless, zero bytes or more, recursive or not.

All three are least fixed points over the named types, so they are right for recursive schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from outboxkit.schemas.nodes import Array, Enum, Fixed, Map, Named, Node, Primitive, Record, Ref, Union

__all__ = ["endless_records", "height", "heights", "recursive_names", "zero_width"]


def heights(names: Mapping[str, Named]) -> dict[str, int]:
    """Return, for each named type that has a finite value, the nesting of its flattest value."""
    known: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for name, node in names.items():
            found = height(known, node)
            if found is not None and name not in known:
                known[name], changed = found, True
    return known


def height(known: Mapping[str, int], node: Node) -> int | None:
    """Return the nesting of the flattest value of `node`, None while no finite value is known."""
    if isinstance(node, Ref):
        return known.get(node.name)
    if isinstance(node, Record):
        parts = [height(known, one.node) for one in node.fields]
        return None if None in parts else 1 + max((part for part in parts if part is not None), default=0)
    if isinstance(node, Union):
        found = [part for branch in node.branches if (part := height(known, branch)) is not None]
        return min(found, default=None)
    return None if isinstance(node, Enum) and not node.symbols else 0


def endless_records(names: Mapping[str, Named]) -> list[Record]:
    """Return the records that can hold no finite value: ``{"name": "R", "fields": [{"name": "r", "type": "R"}]}``."""
    finite = heights(names)
    return [node for name, node in names.items() if isinstance(node, Record) and name not in finite]


def zero_width(names: Mapping[str, Named], node: Node, seen: frozenset[str] = frozenset()) -> bool:
    """Tell whether every value of `node` takes no bytes at all (null, fixed(0), records of such)."""
    if isinstance(node, Ref):
        return node.name not in seen and zero_width(names, names[node.name], seen | {node.name})
    if isinstance(node, Record):
        check = partial(zero_width, names, seen=seen | {node.name})
        return all(check(one.node) for one in node.fields)
    if isinstance(node, Fixed):
        return node.size == 0
    return isinstance(node, Primitive) and node.type == "null"


def recursive_names(names: Mapping[str, Named]) -> frozenset[str]:
    """Return the names of the records that can hold themselves, at any depth."""
    uses = {name: frozenset(_uses(node)) for name, node in names.items()}
    return frozenset(name for name in names if name in _reached(uses, name))


def _reached(uses: Mapping[str, frozenset[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = list(uses[start])
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo.extend(uses.get(name, ()))
    return found


def _uses(node: Node) -> Iterable[str]:
    for child in _children(node):
        if isinstance(child, Ref | Record):
            yield child.name
        else:
            yield from _uses(child)


def _children(node: Node) -> Iterable[Node]:
    if isinstance(node, Record):
        return tuple(one.node for one in node.fields)
    if isinstance(node, Array):
        return (node.items,)
    if isinstance(node, Map):
        return (node.values,)
    return node.branches if isinstance(node, Union) else ()
