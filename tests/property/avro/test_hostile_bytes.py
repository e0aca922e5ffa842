"""Hostile bytes end in one error class, soon, in little memory, with the process alive.

Both runs are children with a limit on memory and a deadline: what kills the process kills a child, and the last case
that it announced is the culprit.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.property.avro.hostile import CASES

FULL = os.environ.get("OUTBOXKIT_PROFILE") == "full"
FUZZ_INPUTS = 200_000 if FULL else 4_000
FUZZ_SEED = int(os.environ.get("OUTBOXKIT_TEST_SEED", "0"))
ROOT = Path(__file__).parents[3]
MIB = 1 << 20


def _child(module: str, *arguments: str, seconds: int, memory: int = 700 * MIB) -> tuple[int, list[dict[str, Any]]]:
    """Run a module in a limited child; its status and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=seconds,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (memory, memory)),
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@cache
def _hostile() -> tuple[int, list[dict[str, Any]]]:
    return _child("tests.property.avro.hostile", seconds=60)


def test_no_hostile_input_ends_the_process() -> None:
    status, lines = _hostile()

    assert status == 0, f"died in {lines[-1]}"
    assert [line["case"] for line in lines if "raised" in line] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_with_the_one_class_in_time(name: str) -> None:
    (line,) = [line for line in _hostile()[1] if line["case"] == name and "raised" in line]

    assert line["raised"] == CASES[name][0], line["text"]
    assert line["s"] < 1.0


def test_no_hostile_input_takes_200_mib() -> None:
    lines = [line for line in _hostile()[1] if "raised" in line]

    assert lines[-1]["peak_mib"] - lines[0]["peak_mib"] < 200


@pytest.mark.timeout(900)
def test_damaged_messages_are_read_or_refused_and_nothing_else() -> None:
    share = FUZZ_INPUTS // 2
    seeds = (FUZZ_SEED, FUZZ_SEED + 1_000_000)

    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda seed: _child("tests.property.avro.fuzz", str(seed), str(share), seconds=800), seeds)

        for status, lines in runs:
            assert status == 0, lines[-3:]
            tally = lines[-1]["tally"]
            assert sum(tally.values()) >= share
            assert tally["read"] > share // 100
            assert tally["refused"] > share // 4
