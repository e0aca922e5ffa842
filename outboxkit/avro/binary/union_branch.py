"""Chooses the branch of a union for a value, or refuse to guess.

A branch can be named: ``("CardPaid", value)``, by its full or short name. An object of a class is matched to the record
of the class's name. Otherwise the value decides, and when two branches take it equally well the writer must say which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from outboxkit.avro.binary.scalars import Prepare, Unfit, unfit
from outboxkit.avro.model.canonical import wire_name
from outboxkit.avro.model.nodes import Array, Enum, Fixed, Map, Primitive, Record, Union, short_name
from outboxkit.errors import EncodeError

__all__ = ["union"]


class Doubtful(Unfit):
    """A value that more than one branch of a union takes equally well."""


_Branch = Primitive | Array | Map | Union | Record | Enum | Fixed

_RANKS: Final[Mapping[type, tuple[str, ...]]] = {
    bool: ("boolean",),
    int: ("int", "long", "double", "float"),
    float: ("double", "float"),
    str: ("string", "enum"),
    bytes: ("bytes", "fixed"),
}
"""The types that take a plain value, best first: without loss, and the plain type before one with a meaning."""


def union(branches: Sequence[_Branch], labels: Sequence[str], checks: Sequence[Prepare]) -> Prepare:
    """Returns the check of a union: it gives None, or the prepared value with the wire name of its branch."""
    others = [number for number, label in enumerate(labels) if label != "null"]
    nullable = len(others) < len(labels)
    if len(others) == 1:
        return _optional(labels[others[0]], checks[others[0]], nullable=nullable)
    table = {number: (branches[number], labels[number], checks[number]) for number in others}

    def several(value: Any) -> Any:
        if value is None and nullable:
            return None
        named = _named(value, labels)
        if named is not None:
            return wire_name(labels[named]), checks[named](value[1])
        return _chosen(value, table)

    return several


def _optional(label: str, check: Prepare, *, nullable: bool) -> Prepare:
    wire = wire_name(label)

    def optional(value: Any) -> Any:
        if value is None and nullable:
            return None
        named = type(value) is tuple and _named(value, (label,)) is not None
        return wire, check(value[1] if named else value)

    return optional


def _named(value: Any, labels: Sequence[str]) -> int | None:
    if type(value) is not tuple or len(value) != len(("name", "value")) or not isinstance(value[0], str):
        return None
    for names in (list(labels), [short_name(label) for label in labels]):
        if names.count(value[0]) == 1:
            return names.index(value[0])
    raise Unfit("the named branch is not in the union, or its short name is not unique")


def _chosen(value: Any, table: Mapping[int, tuple[_Branch, str, Prepare]]) -> Any:
    found: list[tuple[int, str, Any]] = []
    faults: list[EncodeError] = []
    for branch, label, check in table.values():
        try:
            found.append((_rank(value, branch), label, check(value)))
        except EncodeError as error:
            faults.append(error)
    if not found:
        # One record in the union: its own fault says more than "no branch". So does a doubt further down.
        deep = [fault for fault in faults if fault.path]
        doubts = [fault for fault in faults if isinstance(fault, Doubtful)]
        if doubts or len(deep) == 1:
            raise (doubts or deep)[0]
        unfit(value, f"a value of any branch ({', '.join(label for _, label, _ in table.values())})")
    best = min(rank for rank, _, _ in found)
    fits = [(label, made) for rank, label, made in found if rank == best]
    if len(fits) > 1:
        names = ", ".join(label for label, _ in fits)
        raise Doubtful(f"the value fits more than one branch ({names}): write (branch name, value)")
    label, made = fits[0]
    return wire_name(label), made


def _rank(value: Any, branch: _Branch) -> int:
    if isinstance(branch, Record) and type(value).__name__ == short_name(branch.name):
        return -1
    order = _RANKS.get(type(value), ())
    if branch.type in order and not (isinstance(branch, Primitive) and branch.logical is not None):
        return order.index(branch.type)
    return len(order)
