"""The map of the house and the house are the same: every room is on it, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import outboxkit
from tests.architecture.source_tree import ROOT

LIBRARY, RELAY = ROOT / "outboxkit", ROOT / "relay" / "outboxkit_relay"
PAGE = ROOT / "docs" / "explanation" / "architecture.md"


def rooms(package: Path) -> set[str]:
    """Modules as `name`, folders as `name/`."""
    modules = {file.stem for file in package.glob("*.py") if not file.stem.startswith("__")}
    return modules | {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}


def named(text: str) -> set[str]:
    return set(re.findall(r"(?<!`)`([a-z_]+/?)`(?!`)", text))


def test_the_map_in_the_root_names_every_room_and_nothing_else() -> None:
    there = rooms(LIBRARY) | rooms(RELAY)
    on_the_map = named(outboxkit.__doc__ or "") - {"outboxkit_relay"}

    assert sorted(there - on_the_map) == []
    assert sorted(on_the_map - there) == []


def test_the_map_fits_on_a_screen() -> None:
    assert len((outboxkit.__doc__ or "").splitlines()) <= 25


def test_the_page_about_the_parts_has_a_row_for_every_room_and_for_nothing_else() -> None:
    there = {room.rstrip("/") for room in rooms(LIBRARY) | rooms(RELAY)}
    linked = set(re.findall(r"^\| \[(\w+)\]\(\.\./\.\./(?:relay/)?outboxkit", PAGE.read_text(), re.MULTILINE))

    assert sorted(there - linked) == []
    assert sorted(linked - there) == []
