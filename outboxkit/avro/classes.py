"""Classes and schemas: the Avro schema of an event class, and whether a class and a schema file agree.

A dataclass, a msgspec Struct and a pydantic model say the same things: names, types, defaults. The schema file stays
the contract. Derive it once, keep the file, and let a test hold the class against it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum as PyEnum
from typing import Annotated, Any, Final, NewType, Union
from uuid import UUID

from outboxkit.avro.model.nodes import ABSENT, Array, Enum, Fixed, Map, Node, Primitive, Record, Ref, Schema, short_name
from outboxkit.avro.model.nodes import Union as UnionNode
from outboxkit.errors import SchemaError

__all__ = ["Avro", "disagreements", "excluded", "schema_of"]


@dataclass(frozen=True)
class Avro:
    """Says the Avro type of a field: ``Annotated[Decimal, Avro({"type": "bytes", "logicalType": "decimal", …})]``."""

    type: Any


def _logical(base: str, name: str) -> dict[str, Any]:
    return {"type": base, "logicalType": name}


_WRITTEN: Final[Mapping[Any, Any]] = {
    type(None): "null",
    bool: "boolean",
    int: "long",
    float: "double",
    str: "string",
    bytes: "bytes",
    dt.datetime: _logical("long", "timestamp-micros"),
    dt.date: _logical("int", "date"),
    dt.time: _logical("long", "time-micros"),
    UUID: _logical("string", "uuid"),
}

# What a field of this type may be in a schema: Avro types, or names of logical types.
_TAKEN: Final[Mapping[Any, frozenset[str]]] = {
    type(None): frozenset({"null"}),
    bool: frozenset({"boolean"}),
    int: frozenset({"int", "long"}),
    float: frozenset({"float", "double"}),
    str: frozenset({"string", "enum"}),
    bytes: frozenset({"bytes", "fixed"}),
    dt.datetime: frozenset({
        "timestamp-millis",
        "timestamp-micros",
        "local-timestamp-millis",
        "local-timestamp-micros",
    }),
    dt.date: frozenset({"date"}),
    dt.time: frozenset({"time-millis", "time-micros"}),
    Decimal: frozenset({"decimal"}),
    UUID: frozenset({"uuid"}),
}


@dataclass(frozen=True, slots=True)
class _Member:
    """One field of a class; `default` is `ABSENT` when it has none that JSON could say."""

    name: str
    hint: Any
    default: object


# --- from a class to a schema ------------------------------------------------------------------------------------


def schema_of(cls: type, *, namespace: str = "") -> dict[str, Any]:
    """The Avro schema of an event class, as parsed JSON.

    Whole numbers become ``long``, instants ``timestamp-micros``; `Avro` says otherwise. Members of an Enum are symbols
    by their values. Defaults of the class become defaults of the schema, where JSON can say them.

    Args:
        cls: a dataclass, msgspec Struct or pydantic model.
        namespace: of its records and enums.

    Raises:
        SchemaError: a type that Avro does not have, or a Decimal without precision and scale; names the field.
    """
    if not _is_record(cls):
        raise SchemaError(f"{cls.__name__} is no dataclass, msgspec Struct or pydantic model")
    made: dict[str, Any] = _Deriving(namespace).type_of(cls, cls.__name__)
    return made


class _Deriving:
    """One derivation: a named type is written out once and then used by its name."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.named: dict[str, type] = {}

    def of(self, hint: Any, path: str) -> Any:
        hint, said = _unwrapped(hint)
        if said is not None:
            return said.type
        if alternatives := _alternatives(hint):
            return [self.of(one, path) for one in sorted(alternatives, key=lambda one: one is not type(None))]
        if values := _values(hint):
            if values[0] is not str:
                raise SchemaError(f"{path}: the keys of an Avro map are text")
            return {"type": "map", "values": self.of(values[1], f"{path}{{}}")}
        if items := _items(hint):
            return {"type": "array", "items": self.of(items[0], f"{path}[]")}
        if hint in _WRITTEN:
            return _WRITTEN[hint]
        if isinstance(hint, type) and (issubclass(hint, PyEnum) or _is_record(hint)):
            return self.type_of(hint, path)
        raise SchemaError(f"{path}: Avro has no type for {_said(hint)}; say one: Annotated[…, Avro(…)]")

    def type_of(self, cls: type, path: str) -> Any:
        name = f"{self.namespace}.{cls.__name__}" if self.namespace else cls.__name__
        if name in self.named:
            if self.named[name] is not cls:
                raise SchemaError(f"{path}: two classes are called {cls.__name__}")
            return name
        self.named[name] = cls
        if issubclass(cls, PyEnum):
            return {"type": "enum", "name": name, "symbols": [one.value for one in cls]}
        return {
            "type": "record",
            "name": name,
            "fields": [self._field(one, f"{path}.{one.name}") for one in _members(cls)],
        }

    def _field(self, member: _Member, path: str) -> dict[str, Any]:
        made = {"name": member.name, "type": self.of(member.hint, path)}
        if member.default is ABSENT:
            return made
        default = member.default.value if isinstance(member.default, PyEnum) else member.default
        if isinstance(default, tuple | set | frozenset):
            default = list(default)
        if default is None or isinstance(default, bool | int | float | str) or default in ([], {}):
            made["default"] = default
            if isinstance(made["type"], list) and default is not None:  # older implementations look at the first type
                made["type"] = sorted(made["type"], key=lambda one: one == "null")
        return made


