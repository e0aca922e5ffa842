"""The compatibility check against the decoder, on random pairs of schemas and random data.

The decoder is the judge: what the check calls compatible must be readable, whatever the data; what it calls an error
must fail on the example that it gives. The short profile runs a sample, ``OUTBOXKIT_PROFILE=full`` all pairs.
"""

from __future__ import annotations

import collections
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro import Problem, ProblemKind, Schema, check
from outboxkit.avro.binary.json_values import encode_json
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import decode, encode
from outboxkit.errors import DecodeError, EncodeError, SchemaError
from tests.property.avro import random_schemas

FULL = os.environ.get("OUTBOXKIT_PROFILE") == "full"
PAIRS = 24_000 if FULL else 1_500
FIRST_SEED = int(os.environ.get("OUTBOXKIT_TEST_SEED", "0"))
DATA_PER_PAIR = 3

pytestmark = pytest.mark.timeout(900)


@dataclass
class _Found:
    """What the run has seen; every list must stay empty."""

    compatible: int = 0
    incompatible: int = 0
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: int = 0
    examples: int = 0
    data: int = 0
    refused_though_compatible: list[str] = field(default_factory=list)
    read_though_example: list[str] = field(default_factory=list)
    changed_by_a_round_trip: list[str] = field(default_factory=list)


def _pairs() -> Iterator[tuple[int, random.Random, Schema, Schema]]:
    for seed in range(FIRST_SEED, FIRST_SEED + PAIRS):
        rng = random.Random(seed)
        writer, reader = random_schemas.pair(rng)
        try:
            yield seed, rng, parse(writer, lenient=True), parse(reader, lenient=True)
        except SchemaError:
            continue  # the change took away a type that is used further down


@dataclass(frozen=True)
class _Case:
    seed: int
    writer: Schema
    reader: Schema


@cache
def _run() -> _Found:
    found = _Found()
    for seed, rng, writer, reader in _pairs():
        case = _Case(seed, writer, reader)
        problems = check(reader, writer)
        errors = [one for one in problems if one.is_error]
        found.kinds.update(one.kind.value for one in problems)
        found.compatible += not errors
        found.incompatible += bool(errors)
        for one in errors:
            _judge_example(found, case, one)
        for _ in range(DATA_PER_PAIR):
            _judge_datum(found, case, random_schemas.value(rng, writer), fits=not errors)
    _report(found)
    return found


def _judge_example(found: _Found, case: _Case, problem: Problem) -> None:
    found.errors += 1
    if not problem.has_example:
        return
    found.examples += 1
    data = encode_json(case.writer, problem.example)
    decode(case.writer, case.writer, data)
    refusal = _refusal(case, data)
    if refusal is None:
        found.read_though_example.append(f"seed {case.seed}: {problem}; {problem.example!r}")


def _judge_datum(found: _Found, case: _Case, datum: Any, *, fits: bool) -> None:
    found.data += 1
    data = encode_json(case.writer, datum)
    value = decode(case.writer, case.writer, data)
    try:
        again = decode(case.writer, case.writer, encode(case.writer, value))
        if repr(again) != repr(value):
            found.changed_by_a_round_trip.append(f"seed {case.seed}: {value!r} became {again!r}")
    except EncodeError as error:
        if "more than one branch" not in str(error):
            found.changed_by_a_round_trip.append(f"seed {case.seed}: {error}")
    refusal = _refusal(case, data)
    if fits and refusal is not None:
        found.refused_though_compatible.append(f"seed {case.seed}: {refusal}; {datum!r}")


def _refusal(case: _Case, data: bytes) -> DecodeError | None:
    try:
        decode(case.writer, case.reader, data)
    except DecodeError as error:
        if error.offset is None:
            raise AssertionError(f"seed {case.seed}: no offset") from error
        return error
    return None


def _report(found: _Found) -> None:
    """Write the numbers down where a report is asked for."""
    folder = os.environ.get("OUTBOXKIT_TEST_REPORT")
    numbers = {key: value for key, value in vars(found).items() if not isinstance(value, list)}
    if folder:
        Path(folder, "schema-pairs.json").write_text(json.dumps(numbers | {"first_seed": FIRST_SEED}, indent=2) + "\n")


def test_what_is_called_compatible_is_read_whatever_the_data() -> None:
    assert _run().refused_though_compatible == []


def test_what_is_given_as_a_example_is_not_read() -> None:
    assert _run().read_though_example == []


def test_a_decoded_value_is_written_again_unchanged() -> None:
    assert _run().changed_by_a_round_trip == []


def test_the_run_meets_every_kind_of_problem_and_enough_compatible_pairs() -> None:
    found = _run()
    total = found.compatible + found.incompatible

    assert total >= PAIRS * 0.95
    assert found.compatible >= total * 0.3
    assert found.examples >= found.errors * 0.8
    floor = 100 if FULL else 3
    assert {kind.value: found.kinds[kind.value] for kind in ProblemKind if found.kinds[kind.value] < floor} == {}
