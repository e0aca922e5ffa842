"""Advice: each rule finds its case, and a schema without one is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro.gate.lint import lint
from outboxkit.avro.model.parse import parse
from outboxkit.registries.directory import DirectoryRegistry


def _record(*fields: dict[str, Any], name: str = "a.R") -> dict[str, Any]:
    return {"type": "record", "name": name, "fields": [{"doc": "d"} | one for one in fields]}


CASES: list[tuple[str, Any, str]] = [
    ("flaw", _record({"name": "x", "type": "int", "default": "no"}), "/fields/0/default"),
    ("enum-default", {"type": "enum", "name": "a.E", "symbols": ["A"]}, ""),
    ("logical-type", _record({"name": "x", "type": {"type": "long", "logicalType": "nope"}}), "/fields/0/type"),
    ("namespace", _record(name="R"), ""),
    (
        "alias-is-a-field",
        _record({"name": "x", "type": "int", "aliases": ["y"]}, {"name": "y", "type": "int"}),
        "/fields/0",
    ),
    ("doc", {"type": "record", "name": "a.R", "fields": [{"name": "x", "type": "int"}]}, "/fields/0"),
    ("optional-default", _record({"name": "x", "type": ["null", "int"]}), "/fields/0"),
    ("zero-width-items", _record({"name": "x", "type": {"type": "array", "items": "null"}}), "/fields/0/type"),
    ("branch-order", _record({"name": "x", "type": ["double", "int"]}), "/fields/0/type"),
    ("short-names", [_record(name="a.R"), _record(name="b.R")], ""),
    ("recursive", _record({"name": "x", "type": ["null", "R"], "default": None}), ""),
]


@pytest.mark.parametrize(("rule", "source", "pointer"), CASES, ids=[rule for rule, _, _ in CASES])
def test_a_rule_finds_its_case(rule: str, source: Any, pointer: str) -> None:
    found = {(one.rule, one.pointer) for one in lint(parse(source, lenient=True))}

    assert (rule, pointer) in found


def test_our_own_contracts_leave_nothing_to_say() -> None:
    folder = Path(__file__).parents[4] / "schemas"
    files = [one for name in ("outboxkit", "examples/shop") for one in DirectoryRegistry(folder / name).files()]

    assert len(files) == 4
    assert {file.path.name: lint(file.schema) for file in files if lint(file.schema)} == {}
