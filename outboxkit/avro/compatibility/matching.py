"""Matches reader and writer: names, promotions, fields and union branches, as decoders choose them.

Every choice here depends on the two nodes alone, never on whether something deeper fits. So a pair of schemas is a
graph of pairs with no alternatives in it: it fits if and only if no reachable pair has a fault of its own, and no
verdict can go stale. The compatibility check and the decoder walk the same graph.

Sources: Avro specification 1.12, "Schema Resolution" and "Aliases"; branch order of Avro Java's ``Resolver``: full
name or alias, short name, same type, promotion.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum as _Enum
from typing import Final

from outboxkit.avro.model.nodes import Enum, Field, Fixed, Named, Node, Record, Schema, Union, short_name

__all__ = ["Choice", "FieldMatch", "Match", "choose_branch", "match_fields", "match_names", "promotes"]

_PROMOTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "int": ("long", "float", "double"),
    "long": ("float", "double"),
    "float": ("double",),
    "string": ("bytes",),
    "bytes": ("string",),
}


class Match(_Enum):
    """Degrees to which two types fit at first sight, best first."""

    NAME = 0
    """Same full name, or an alias of the reader."""
    SHORT_NAME = 1
    """Same name in another namespace: a match by the specification, not for every implementation."""
    TYPE = 2
    """Same type without names."""
    PROMOTION = 3
    """Another primitive type that the writer's is promoted to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The branch of a reader's union that reads a type; `rival` is one that another implementation would take."""

    index: int
    match: Match
    rival: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldMatch:
    """Source of a reader's field.

    Attributes:
        reader: the reader's field.
        writers: the writer's fields that claim it; more than one is ambiguous, none means the default.
        rival: another field of the reader that claims the same writer field by alias.
        steals: the value of the writer's field of this name goes to the reader field named here, by alias.
    """

    reader: Field
    writers: tuple[Field, ...]
    rival: Field | None = None
    steals: str | None = None


def promotes(writer: str, reader: str) -> bool:
    """Tells whether the primitive type `writer` can be read as the other primitive type `reader`."""
    return reader in _PROMOTIONS.get(writer, ())


def match_names(reader: Named, writer: Named) -> Match | None:
    """Compares two named types of one kind by name, as the specification does: by the unqualified name or an alias."""
    if writer.name == reader.name or writer.name in reader.aliases:
        return Match.NAME
    return Match.SHORT_NAME if short_name(writer.name) == short_name(reader.name) else None


def match_types(reader: Node, writer: Node) -> Match | None:
    """Compares two nodes (references followed, no unions) at first sight."""
    if isinstance(reader, Record | Enum | Fixed) and isinstance(writer, Record | Enum | Fixed):
        return match_names(reader, writer) if type(reader) is type(writer) else None
    kinds = getattr(reader, "type", ""), getattr(writer, "type", "")
    if kinds[0] == kinds[1]:
        return Match.TYPE
    return Match.PROMOTION if promotes(kinds[1], kinds[0]) else None


def choose_branch(schema: Schema, union: Union, writer: Node) -> Choice | None:
    """Chooses the branch of the reader's union that reads `writer` (reference followed, no union)."""
    found = [
        (match, index)
        for index in _candidates(schema, union, writer)
        if (match := match_types(schema.follow(union.branches[index]), writer)) is not None
    ]
    if not found:
        return None
    match, index = min(found, key=lambda one: (one[0].value, one[1]))
    # fastavro and a literal reading of the specification take the first branch that fits at all.
    first = min(one for _, one in found)
    return Choice(index=index, match=match, rival=first if first != index else None)


def _candidates(schema: Schema, union: Union, writer: Node) -> Iterable[int]:
    """Returns the branches that may match, so that two unions of thousands of types meet in linear time."""
    table = _branch_table(schema, union)
    if isinstance(writer, Record | Enum | Fixed):
        return sorted({*table.get(short_name(writer.name), ()), *table.get(f"alias {writer.name}", ())})
    types = (getattr(writer, "type", ""), *_PROMOTIONS.get(getattr(writer, "type", ""), ()))
    return sorted(index for one in types for index in table.get(f"type {one}", ()))


@functools.lru_cache(256)
def _branch_table(schema: Schema, union: Union) -> Mapping[str, list[int]]:
    table: dict[str, list[int]] = {}
    for index, branch in enumerate(union.branches):
        node = schema.follow(branch)
        keys = [f"type {node.type}"]
        if isinstance(node, Record | Enum | Fixed):
            keys = [short_name(node.name), *(f"alias {one}" for one in node.aliases)]
        for key in keys:
            table.setdefault(key, []).append(index)
    return table


def match_fields(reader: Record, writer: Record) -> tuple[FieldMatch, ...]:
    """Says for each field of the reader which field of the writer feeds it.

    As in Avro Java, aliases rename the writer's fields: an alias wins over a field of the reader that still has the
    old name.
    """
    claims = {alias: one for one in reversed(reader.fields) for alias in one.aliases if alias != one.name}
    feeds: dict[str, list[Field]] = {}
    for one in writer.fields:
        target = claims[one.name].name if one.name in claims else one.name
        feeds.setdefault(target, []).append(one)
    written = {one.name for one in writer.fields}
    return tuple(
        _field_match(one, reader, feeds=feeds.get(one.name, []), claims=claims, written=written)
        for one in reader.fields
    )


def _field_match(
    one: Field, reader: Record, *, feeds: list[Field], claims: Mapping[str, Field], written: set[str]
) -> FieldMatch:
    wanted = {name for name in one.aliases if name in written}
    rivals = [other for other in reader.fields if other is not one and wanted & set(other.aliases)]
    stolen = one.name in claims and one.name in written
    return FieldMatch(
        reader=one,
        writers=tuple(feeds),
        rival=rivals[0] if rivals else None,
        steals=claims[one.name].name if stolen else None,
    )
