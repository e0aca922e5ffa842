"""Parses a schema once, into frozen nodes with full names; refuse what no decoder should ever see.

Rules: Avro specification 1.12, "Schema Declaration" and "Names". As in Avro Java, a short name that is unknown in its
namespace is looked up without namespace, a reference may be written ``{"type": "Name"}``, and a type must be defined
before it is used. The limits bound what a hostile registry entry can cost: they are far above real schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn

from outboxkit.avro.model.defaults import default_fault
from outboxkit.avro.model.logical_types import logical_of
from outboxkit.avro.model.nodes import (
    ABSENT,
    PRIMITIVES,
    Array,
    Enum,
    Field,
    Fixed,
    Flaw,
    Map,
    Named,
    Node,
    Primitive,
    Record,
    Ref,
    Schema,
    Union,
    namespace_of,
)
from outboxkit.avro.model.sizes import endless_records
from outboxkit.errors import SchemaError

__all__ = ["MAX_DEPTH", "MAX_NAMES", "MAX_SIZE", "parse"]

MAX_DEPTH: Final = 64
"""Nesting of type definitions: parsers of every language recurse here."""
MAX_SIZE: Final = 256 * 1024
"""Bytes of schema text: a registry entry is refused before it is parsed."""
MAX_NAMES: Final = 10_000
"""Names (types, fields, symbols, aliases) of one schema: the checker's work grows with them."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ORDERS: Final = ("ascending", "descending", "ignore")


def parse(source: object, *, references: Iterable[Schema] = (), lenient: bool = False) -> Schema:
    """Parses one schema document; returns its frozen form.

    Args:
        source: JSON text (``str`` or ``bytes``), or the JSON value itself. A bare name such as ``int`` may be
            given without quotes.
        references: schemas whose named types this one may use (registry references).
        lenient: keep flaws (invalid defaults, other letters in names, no finite value) in ``Schema.flaws`` instead of
            refusing them. Meant for writer schemas of others: a writer's defaults are never used.

    Raises:
        SchemaError: the text is no schema; the message names the JSON pointer.
    """
    value = _load(source)
    state = _State(names={name: node for known in references for name, node in known.names.items()})
    root = state.node(value, _Place())
    flaws = (*state.flaws, *_bad_defaults(state.names, state.defaults), *_endless(state.names))
    if flaws and not lenient:
        _refuse(flaws[0].pointer, flaws[0].message)
    return Schema(root=root, names=dict(state.names), source=value, flaws=flaws)


def _load(source: object) -> object:
    if isinstance(source, bytes):
        try:
            source = source.decode()
        except UnicodeDecodeError as error:
            raise SchemaError(f"the schema is not UTF-8 text: {error}") from error
    if isinstance(source, str):
        return _load_text(source)
    try:
        size = len(json.dumps(source))
    except (RecursionError, TypeError, ValueError) as error:
        raise SchemaError(f"the schema is not a JSON value, or nested too deeply: {type(error).__name__}") from error
    return _sized(source, size)


def _load_text(text: str) -> object:
    _sized(text, len(text))
    if text.strip() in PRIMITIVES:
        return text.strip()
    try:
        return json.loads(text)
    except RecursionError as error:
        raise SchemaError("the schema text is nested too deeply") from error
    except ValueError as error:
        raise SchemaError(f"the schema text is not JSON: {error}") from error


def _sized(value: object, size: int) -> object:
    if size > MAX_SIZE:
        raise SchemaError(f"the schema has {size} characters, more than the limit of {MAX_SIZE}")
    return value


def _refuse(pointer: str, why: str) -> NoReturn:
    raise SchemaError(f"{why} (at {pointer or '/'})")


@dataclass(frozen=True, slots=True)
class _Place:
    """Place in the document, and the namespace of names without dots."""

    pointer: str = ""
    space: str = ""
    depth: int = 0

    def down(self, step: str, space: str | None = None) -> _Place:
        return _Place(f"{self.pointer}/{step}", self.space if space is None else space, self.depth + 1)


