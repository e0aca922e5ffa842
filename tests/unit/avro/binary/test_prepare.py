"""A value that no reader could read, or that would lose something, does not leave the transaction."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import types
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pytest

from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode, encode
from outboxkit.errors import EncodeError

DECIMAL = {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}
UTC = dt.datetime(2026, 11, 24, 9, 0, tzinfo=dt.UTC)


def _logical(base: str, name: str) -> dict[str, str]:
    return {"type": base, "logicalType": name}


REFUSED: list[tuple[Any, Any, str]] = [
    ("int", 2**31, "32 bits"),
    ("int", -(2**31) - 1, "32 bits"),
    ("int", True, "whole number"),
    ("int", 1.7, "whole number"),
    ("int", "1", "whole number"),
    ("long", 2**63, "64 bits"),
    ("float", 1e39, "does not fit into a float"),
    ("double", 10**400, "does not fit into a double"),
    ("double", True, "a number"),
    ("boolean", 1, "a boolean"),
    ("string", b"x", "text"),
    ("string", "\ud800", "lone surrogate"),
    ("bytes", "x", "bytes"),
    ("null", 0, "null"),
    ({"type": "fixed", "name": "F", "size": 2}, b"abc", "3 bytes instead of 2"),
    ({"type": "enum", "name": "E", "symbols": ["A"]}, "B", "not a symbol of E"),
    (DECIMAL, Decimal("100.00"), r"decimal\(4,2\)"),
    (DECIMAL, Decimal("1.001"), r"decimal\(4,2\)"),
    (DECIMAL, Decimal("NaN"), "not finite"),
    (DECIMAL, Decimal("1E+999999"), r"decimal\(4,2\)"),
    (DECIMAL, 1.5, "a Decimal"),
    (_logical("long", "timestamp-millis"), dt.datetime(2026, 1, 1), "naive"),  # noqa: DTZ001  it is the point
    (_logical("long", "local-timestamp-millis"), UTC, "has a time zone"),
    (_logical("int", "date"), UTC, "a datetime is not a date"),
    (_logical("int", "time-millis"), dt.time(1, tzinfo=dt.UTC), "has a time zone"),
    (_logical("int", "time-millis"), -1, "time of day"),
    (_logical("string", "uuid"), "not-a-uuid", "not a UUID"),
    ({"type": "array", "items": "int"}, "12", "a list"),
    ({"type": "map", "values": "int"}, [1], "a mapping"),
    ({"type": "map", "values": "int"}, {1: 1}, "text"),
    (["null", "int"], "x", "whole number"),
    (["int", "string"], b"x", "any branch"),
]


@pytest.mark.parametrize(("schema", "value", "why"), REFUSED)
def test_an_unfit_value_is_refused(schema: Any, value: Any, why: str) -> None:
    with pytest.raises(EncodeError, match=why):
        encode(parse(schema), value)


KEPT: list[tuple[Any, Any]] = [
    ("int", 2**31 - 1),
    ("long", -(2**63)),
    ("float", 3.4028234663852886e38),
    ("float", float("inf")),
    ("string", "größer 🙂 \x00"),
    (DECIMAL, Decimal("99.99")),
    (DECIMAL, Decimal("-0.01")),
    (_logical("long", "timestamp-millis"), UTC),
    (_logical("int", "date"), dt.date(1, 1, 1)),
    (_logical("long", "time-micros"), dt.time(23, 59, 59, 999_999)),
    (_logical("string", "uuid"), uuid.UUID(int=2**127)),
    (["int", "long"], 2**40),
    (["float", "double"], 0.1),
    (["bytes", "string"], "x"),
    ([_logical("string", "uuid"), "bytes"], uuid.UUID(int=1)),
]


@pytest.mark.parametrize(("schema", "value"), KEPT)
def test_a_fit_value_comes_back(schema: Any, value: Any) -> None:
    made = parse(schema)

    assert decode(made, made, encode(made, value)) == value


ORDER: dict[str, Any] = {
    "type": "record",
    "name": "shop.Order",
    "fields": [
        {"name": "id", "type": "string"},
        {
            "name": "lines",
            "type": {
                "type": "array",
                "items": {"type": "record", "name": "Line", "fields": [{"name": "n", "type": "int"}]},
            },
        },
        {"name": "tags", "type": {"type": "map", "values": "int"}, "default": {}},
    ],
}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"id": 1, "lines": []}, "id"),
        ({"lines": []}, "id"),
        ({"id": "x", "lines": [{"n": 1}, {"n": "2"}]}, "lines[1].n"),
        ({"id": "x", "lines": [{"n": 1, "extra": 2}]}, "lines[0].extra"),
        ({"id": "x", "lines": [], "tags": {"a": 1, "b": None}}, "tags{1}"),
        ({"id": "x", "lines": [], "more": 1}, "more"),
        ({"id": "x", "lines": [3]}, "lines[0]"),
    ],
)
def test_the_error_names_the_field(value: Any, path: str) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(parse(ORDER), value)

    assert caught.value.path == path
    assert path in str(caught.value)


_FLAT: dict[str, Any] = {
    "type": "record",
    "name": "Flat",
    "fields": [{"name": kind[0], "type": kind} for kind in ("string", "long", "int", "double", "boolean")]
    + [{"name": "raw", "type": "bytes"}, {"name": "day", "type": {"type": "int", "logicalType": "date"}}],
}
_FLAT_VALUE: dict[str, Any] = {
    "s": "x",
    "l": 2**40,
    "i": 7,
    "d": 0.5,
    "b": True,
    "raw": b"x",
    "day": dt.date(2026, 11, 24),
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("s", "\ud800"),
        ("s", b"x"),
        ("l", 2**63),
        ("l", True),
        ("l", 1.0),
        ("i", 2**31),
        ("i", None),
        ("d", "1"),
        ("b", 1),
        ("raw", "x"),
        ("day", "x"),
        ("day", 2**31),
    ],
)
def test_the_quick_way_through_plain_fields_finds_the_same_faults(field: str, value: Any) -> None:
    made = parse(_FLAT)
    assert decode(made, made, encode(made, _FLAT_VALUE)) == _FLAT_VALUE

    for schema, path in ((_FLAT, field), ({"type": "array", "items": _FLAT}, f"[0].{field}")):
        broken = _FLAT_VALUE | {field: value}
        with pytest.raises(EncodeError) as caught:
            encode(parse(schema), [broken] if path[0] == "[" else broken)
        assert caught.value.path == path


def test_the_quick_way_takes_other_mappings_subclasses_and_whole_numbers_for_doubles() -> None:
    made = parse(_FLAT)

    class Text(str):
        __slots__ = ()

    value = _FLAT_VALUE | {"d": 1, "s": Text("x")}
    assert decode(made, made, encode(made, value)) == _FLAT_VALUE | {"d": 1.0}
    assert encode(made, types.MappingProxyType(_FLAT_VALUE)) == encode(made, _FLAT_VALUE)


def test_a_fault_at_the_bottom_of_a_deep_value_is_found_at_once() -> None:
    fields = [{"name": "a", "type": "int"}, {"name": "b", "type": "int"}, {"name": "next", "type": ["null", "L"]}]
    made = parse({"type": "record", "name": "L", "fields": fields})
    value: Any = {"a": 1, "b": "wrong", "next": None}
    for _ in range(80):
        value = {"a": 1, "b": 2, "next": value}

    with pytest.raises(EncodeError) as caught:
        encode(made, value)

    assert caught.value.path == "next." * 80 + "b"


@pytest.mark.parametrize(
    ("change", "path"),
    [({"s": 1}, "s"), ({"more": 1}, "more"), ({"day": None}, "day"), ({"i": 2**31, "day": "x"}, "i")],
)
def test_a_record_with_plain_and_other_fields_names_the_right_one(change: dict[str, Any], path: str) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(parse(_FLAT), _FLAT_VALUE | change)

    assert caught.value.path == path


def test_a_missing_field_among_plain_and_other_ones_is_named() -> None:
    for name in _FLAT_VALUE:
        value = {key: one for key, one in _FLAT_VALUE.items() if key != name}
        for given in (value, value | {"stranger": 1}):
            with pytest.raises(EncodeError) as caught:
                encode(parse(_FLAT), given)
            assert caught.value.path == name


def test_the_value_itself_is_not_in_the_message() -> None:
    with pytest.raises(EncodeError) as caught:
        encode(parse(ORDER), {"id": "x", "lines": [{"n": "secret-4711"}]})

    assert "4711" not in str(caught.value)


def test_a_field_that_is_left_out_gets_its_default() -> None:
    made = parse(ORDER)

    assert decode(made, made, encode(made, {"id": "x", "lines": []})) == {"id": "x", "lines": [], "tags": {}}


class State(enum.Enum):
    NEW = "NEW"


@dataclasses.dataclass
class Line:
    n: int


class Tag(msgspec.Struct):
    n: int


class Note(pydantic.BaseModel):
    n: int


UNION = [
    {"type": "record", "name": f"shop.{name}", "fields": [{"name": "n", "type": "int"}]}
    for name in ("Line", "Tag", "Note")
]


@pytest.mark.parametrize(
    ("value", "branch"),
    [(Line(1), 0), (Tag(n=1), 1), (Note(n=1), 2), (("Tag", {"n": 1}), 1), (("shop.Note", {"n": 1}), 2)],
)
def test_an_object_chooses_the_branch_of_its_class_and_a_name_chooses_its_own(value: Any, branch: int) -> None:
    assert encode(parse(UNION), value)[0] == branch * 2


def test_a_value_that_fits_two_branches_is_refused() -> None:
    with pytest.raises(EncodeError, match=r"more than one branch \(shop.Line, shop.Tag, shop.Note\)"):
        encode(parse(UNION), {"n": 1})


def test_a_member_of_an_enum_counts_by_its_value() -> None:
    made = parse({"type": "enum", "name": "State", "symbols": ["NEW"]})

    assert encode(made, State.NEW) == encode(made, "NEW") == b"\x00"


def test_a_value_nested_deeper_than_readers_go_is_refused() -> None:
    made = parse({"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]})

    def nested(levels: int) -> Any:
        value: Any = {"next": None}
        for _ in range(levels):
            value = {"next": value}
        return value

    assert decode(made, made, encode(made, nested(99))) == nested(99)
    for levels in (100, 100_000):
        with pytest.raises(EncodeError, match="nested too deeply"):
            encode(made, nested(levels))
