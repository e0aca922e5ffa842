"""The page of edges: every edge, fault and bad input has its line, every line its tests, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.names import functions_in

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "edges.md"
LINES = dict(re.findall(r"^\| ([ECP]\d+) \|(.*)$", PAGE.read_text("utf-8"), re.MULTILINE))
LINK = re.compile(r"\[([^\]]+)\]\(\.\./\.\./((?:tests|outboxkit/testing)/[^)]+\.py)\)")
DOCUMENTED = re.compile(r"documented: \[[^\]]+\]\((\.\./)?[\w/]+\.md#[\w-]+\)")
NO_TEST_CAN_SHOW = ["E59", "E71"]
NAMED_BY_EDGE = (
    *(ROOT / "tests" / "integration" / "capture").glob("test_*.py"),
    *(ROOT / "tests" / "integration").glob("*/test_*edges.py"),
    ROOT / "tests" / "unit" / "consumer" / "test_bad_inputs.py",
)


def test_every_edge_fault_and_bad_input_has_a_line_with_tests() -> None:
    edges = [f"E{number}" for number in (*range(1, 94), *range(104, 131))]
    faults = [f"C{number}" for number in range(1, 12)]
    assert list(LINES) == [*edges, *faults, *(f"P{number}" for number in range(1, 23))]
    assert [edge for edge, line in LINES.items() if not LINK.search(line)] == NO_TEST_CAN_SHOW


def test_what_no_test_can_show_is_marked_as_documented() -> None:
    assert [edge for edge, line in LINES.items() if DOCUMENTED.search(line)] == NO_TEST_CAN_SHOW


def test_every_test_that_the_page_names_exists_and_names_its_edge() -> None:
    missing = []
    for edge, line in LINES.items():
        for name, path in LINK.findall(line):
            is_file, words = name.endswith(".py"), name.replace(" ", "_")
            known = functions_in(ROOT / path) if (ROOT / path).is_file() else set()
            wanted = {f"test_{edge.lower()}_{words}", f"test_{words}"}
            if not (is_file and known) and not wanted & known:
                missing.append((edge, name))

    assert missing == []


def test_every_test_that_names_an_edge_is_on_the_page() -> None:
    named = {
        (found[1].upper(), found[2].replace("_", " "))
        for file in NAMED_BY_EDGE
        for name in functions_in(file)
        if (found := re.fullmatch(r"test_([ecp]\d+)_(.*)", name))
    }
    shown = {(edge, name) for edge, line in LINES.items() for name, _ in LINK.findall(line)}

    assert named - shown == set()