@dataclass(slots=True)
class _State:
    """State of one parse."""

    names: dict[str, Named]
    count: int = 0
    flaws: list[Flaw] = field(default_factory=list)
    defaults: list[Field] = field(default_factory=list)
    open: set[str] = field(default_factory=set)

    def node(self, value: object, at: _Place) -> Node:
        if at.depth > MAX_DEPTH:
            _refuse(at.pointer, f"the schema is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, str):
            return self._used(value, at, value)
        if isinstance(value, list):
            return self._union(value, at)
        if isinstance(value, Mapping):
            return self._object(value, at)
        _refuse(at.pointer, f"a schema is a name, a list or an object, not {type(value).__name__}")

    def _object(self, value: Mapping[str, object], at: _Place) -> Node:
        kind = value.get("type")
        if not isinstance(kind, str):
            if "type" not in value:
                _refuse(at.pointer, 'an object needs "type"')
            return self.node(kind, at.down("type"))
        if kind in PRIMITIVES:
            return Primitive(type=kind, logical=logical_of(kind, value), pointer=at.pointer, fragment=value)
        if kind == "array":
            return Array(items=self._child(value, "items", at), pointer=at.pointer, fragment=value)
        if kind == "map":
            return Map(values=self._child(value, "values", at), pointer=at.pointer, fragment=value)
        if kind in ("record", "error", "enum", "fixed"):
            return self._named(kind, value, at)
        return self._used(kind, at, value)

    def _child(self, value: Mapping[str, object], key: str, at: _Place) -> Node:
        if key not in value:
            _refuse(at.pointer, f'"{value["type"]}" needs "{key}"')
        return self.node(value[key], at.down(key))

    def _union(self, value: list[object], at: _Place) -> Union:
        branches = tuple(self.node(one, at.down(str(number))) for number, one in enumerate(value))
        seen: set[str] = set()
        for number, branch in enumerate(branches):
            label = branch.name if isinstance(branch, Ref | Record | Enum | Fixed) else branch.type
            if label == "union":
                _refuse(f"{at.pointer}/{number}", "a union may not hold a union directly")
            if label in seen:
                _refuse(f"{at.pointer}/{number}", f"the union holds {label} twice")
            seen.add(label)
        return Union(branches=branches, pointer=at.pointer, fragment=value)

    def _used(self, name: str, at: _Place, fragment: object) -> Node:
        if name in PRIMITIVES:
            return Primitive(type=name, pointer=at.pointer, fragment=fragment)
        full = name if "." in name or not at.space else f"{at.space}.{name}"
        for candidate in (full, name):
            if candidate in self.names or candidate in self.open:
                return Ref(name=candidate, pointer=at.pointer, fragment=fragment)
        _refuse(at.pointer, f"the type {full} is not defined before this place")

    def _named(self, kind: str, value: Mapping[str, object], at: _Place) -> Named:
        name = self._full_name(value, at)
        if name in self.names or name in self.open:
            _refuse(at.pointer, f"the type {name} is defined twice")
        self.open.add(name)
        aliases = self._aliases(value, at.pointer, namespace_of(name))
        if kind == "enum":
            node: Named = self._enum(value, name, aliases, at.pointer)
        elif kind == "fixed":
            node = self._fixed(value, name, aliases, at.pointer)
        else:
            node = Record(
                name=name,
                fields=self._fields(value, at, namespace_of(name)),
                aliases=aliases,
                error=kind == "error",
                doc=_doc(value),
                pointer=at.pointer,
                fragment=value,
            )
        self.open.discard(name)
        self.names[name] = node
        return node

    def _full_name(self, value: Mapping[str, object], at: _Place) -> str:
        name, pointer = value.get("name"), at.pointer
        if not isinstance(name, str):
            _refuse(pointer, f'"{value["type"]}" needs a "name"')
        given = value.get("namespace", at.space)
        if not isinstance(given, str):
            _refuse(f"{pointer}/namespace", "a namespace is a string")
        full = name.removeprefix(".") if "." in name or not given else f"{given}.{name}"
        self._counted(full, pointer)
        if full.rpartition(".")[2] in PRIMITIVES:
            _refuse(f"{pointer}/name", f"{full} has the name of a primitive type")
        return full

    def _counted(self, name: str, pointer: str) -> None:
        self.count += 1
        if self.count > MAX_NAMES:
            _refuse(pointer, f"the schema has more than {MAX_NAMES} names")
        for part in name.split("."):
            if _NAME.fullmatch(part):
                continue
            message = f"{name!r} is not a name: letters, digits and _, not starting with a digit"
            if not part.isidentifier():  # letters and digits of every script, as Java writes them
                _refuse(pointer, message)
            self.flaws.append(Flaw(pointer=pointer, message=message))

    def _aliases(self, value: Mapping[str, object], pointer: str, space: str) -> tuple[str, ...]:
        given = value.get("aliases", ())
        if not isinstance(given, list | tuple) or not all(isinstance(one, str) for one in given):
            _refuse(f"{pointer}/aliases", "aliases are a list of names")
        for one in given:
            self._counted(one, f"{pointer}/aliases")
        return tuple(one if "." in one or not space else f"{space}.{one}" for one in given)

    def _fields(self, value: Mapping[str, object], at: _Place, space: str) -> tuple[Field, ...]:
        given = value.get("fields")
        if not isinstance(given, list):
            _refuse(at.pointer, 'a record needs "fields", a list')
        fields = tuple(self._field(one, at.down(f"fields/{number}", space)) for number, one in enumerate(given))
        seen: set[str] = set()
        for one in fields:
            if one.name in seen:
                _refuse(one.pointer, f"the field {one.name} is there twice")
            seen.add(one.name)
        return fields

    def _field(self, value: object, at: _Place) -> Field:
        pointer = at.pointer
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or "type" not in value:
            _refuse(pointer, 'a field is an object with "name" and "type"')
        name: str = value["name"]
        if "." in name:
            _refuse(f"{pointer}/name", f"the field name {name!r} holds a dot")
        self._counted(name, f"{pointer}/name")
        order = value.get("order", "ascending")
        if order not in _ORDERS:
            _refuse(f"{pointer}/order", f"order is one of {', '.join(_ORDERS)}")
        node = Field(
            name=name,
            node=self.node(value["type"], _Place(f"{pointer}/type", at.space, at.depth)),
            default=value.get("default", ABSENT),
            aliases=self._aliases(value, pointer, ""),
            order=order,
            doc=_doc(value),
            pointer=pointer,
            fragment=value,
        )
        if node.default is not ABSENT:
            self.defaults.append(node)
        return node

    def _enum(self, value: Mapping[str, object], name: str, aliases: tuple[str, ...], pointer: str) -> Enum:
        symbols = value.get("symbols")
        if not isinstance(symbols, list) or not all(isinstance(one, str) for one in symbols):
            _refuse(pointer, 'an enum needs "symbols", a list of names')
        for index, one in enumerate(symbols):
            self._counted(one, f"{pointer}/symbols/{index}")
        if any("." in one for one in symbols) or len(set(symbols)) != len(symbols):
            _refuse(f"{pointer}/symbols", "the symbols are not unique names without dots")
        default = value.get("default")
        if default is not None and default not in symbols:
            _refuse(f"{pointer}/default", f"the enum default {default!r} is not one of its symbols")
        return Enum(
            name=name,
            symbols=tuple(symbols),
            default=None if default is None else str(default),
            aliases=aliases,
            doc=_doc(value),
            pointer=pointer,
            fragment=value,
        )

    def _fixed(self, value: Mapping[str, object], name: str, aliases: tuple[str, ...], pointer: str) -> Fixed:
        size = value.get("size")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**31:
            _refuse(f"{pointer}/size", 'a fixed needs "size", a whole number from 0 to 2^31-1')
        return Fixed(
            name=name,
            size=size,
            logical=logical_of("fixed", value),
            aliases=aliases,
            doc=_doc(value),
            pointer=pointer,
            fragment=value,
        )


def _doc(value: Mapping[str, object]) -> str | None:
    doc = value.get("doc")
    return doc if isinstance(doc, str) else None


def _bad_defaults(names: Mapping[str, Named], fields: Iterable[Field]) -> Iterable[Flaw]:
    # Only now are all names known: a default may use a type that is defined further down.
    for one in fields:
        fault = default_fault(names, one.node, one.default)
        if fault is not None:
            yield Flaw(pointer=f"{one.pointer}/default", message=f"the default of {one.name} is invalid: {fault}")


def _endless(names: Mapping[str, Named]) -> Iterable[Flaw]:
    for record in endless_records(names):
        why = f"the record {record.name} has no finite value: it always holds itself, or an enum without symbols"
        yield Flaw(pointer=record.pointer, message=why)
