"""Bounds of a type's values: finite or endless, zero bytes or more, recursive or not.

All three are least fixed points over the named types, so they are right for recursive schemas.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Named, Node, Record, Ref, Union

__all__ = [
    "children",
    "endless_records",
    "height",
    "heights",
    "recursive_names",
    "zero_width",
    "zero_width_weights",
]


def heights(names: Mapping[str, Named]) -> dict[str, int]:
    """Returns, for each named type that has a finite value, the nesting of its flattest value."""
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
    """Returns the nesting of the flattest value of `node`, None while no finite value is known."""
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
    """Returns the records that can hold no finite value: ``{"name": "R", "fields": [{"name": "r", "type": "R"}]}``."""
    finite = heights(names)
    return [node for name, node in names.items() if isinstance(node, Record) and name not in finite]


def zero_width_weights(names: Mapping[str, Named]) -> dict[str, int]:
    """Returns the named types whose values take no bytes at all, each with the memory that one value takes.

    The unit is a list's slot (8 bytes): an empty dict is about 64 bytes and one with entries about 232, 30 slots.
    Records that hold such records twice, at many levels, track_bytes more than any machine has.
    """
    known: dict[str, int] = {}
    changed = True
    while changed:
        changed = False
        for name, node in names.items():
            found = None if name in known else zero_width(known, node)
            if found is not None:
                known[name], changed = found, True
    return known


def zero_width(known: Mapping[str, int], node: Node) -> int | None:
    """Returns the weight of a node whose values take no bytes, None for all others."""
    if isinstance(node, Ref):
        return known.get(node.name)
    if isinstance(node, Record):
        parts = [zero_width(known, one.node) for one in node.fields]
        return None if None in parts else 30 + sum(part for part in parts if part is not None)
    empty = node.size == 0 if isinstance(node, Fixed) else node.type == "null"
    return 1 if empty else None


def recursive_names(names: Mapping[str, Named]) -> frozenset[str]:
    """Returns the names of the records whose values can be nested without end.

    These are the records that hold themselves, and those that hold such records: what is left after taking away,
    again and again, the types that use no remaining type.
    """
    uses = {name: set(_uses(node)) for name, node in names.items()}
    users: dict[str, list[str]] = {name: [] for name in names}
    for name, used in uses.items():
        for one in used:
            users[one].append(name)
    flat = [name for name, used in uses.items() if not used]
    while flat:
        done = flat.pop()
        for name in users[done]:
            uses[name].discard(done)
            if not uses[name]:
                flat.append(name)
    return frozenset(name for name, used in uses.items() if used)


def _uses(node: Node) -> Iterable[str]:
    for child in children(node):
        if isinstance(child, Ref | Record | Enum | Fixed):
            yield child.name
        else:
            yield from _uses(child)


def children(node: Node) -> Iterable[Node]:
    """Returns the nodes directly below a node."""
    if isinstance(node, Record):
        return tuple(one.node for one in node.fields)
    if isinstance(node, Array):
        return (node.items,)
    if isinstance(node, Map):
        return (node.values,)
    return node.branches if isinstance(node, Union) else ()
