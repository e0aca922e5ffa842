"""Links in the documentation lead somewhere; a linked test exists under its name. Whoever moves one mends the link."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "llms.txt",
    ROOT / "relay" / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[\w./-]+)(?:#[\w-]+)?\)")


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_leads_to_a_file(page: Path) -> None:
    dead = [
        found["target"] for found in LINK.finditer(page.read_text()) if not (page.parent / found["target"]).exists()
    ]

    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_linked_test_exists_under_its_name(page: Path) -> None:
    linked = [found for found in LINK.finditer(page.read_text()) if re.fullmatch(r"test_\w+", found["text"])]
    missing = [
        found["text"]
        for found in linked
        if f"def {found['text']}(" not in (page.parent / found["target"]).read_text("utf-8")
    ]

    assert missing == []


def test_links_to_tests_are_found() -> None:
    guarantees = (ROOT / "docs" / "explanation" / "guarantees.md").read_text()

    assert len([found for found in LINK.finditer(guarantees) if found["text"].startswith("test_")]) > 10
