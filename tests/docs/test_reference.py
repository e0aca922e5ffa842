"""The reference pages are what the code says, and every public name is on one of them."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "docs" / "_ext"
API = ROOT / "docs" / "reference" / "api"
LIBRARY = ROOT / "outboxkit"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", EXTENSIONS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATE = generator()
PAGES: list[Path] = GENERATE.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_generated_page_is_what_the_code_says(page: Path) -> None:
    text = page.read_text()

    assert GENERATE.written(text) == text, "run scripts/docs --write"


def test_a_page_that_is_behind_the_code_is_noticed() -> None:
    text = (ROOT / "docs" / "reference" / "settings.md").read_text()

    assert GENERATE.written(text.replace("relay.batch_size", "relay.batch")) == text


def test_every_public_part_of_the_library_has_its_page() -> None:
    rooms = {f"outboxkit.{room.parent.name}" for room in LIBRARY.glob("*/__init__.py")}
    rooms |= {f"outboxkit.{file.stem}" for file in LIBRARY.glob("[!_]*.py")}
    shown = set(re.findall(r": api ([\w.]+) -->", "".join(page.read_text() for page in API.glob("*.md"))))
    shown |= {name.rpartition(".")[0] for name in shown if name.startswith("outboxkit.testing.")}

    assert rooms - shown == {"outboxkit.errors"}, "errors have a page of their own"


def test_every_name_of_the_root_leads_to_its_description() -> None:
    package = importlib.import_module("outboxkit")
    page = (API / "index.md").read_text()

    names = [name for name in package.__all__ if not name.startswith("__")]
    missing = [name for name in names if not re.search(rf"^\| \[`{name}`\]\(", page, re.MULTILINE)]

    assert missing == []


def test_every_how_to_leads_to_the_api() -> None:
    pages = (ROOT / "docs" / "how-to").glob("*.md")

    assert [page.name for page in pages if "reference/api/" not in page.read_text()] == []


def test_the_numbers_of_the_landing_page_were_measured() -> None:
    landing = (ROOT / "README.md").read_text().partition("## Numbers")[2].partition("\n## ")[0]
    measured = (ROOT / "docs" / "explanation" / "performance.md").read_text()

    numbers = re.findall(r"\d+,\d{3}|\d+\.\d+ ms", landing)

    assert len(numbers) >= 7
    assert [number for number in numbers if number.removesuffix(" ms") not in measured] == []