# --- whether a class and a schema agree --------------------------------------------------------------------------


def disagreements(cls: type, schema: Schema) -> list[str]:
    """Lists where a class writes what its schema lacks, or the schema holds what the class cannot take.

    Annotations that say nothing (``Any``, a ``Literal``) agree with everything.

    Args:
        cls: a dataclass, msgspec Struct or pydantic model.
        schema: what it is written and read with.

    Returns:
        One line for each, with the path of the field; empty when they agree.
    """
    return list(_Comparing(schema).node(cls, schema.root, cls.__name__))


class _Comparing:
    """One comparison; recursive classes are looked at once."""

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.seen: set[tuple[type, str]] = set()

    def node(self, hint: Any, node: Node, path: str) -> Iterator[str]:
        hint, _ = _unwrapped(hint)
        hints = [_unwrapped(one)[0] for one in _alternatives(hint) or (hint,)]
        node = self.schema.follow(node)
        nodes = [self.schema.follow(one) for one in (node.branches if isinstance(node, UnionNode) else (node,))]
        if not all(map(_says_something, hints)):
            return
        records = sum(isinstance(one, Record) for one in nodes)
        pairs = [(one, other) for one in hints for other in nodes if _is_alike(one, other, by_name=records > 1)]
        for one in hints:
            if all(found is not one for found, _ in pairs):
                yield f"{path}: the class has {_said(one)}, the schema {' or '.join(map(_kind, nodes))}"
        for other in nodes:
            if all(found is not other for _, found in pairs) and len(nodes) > 1:
                yield f"{path}: the schema may hold {_kind(other)}, which the class does not take"
        for one, other in pairs:
            yield from self._inside(one, other, path)

    def _inside(self, hint: Any, node: Node, path: str) -> Iterator[str]:
        if isinstance(node, Array):
            for item in _items(hint)[:1]:
                yield from self.node(item, node.items, f"{path}[]")
        elif isinstance(node, Map):
            for value in _values(hint)[1:]:
                yield from self.node(value, node.values, f"{path}{{}}")
        elif isinstance(node, Enum) and isinstance(hint, type) and issubclass(hint, PyEnum):
            members = {one.value for one in hint}
            yield from (f"{path}: the schema lacks the symbol {one}" for one in sorted(members - set(node.symbols)))
            yield from (f"{path}: the class lacks the symbol {one}" for one in node.symbols if one not in members)
        elif isinstance(node, Record) and (hint, node.name) not in self.seen:
            self.seen.add((hint, node.name))
            yield from self._record(hint, node, path)

    def _record(self, cls: type, node: Record, path: str) -> Iterator[str]:
        fields, members = {one.name: one for one in node.fields}, {one.name: one for one in _members(cls)}
        for name, member in members.items():
            if name in fields:
                yield from self.node(member.hint, fields[name].node, f"{path}.{name}")
            else:
                yield f"{path}.{name}: the schema has no such field"
        for name, field in fields.items():
            if name not in members and field.default is ABSENT:
                yield f"{path}.{name}: the class has no such field, and the schema no default for it"


