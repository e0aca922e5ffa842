"""Old bytes read with a new schema: what the reader gets, and what it is told when it gets nothing."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode, encode
from outboxkit.errors import DecodeError


def _record(*fields: dict[str, Any], name: str = "R") -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": list(fields)}


def _read(writer: Any, reader: Any, value: Any) -> Any:
    made = parse(writer)
    return decode(made, parse(reader), encode(made, value))


def _field(name: str, kind: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, **more}


BYTES_DECIMAL = {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}

READ: list[tuple[Any, Any, Any, Any]] = [
    ("int", "double", 3, 3.0),
    ("long", "float", 16_777_217, 16_777_216.0),
    ("string", "bytes", "é", b"\xc3\xa9"),
    ("bytes", "string", b"\xc3\xa9", "é"),
    ("int", ["double", "int"], 5, 5),
    ("string", ["bytes", "string"], "x", "x"),
    (["int", "string"], ["string", "double"], 5, 5.0),
    (["null", "int"], ["int", "null"], None, None),
    ("int", {"type": "long", "logicalType": "timestamp-millis"}, 0, None),
    (
        _record(_field("old", "int")),
        _record(_field("new", "long", aliases=["old"])),
        {"old": 1},
        {"new": 1},
    ),
    (
        _record(_field("a", "int"), _field("gone", {"type": "array", "items": "string"}), _field("b", "int")),
        _record(_field("b", "int"), _field("a", "int")),
        {"a": 1, "gone": ["x"], "b": 2},
        {"b": 2, "a": 1},
    ),
    (
        _record(),
        _record(_field("b", "bytes", default="\u00ff"), _field("d", BYTES_DECIMAL, default="\u0001")),
        {},
        {"b": b"\xff", "d": Decimal("0.01")},
    ),
    (
        _record(),
        _record(_field("r", _record(_field("x", "int", default=7), name="S"), default={})),
        {},
        {"r": {"x": 7}},
    ),
    (
        {"type": "enum", "name": "E", "symbols": ["A", "B"]},
        {"type": "enum", "name": "E", "symbols": ["A"], "default": "A"},
        "B",
        "A",
    ),
]


@pytest.mark.parametrize(("writer", "reader", "value", "expected"), READ)
def test_the_reader_gets_what_its_schema_says(writer: Any, reader: Any, value: Any, expected: Any) -> None:
    found = _read(writer, reader, value)

    if expected is not None or value is None:
        assert found == expected
        assert type(found) is type(expected)
    else:
        assert found.year == 1970


def test_keys_come_in_the_readers_order() -> None:
    found = _read(
        _record(_field("a", "int"), _field("b", "int")),
        _record(_field("b", "int"), _field("a", "int")),
        {"a": 1, "b": 2},
    )

    assert list(found) == ["b", "a"]


def test_a_default_is_fresh_for_every_message() -> None:
    writer, reader = _record(), _record(_field("items", {"type": "array", "items": "int"}, default=[1]))
    first = _read(writer, reader, {})
    first["items"].append(2)

    assert _read(writer, reader, {}) == {"items": [1]}


def test_records_of_one_name_in_two_namespaces_are_not_mixed_up() -> None:
    def named(name: str, *fields: str) -> dict[str, Any]:
        return {"type": "record", "name": name, "fields": [_field(one, "int") for one in fields]}

    found = _read(named("b.R", "y", "x"), [named("a.R", "x"), named("b.R", "y", "x")], {"y": 1, "x": 2})

    assert found == {"y": 1, "x": 2}


def test_a_part_that_cannot_be_read_is_named_with_path_and_offset() -> None:
    line = _record(
        _field("sku", "string"), _field("state", {"type": "enum", "name": "E", "symbols": ["A", "B"]}), name="L"
    )
    older = _record(_field("sku", "string"), _field("state", {"type": "enum", "name": "E", "symbols": ["A"]}), name="L")
    writer, reader = (_record(_field("lines", {"type": "array", "items": one})) for one in (line, older))
    value = {"lines": [{"sku": "x", "state": "A"}, {"sku": "yy", "state": "B"}]}

    with pytest.raises(DecodeError) as caught:
        _read(writer, reader, value)

    assert (caught.value.path, caught.value.offset) == ("lines[1].state", 7)


def test_a_branch_that_fits_is_read_although_another_does_not() -> None:
    writer, reader = ["null", "int", "string"], ["null", "int"]

    assert _read(writer, reader, 5) == 5
    with pytest.raises(DecodeError, match="no branch for string"):
        _read(writer, reader, "x")


def test_a_field_that_is_thrown_away_is_not_converted() -> None:
    writer = parse(_record(_field("at", {"type": "int", "logicalType": "date"}), _field("n", "int")))
    data = b"\xfe\xff\xff\xff\x0f\x02"

    assert decode(writer, parse(_record(_field("n", "int"))), data) == {"n": 1}
    with pytest.raises(DecodeError) as caught:
        decode(writer, writer, data)
    assert (caught.value.path, caught.value.offset) == ("at", 0)


def test_the_message_of_an_error_holds_no_data() -> None:
    writer = parse({"type": "string", "logicalType": "uuid"})

    with pytest.raises(DecodeError) as caught:
        decode(writer, writer, b"\x16secret-4711")

    assert "4711" not in str(caught.value)
