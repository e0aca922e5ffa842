"""The gate: modes over a history, findings with line numbers, dated exceptions, and every report format."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from outboxkit.avro import Direction, Mode, ProblemKind, Version, check_history
from outboxkit.avro.gate.evaluate import Allow, Finding, evaluate, find, parse_allowed
from outboxkit.avro.gate.json_lines import line_of
from outboxkit.avro.gate.reports import FORMATS, render
from outboxkit.avro.model.parse import parse
from outboxkit.errors import SchemaError

TODAY = dt.date(2026, 11, 24)


def _text(*fields: dict[str, Any]) -> str:
    return json.dumps({"type": "record", "name": "shop.R", "fields": list(fields)}, indent=2)


A = {"name": "a", "type": "int"}
B = {"name": "b", "type": "string"}
B_DEFAULT = B | {"default": ""}
V1, V2, V3 = (
    Version(schema=parse(_text(*fields)), number=n) for n, fields in ((1, (A,)), (2, (A, B_DEFAULT)), (3, (A, B)))
)


def _found(mode: Mode, new: str, *history: Version) -> list[tuple[str, Direction | None]]:
    return [(str(one.against)[:9], one.direction) for one in check_history(mode, parse(new), history)]


NEW, OLD = Direction.NEW_READS_OLD, Direction.OLD_READS_NEW


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (Mode.NONE, []),
        (Mode.BACKWARD, []),
        (Mode.BACKWARD_TRANSITIVE, [("version 1", NEW)]),
        (Mode.FORWARD, []),
        (Mode.FORWARD_TRANSITIVE, []),
        (Mode.FULL, []),
        (Mode.FULL_TRANSITIVE, [("version 1", NEW)]),
    ],
)
def test_the_plain_modes_look_at_the_latest_version_the_transitive_ones_at_all(mode: Mode, expected: Any) -> None:
    assert _found(mode, _text(A, B), V1, V2) == expected


def test_backward_and_forward_look_in_opposite_directions() -> None:
    assert _found(Mode.BACKWARD, _text(A), V3) == []
    assert _found(Mode.FORWARD, _text(A), V3) == [("version 3", OLD)]
    assert _found(Mode.FULL, _text(A, B, {"name": "c", "type": "int"}), V3) == [("version 3", NEW)]


def _findings(file: str = "schemas/r.avsc") -> list[Finding]:
    text = _text(A, B)
    return find("shop.R", parse(text), [V1, V1, V2], Mode.BACKWARD_TRANSITIVE, file=file, text=text)


def test_equal_problems_of_several_versions_are_one_finding_with_its_line() -> None:
    (finding,) = _findings()

    assert len(finding.against) == 2
    assert _text(A, B).splitlines()[finding.line - 1].strip() == "{"
    assert '"b"' in _text(A, B).splitlines()[finding.line]


def test_a_problem_of_old_readers_is_shown_where_the_new_writer_says_it() -> None:
    text = _text(A | {"type": "string"})

    (finding,) = find("shop.R", parse(text), [V1], Mode.FORWARD, file="r.avsc", text=text)

    assert '"type": "string"' in text.splitlines()[finding.line - 1]


def _allow(**changed: Any) -> Allow:
    entry: dict[str, Any] = {"subject": "shop.R", "kind": ProblemKind.READER_FIELD_MISSING_DEFAULT_VALUE, "path": "R.b"}
    return Allow(**(entry | {"until": TODAY, "reason": "topic is empty"} | changed))


def test_an_entry_allows_one_problem_until_its_date() -> None:
    assert evaluate(_findings(), [_allow()], TODAY).passed
    assert [one.path for one in evaluate(_findings(), [_allow()], TODAY).allowed] == ["R.b"]

    tomorrow = evaluate(_findings(), [_allow()], TODAY + dt.timedelta(days=1))
    assert not tomorrow.passed
    assert tomorrow.expired == (_allow(),)


@pytest.mark.parametrize("changed", [{"path": "R.a"}, {"subject": "shop.S"}, {"kind": ProblemKind.TYPE_MISMATCH}])
def test_an_entry_allows_nothing_else(changed: dict[str, Any]) -> None:
    result = evaluate(_findings(), [_allow(**changed)], TODAY)

    assert not result.passed
    assert len(result.unused) == 1


ENTRY = """
[[allow]]
subject="shop.R"
kind="READER_FIELD_MISSING_DEFAULT_VALUE"
path="R.b"
until=2026-11-24
reason="topic is empty"
"""


def test_entries_are_read_from_toml() -> None:
    assert parse_allowed(ENTRY) == (_allow(),)
    assert parse_allowed("") == ()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("until=2026-11-24", 'until="soon"'), "until is a date"),
        (("until=2026-11-24", ""), "needs exactly the keys"),
        (("READER_FIELD_MISSING_DEFAULT_VALUE", "ANYTHING"), "no kind 'ANYTHING'"),
        (("[[allow]]", "[[allow"), "no TOML"),
    ],
)
def test_an_entry_that_is_not_exact_is_refused(change: tuple[str, str], why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        parse_allowed(ENTRY.replace(*change))


def test_the_text_says_where_what_why_and_how_to_repair() -> None:
    shown = render(evaluate(_findings(), [], TODAY), "text")

    (finding,) = _findings()
    assert f"schemas/r.avsc:{finding.line}: READER_FIELD_MISSING_DEFAULT_VALUE at R.b (/fields/1)" in shown
    assert "against: version 1 (fingerprint " in shown
    assert "breaks: BACKWARD" in shown
    assert 'cannot be read: {"a": 0}' in shown
    assert 'fix: add "default"' in shown
    assert shown.endswith("1 problem to repair.\n")


def test_json_carries_everything() -> None:
    (error,) = json.loads(render(evaluate(_findings(), [], TODAY), "json"))["errors"]

    assert error["witness"] == {"a": 0}
    assert error["reader_fragment"] == B
    assert error["kind"] == "READER_FIELD_MISSING_DEFAULT_VALUE"


def test_github_annotations_cannot_be_broken_out_of() -> None:
    shown = render(evaluate(_findings(file="a,b:c\nd%.avsc"), [], TODAY), "github")

    assert shown.count("\n") == 1
    assert shown.startswith("::error file=a%2Cb%3Ac%0Ad%25.avsc,line=")


def test_junit_is_xml_with_one_case_per_subject() -> None:
    suite = ET.fromstring(render(evaluate(_findings(), [], TODAY), "junit"))

    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert "fix: add" in (suite.findtext("testcase/failure") or "")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_says_that_all_is_well(form: str) -> None:
    assert "problem" not in render(evaluate([], [], TODAY), form)


@pytest.mark.parametrize(
    ("pointer", "line"),
    [
        ("", 1),
        ("/fields", 4),
        ("/fields/0", 5),
        ("/fields/1", 9),
        ("/fields/1/type", 11),
        ("/fields/9", 4),
        ("/nope", 1),
    ],
)
def test_a_pointer_has_a_line(pointer: str, line: int) -> None:
    assert line_of(_text(A, B), pointer) == line


def test_a_line_is_found_past_braces_in_strings() -> None:
    text = '{"doc": "a } \\" {",\n "fields": [\n {"x": "]"},\n 2]}'

    assert line_of(text, "/fields/1") == 4