def _is_alike(hint: Any, node: Node, *, by_name: bool) -> bool:
    """True if a value of the hint may be of this type, by kind; its parts are looked at later."""
    if isinstance(node, Record):
        is_record = isinstance(hint, type) and _is_record(hint)
        return is_record and (not by_name or short_name(node.name) == hint.__name__)
    if isinstance(node, Array):
        return bool(_items(hint))
    if isinstance(node, Map):
        return bool(_values(hint))
    if isinstance(hint, type) and issubclass(hint, PyEnum):
        return isinstance(node, Enum) or (issubclass(hint, str) and _kind(node) == "string")
    return _kind(node) in _TAKEN.get(hint, frozenset())


def _kind(node: Node) -> str:
    """The name of its logical type, else of its type; with its own name when it has one."""
    if isinstance(node, Primitive | Fixed) and node.logical is not None:
        return node.logical.name
    return "a reference" if isinstance(node, Ref) else node.type


# --- what an annotation says -------------------------------------------------------------------------------------


def _unwrapped(hint: Any) -> tuple[Any, Avro | None]:
    """The type behind `Annotated` and `NewType`, and what `Avro` says of it."""
    said: Avro | None = None
    while True:
        if typing.get_origin(hint) is Annotated:
            said = said or next((one for one in hint.__metadata__ if isinstance(one, Avro)), None)
            hint = hint.__origin__
        elif isinstance(hint, NewType):
            hint = hint.__supertype__
        else:
            return hint, said


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _values(hint: Any) -> tuple[Any, ...]:
    """Types of keys and values of a mapping."""
    origin = typing.get_origin(hint) or hint
    is_mapping = isinstance(origin, type) and issubclass(origin, Mapping)
    return (typing.get_args(hint) or (str, Any)) if is_mapping else ()


def _items(hint: Any) -> tuple[Any, ...]:
    """Type of the items of a list, set, or tuple of any length."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if not isinstance(origin, type) or not issubclass(origin, Collection) or _values(hint) or origin in _TAKEN:
        return ()
    if issubclass(origin, tuple):
        return arguments[:1] if arguments[1:] == (Ellipsis,) else ()
    return () if issubclass(origin, PyEnum) else (arguments or (Any,))


def _says_something(hint: Any) -> bool:
    known = hint in _TAKEN or bool(_values(hint)) or bool(_items(hint))
    return known or (isinstance(hint, type) and (issubclass(hint, PyEnum) or _is_record(hint)))


def _said(hint: Any) -> str:
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _is_record(cls: type) -> bool:
    return dataclasses.is_dataclass(cls) or hasattr(cls, "__struct_fields__") or hasattr(cls, "model_fields")


def _members(cls: type) -> list[_Member]:
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise SchemaError(f"{cls.__name__}: {error.name} is known to type checkers only") from error
    left_out = excluded(cls)
    known = ((name, default) for name, default in _defaults(cls).items() if name not in left_out)
    return [_Member(name, hints.get(name, Any), default) for name, default in known]


@functools.cache
def excluded(cls: type) -> frozenset[str]:
    """Names the fields of a pydantic class that it leaves out of everything it writes (``Field(exclude=True)``)."""
    fields = getattr(cls, "__pydantic_fields__", None) or getattr(cls, "model_fields", None)
    return frozenset(name for name, one in fields.items() if one.exclude) if isinstance(fields, dict) else frozenset()


def _defaults(cls: type) -> dict[str, object]:
    """The default of every field, `ABSENT` where there is none that is the same every time."""
    if dataclasses.is_dataclass(cls):
        found = {one.name: (one.default, one.default_factory) for one in dataclasses.fields(cls) if one.init}
        return {name: _default(dataclasses.MISSING, *given) for name, given in found.items()}
    if names := getattr(cls, "__struct_fields__", None):
        given = getattr(cls, "__struct_defaults__", ())
        required = [ABSENT] * (len(names) - len(given))
        return dict(zip(names, [*required, *map(_of_struct, given)], strict=True))
    return {
        name: ABSENT if one.is_required() else _default(None, one.default, one.default_factory)
        for name, one in getattr(cls, "model_fields", {}).items()
    }


def _default(missing: object, default: object, factory: Any) -> object:
    if factory is missing or factory is None:
        return ABSENT if default is dataclasses.MISSING else default
    return factory() if factory in (list, dict, set, tuple, frozenset) else ABSENT


def _of_struct(default: object) -> object:
    """Msgspec's marks: something with a factory, or a thing that says that there is no default."""
    factory = getattr(default, "factory", None)
    if factory is not None:
        return _default(None, None, factory)
    return ABSENT if type(default).__name__ == "NoDefaultType" else default
