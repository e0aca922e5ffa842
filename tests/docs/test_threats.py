"""The page on security: every threat has its line, every line its tests, and they exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests.docs.names import functions_in

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "security.md"
LINES = dict(re.findall(r"^\| (S\d+) \|(.*)$", PAGE.read_text("utf-8"), re.MULTILINE))
LINK = re.compile(r"\[([^\]]+)\]\(\.\./\.\./(tests/[^)]+\.py)\)")


def test_every_threat_has_a_line_with_tests() -> None:
    assert list(LINES) == [f"S{number}" for number in range(1, 25)]
    assert [threat for threat, line in LINES.items() if not LINK.search(line)] == []


def test_every_test_that_the_page_names_exists() -> None:
    named = [(threat, name, path) for threat, line in LINES.items() for name, path in LINK.findall(line)]
    missing = [
        (threat, name)
        for threat, name, path in named
        if not (ROOT / path).is_file() or f"test_{name.replace(' ', '_')}" not in functions_in(ROOT / path)
    ]

    assert missing == []
