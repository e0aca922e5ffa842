"""Every row of schemas/compatibility.toml is what the checker says, and what the decoder does."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro import Problem, ProblemKind, check
from outboxkit.avro.binary.json_values import encode_json
from outboxkit.avro.compatibility.examples import smallest_values
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode
from outboxkit.errors import DecodeError

TABLE = Path(__file__).parents[4] / "schemas" / "compatibility.toml"
PAIRS: list[dict[str, Any]] = tomllib.loads(TABLE.read_text())["pair"]


def _short(problem: Problem) -> str:
    return f"{problem.kind.value} at {problem.reader_path}"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["name"])
def test_the_verdict_is_the_one_in_the_table(pair: dict[str, Any]) -> None:
    problems = check(parse(pair["reader"], lenient=True), parse(pair["writer"], lenient=True))

    assert [_short(one) for one in problems if one.is_error] == pair.get("problems", [])
    assert [_short(one) for one in problems if not one.is_error] == pair.get("warnings", [])


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair["name"])
def test_the_decoder_agrees_with_the_verdict(pair: dict[str, Any]) -> None:
    reader, writer = parse(pair["reader"], lenient=True), parse(pair["writer"], lenient=True)
    errors = [one for one in check(reader, writer) if one.is_error]

    for one in errors:
        assert one.has_example
        with pytest.raises(DecodeError):
            decode(writer, reader, encode_json(writer, one.example))
    if not errors:
        small = smallest_values(writer).of(writer.root)
        decode(writer, reader, encode_json(writer, small.value))


def test_the_table_has_every_kind_of_problem() -> None:
    named = {text.split(" at ")[0] for pair in PAIRS for key in ("problems", "warnings") for text in pair.get(key, [])}

    assert named == {kind.value for kind in ProblemKind}


def test_no_name_is_there_twice() -> None:
    names = [pair["name"] for pair in PAIRS]

    assert len(names) == len(set(names))


def test_the_reference_page_has_every_row() -> None:
    page = (TABLE.parents[1] / "docs" / "reference" / "schemas.md").read_text()

    for pair in PAIRS:
        found = [f"**error** {_listed(pair, 'problems')}"] if "problems" in pair else []
        found += [f"warning {_listed(pair, 'warnings')}"] if "warnings" in pair else []
        assert f"| {pair['name']} | {'; '.join(found) or 'compatible'} | {pair.get('elsewhere', '')} |" in page


def _listed(pair: dict[str, Any], key: str) -> str:
    return ", ".join(f"`{one}`" for one in pair[key])
