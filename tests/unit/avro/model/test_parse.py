"""What is a schema and what is not; where the fault is; what names mean."""

from __future__ import annotations

from typing import Any

import pytest

from outboxkit.avro.model.nodes import Array, Primitive, Record, Ref
from outboxkit.avro.model.parse import parse
from outboxkit.errors import SchemaError


def _record(*fields: Any, **more: Any) -> dict[str, Any]:
    return {"type": "record", "name": "R", "fields": list(fields), **more}


REFUSED: list[tuple[Any, str]] = [
    ("{", "not JSON"),
    (b"\xff", "not UTF-8"),
    ("3", "a schema is a name, a list or an object"),
    ('"Unknown"', "Unknown is not defined"),
    ({}, 'an object needs "type"'),
    ({"type": "array"}, 'needs "items"'),
    ({"type": "map"}, 'needs "values"'),
    ({"type": "record", "fields": []}, 'needs a "name"'),
    ({"type": "record", "name": "R"}, 'needs "fields"'),
    (_record({"name": "a"}), '"name" and "type" (at /fields/0)'),
    (_record({"name": "a", "type": "int"}, {"name": "a", "type": "int"}), "there twice (at /fields/1)"),
    (_record({"name": "1a", "type": "int"}), "is not a name"),
    (_record({"name": "a.b", "type": "int"}), "holds a dot"),
    (_record({"name": "a", "type": "int", "order": "up"}), "order is one of"),
    (_record({"name": "a", "type": "int", "aliases": "b"}), "aliases are a list"),
    (_record({"name": "a", "type": "nope"}), "nope is not defined before this place (at /fields/0/type)"),
    (_record({"name": "a", "type": "int", "default": 1.0}), "not a value of type int (at /fields/0/default)"),
    (_record({"name": "a", "type": "int", "default": True}), "not a value of type int"),
    (_record({"name": "a", "type": "int", "default": 2**31}), "not a value of type int"),
    (_record({"name": "a", "type": "bytes", "default": "\u0100"}), "not a value of type bytes"),
    (_record({"name": "a", "type": {"type": "fixed", "name": "F", "size": 2}, "default": "a"}), "not 2 bytes"),
    (_record({"name": "a", "type": ["null", "int"], "default": "x"}), "matches no branch"),
    (
        _record({"name": "a", "type": _record({"name": "b", "type": "int"}, name="S"), "default": {}}),
        "field b: no value",
    ),
    (_record({"name": "a", "type": "R"}), "has no finite value"),
    (_record(name="int"), "primitive type"),
    (_record(name="a-b"), "is not a name"),
    ({"type": "enum", "name": "E", "symbols": ["A", "A"]}, "not unique"),
    ({"type": "enum", "name": "E", "symbols": ["A"], "default": "B"}, "not one of its symbols"),
    ({"type": "enum", "name": "E", "symbols": "A"}, 'needs "symbols"'),
    ({"type": "fixed", "name": "F", "size": -1}, 'needs "size"'),
    ({"type": "fixed", "name": "F", "size": True}, 'needs "size"'),
    (["int", "int"], "int twice (at /1)"),
    (["null", ["int"]], "may not hold a union directly"),
    ([_record(), _record()], "defined twice"),
]


@pytest.mark.parametrize(("source", "why"), REFUSED, ids=[f"{n} {why}" for n, (_, why) in enumerate(REFUSED)])
def test_what_is_no_schema_is_refused_with_its_place(source: Any, why: str) -> None:
    with pytest.raises(SchemaError) as caught:
        parse(source)

    assert why in str(caught.value)


def test_flaws_of_others_can_be_tolerated() -> None:
    made = parse(_record({"name": "a", "type": "int", "default": "x"}), lenient=True)

    assert [(one.pointer, "not a value of type int" in one.message) for one in made.flaws] == [
        ("/fields/0/default", True)
    ]


def test_nested_types_live_in_the_namespace_around_them() -> None:
    inner = {"type": "record", "name": "In", "fields": [{"name": "again", "type": ["null", "Out"]}]}
    made = parse({"type": "record", "name": "a.b.Out", "fields": [{"name": "i", "type": inner}]})

    assert set(made.names) == {"a.b.Out", "a.b.In"}


def test_a_name_with_a_dot_ignores_the_namespace_and_an_empty_one_means_none() -> None:
    dotted = {"type": "record", "name": "x.R", "namespace": "ignored", "fields": []}
    empty = {"type": "record", "name": "S", "namespace": "", "fields": []}
    made = parse({
        "type": "record",
        "name": "n.T",
        "fields": [{"name": "a", "type": dotted}, {"name": "b", "type": empty}],
    })

    assert set(made.names) == {"n.T", "x.R", "S"}


def test_type_aliases_are_completed_by_the_namespace_of_their_type() -> None:
    node = parse({"type": "record", "name": "a.b", "aliases": ["c", "x.y"], "fields": []}).names["a.b"]

    assert node.aliases == ("a.c", "x.y")


def test_nodes_know_where_they_are_written() -> None:
    made = parse(
        _record({"name": "a", "type": {"type": "array", "items": "int"}}, {"name": "b", "type": ["null", "R"]})
    )
    root = made.root
    assert isinstance(root, Record)
    array, union = (one.node for one in root.fields)

    assert isinstance(array, Array)
    assert (array.pointer, array.items.pointer) == ("/fields/0/type", "/fields/0/type/items")
    assert union.fragment == ["null", "R"]
    assert isinstance(made.follow(Ref(name="R")), Record)


@pytest.mark.parametrize(
    "source",
    [
        {"type": "string", "logicalType": "decimal", "precision": 2},
        {"type": "bytes", "logicalType": "decimal"},
        {"type": "bytes", "logicalType": "decimal", "precision": 2, "scale": 3},
        {"type": "bytes", "logicalType": "decimal", "precision": 10**9},
        {"type": "long", "logicalType": "date"},
        {"type": "long", "logicalType": "no-such-type"},
        {"type": "long", "logicalType": ["timestamp-millis"]},
    ],
)
def test_logical_types_that_are_invalid_or_unknown_are_ignored(source: dict[str, Any]) -> None:
    root = parse(source).root

    assert isinstance(root, Primitive)
    assert root.logical is None


def test_a_schema_may_use_types_of_others() -> None:
    money = parse({"type": "record", "name": "shop.Money", "fields": []})
    made = parse(
        {"type": "record", "name": "shop.Order", "fields": [{"name": "t", "type": "Money"}]}, references=[money]
    )

    assert set(made.names) == {"shop.Money", "shop.Order"}
