"""Checks a value before it is written, and say which field is wrong: a poison message must not leave the transaction.

`preparer` compiles a schema into closures that check a value and return it in the form the encoder library writes
without choosing anything itself: whole numbers in range, no unknown and no forgotten keys, aware datetimes, union
branches named. What the library would write although no reader can read it is refused here.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from outboxkit.avro.binary.scalars import Prepare, Unfit, leaf, plain_type, string, symbol, unfit
from outboxkit.avro.binary.union_branch import union
from outboxkit.avro.classes import excluded
from outboxkit.avro.compatibility.examples import branch_name
from outboxkit.avro.model.nodes import ABSENT, Array, Enum, Field, Map, Node, Primitive, Record, Schema, Union
from outboxkit.errors import EncodeError

__all__ = ["Prepare", "preparer"]

_INT: Final = 2**31
_WORTH_IT: Final = 2
"""Plain fields from which on the quick way is quicker."""
MakeDefault = Callable[[Schema, Field], Callable[[], object]]

_MAX_FRAMES: Final = "the value is nested too deeply"


def preparer(schema: Schema, default: MakeDefault, *, quick: bool = True) -> Prepare:
    """Compiles the check of values of `schema`.

    Args:
        schema: the writer's schema.
        default: returns a function that makes a fresh Python value of a field's default, for keys left out.
        quick: leave to the encoder library what it refuses itself. Without it every fault is found here, with its path.
    """
    prepare = _Compiler(schema, default, quick=quick).node(schema.root)

    def checked(value: Any) -> Any:
        try:
            return prepare(value)
        except RecursionError:
            raise EncodeError(_MAX_FRAMES) from None

    return checked


def _later(made: list[Prepare]) -> Prepare:
    return lambda value: made[0](value)  # noqa: PLW0108  the list is still empty


def _at(error: EncodeError, step: str) -> EncodeError:
    joint = "" if not error.path or error.path[0] in "[{" else "."
    error.path = f"{step}{joint}{error.path}"
    return error


class _Compiler:
    """Turns nodes into checks; recursive records find themselves by name."""

    def __init__(self, schema: Schema, default: MakeDefault, *, quick: bool) -> None:
        self.schema = schema
        self.quick = quick
        self.default = default
        self.made: dict[str, list[Prepare]] = {}

    def node(self, node: Node) -> Prepare:
        node = self.schema.follow(node)
        if isinstance(node, Record):
            return self._record(node)
        if isinstance(node, Union):
            return self._union(node)
        if isinstance(node, Array):
            return _array(self.node(node.items))
        if isinstance(node, Map):
            return _map(self.node(node.values))
        if isinstance(node, Enum):
            return symbol(node)
        return leaf(node)

    def _record(self, node: Record) -> Prepare:
        if node.name in self.made:
            made = self.made[node.name]
            return made[0] if made else _later(made)
        made = self.made[node.name] = []
        parts = tuple((one.name, self.node(one.node)) for one in node.fields)
        defaults = {one.name: self.default(self.schema, one) for one in node.fields if one.default is not ABSENT}
        careful = _record(parts, defaults)
        made.append(_quick_record(node, parts, careful) if self.quick else careful)
        return made[0]

    def _union(self, node: Union) -> Prepare:
        branches = [self.schema.follow(branch) for branch in node.branches]
        labels = [branch_name(self.schema, branch) for branch in branches]
        checks = [self.node(branch) for branch in node.branches]
        return union(branches, labels, checks)


def _is_int(node: Node) -> bool:
    return isinstance(node, Primitive) and node.type == "int"


def _quick_record(node: Record, parts: tuple[tuple[str, Prepare], ...], careful: Prepare) -> Prepare:
    """Checks the plain fields of a record at once, in loops that run in C; whatever is unusual takes the careful way.

    The caller's dict itself comes back when there is nothing to change in it.
    """
    types = {one.name: found for one in node.fields if (found := plain_type(one.node)) is not None}
    if len(types) < _WORTH_IT:
        return careful
    plain, expected = operator.itemgetter(*types), tuple(types.values())
    ints = tuple(one.name for one in node.fields if types.get(one.name) is int and _is_int(one.node))
    rest = tuple((name, prepare) for name, prepare in parts if name not in types)
    changed, size = _changed(rest, careful), len(parts)

    def record(value: Any) -> Any:
        if type(value) is not dict or len(value) != size:
            return careful(value)
        try:
            usual = tuple(map(type, plain(value))) == expected
        except KeyError:
            usual = False
        for name in ints:
            usual = usual and -_INT <= value[name] < _INT
        if not usual:
            return careful(value)
        return changed(value) if rest else value

    return record


def _changed(rest: tuple[tuple[str, Prepare], ...], careful: Prepare) -> Prepare:
    """Prepares the fields that are not plain, and copy the others."""

    def changed(value: dict[str, Any]) -> Any:
        made = dict(value)
        name = ""
        try:
            for name, prepare in rest:
                made[name] = prepare(value[name])
        except EncodeError as error:
            raise _at(error, name) from None
        except KeyError:
            return careful(value)
        return made

    return changed


def _record(parts: tuple[tuple[str, Prepare], ...], defaults: Mapping[str, Callable[[], object]]) -> Prepare:
    names = {name for name, _ in parts}

    def record(value: Any) -> dict[str, Any]:
        given = value if type(value) is dict else as_fields(value)
        made: dict[str, Any] = {}
        name = ""
        try:
            for name, prepare in parts:
                made[name] = prepare(given[name])
        except EncodeError as error:
            raise _at(error, name) from None
        except KeyError:
            return _completed(given, parts, defaults)
        if len(given) != len(made):
            _unknown(given, names)
        return made

    return record


def _completed(
    given: Mapping[str, Any], parts: tuple[tuple[str, Prepare], ...], defaults: Mapping[str, Callable[[], object]]
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, prepare in parts:
        if name not in given and name not in defaults:
            raise Unfit("the field is missing and has no default", path=name)
        try:
            made[name] = prepare(given[name] if name in given else defaults[name]())
        except EncodeError as error:
            raise _at(error, name) from None
    _unknown(given, {name for name, _ in parts})
    return made


def _unknown(given: Mapping[str, Any], names: set[str]) -> None:
    for name in given:
        if name not in names:
            raise Unfit("the schema has no such field", path=str(name)[:80])


def as_fields(value: object) -> Mapping[str, Any]:
    """Returns the fields of a mapping, dataclass, msgspec Struct or pydantic model."""
    if isinstance(value, Mapping):
        return value
    cls: type = type(value)
    left_out = excluded(cls)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [one.name for one in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if name not in left_out}
    fields = getattr(cls, "model_fields", None) or getattr(value, "__struct_fields__", None)
    if fields is None:
        unfit(value, "a record (a mapping, dataclass, msgspec Struct or pydantic model)")
    return {str(name): getattr(value, name) for name in fields if name not in left_out}


def _array(prepare: Prepare) -> Prepare:
    def array(value: Any) -> list[Any]:
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence | set | frozenset):
            unfit(value, "a list")
        made: list[Any] = []
        try:
            made.extend(map(prepare, value))
        except EncodeError as error:
            raise _at(error, f"[{len(made)}]") from None
        return made

    return array


def _map(prepare: Prepare) -> Prepare:
    def mapping(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            unfit(value, "a mapping")
        made: dict[str, Any] = {}
        try:
            for key, item in value.items():
                string(key)
                made[key] = prepare(item)
        except EncodeError as error:
            raise _at(error, f"{{{len(made)}}}") from None
        return made

    return mapping
