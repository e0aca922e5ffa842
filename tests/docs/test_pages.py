"""The documentation is true: it builds without a warning, its blocks run, and nothing is left out."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from outboxkit_relay.lifecycle import Exit
from tests import servers
from tests.docs.blocks import Reader, apart, blocks, environment, fits

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted({ROOT / "README.md", *DOCS.rglob("*.md")} - set((DOCS / "_build").rglob("*.md")))
TUTORIAL = [DOCS / "tutorial" / "index.md", DOCS / "tutorial" / "your-app.md"]  # test_tutorial reads it
RUNNABLE = [page for page in PAGES if page not in TUTORIAL and any(True for _ in blocks(page.read_text()))]


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs_and_says_what_the_page_says(
    page: Path, tmp_path: Path, kafka: servers.Server
) -> None:
    reader = Reader(tmp_path, environment(Path(sys.executable).parent), {"OUTBOXKIT_BROKER_URL": kafka.url})

    assert reader.read(apart(page.read_text())) > 0


def test_there_is_something_to_run() -> None:
    assert {DOCS / "how-to" / "fastapi.md", ROOT / "README.md"} <= set(RUNNABLE)
    assert all(page.is_file() for page in TUTORIAL)


@pytest.mark.parametrize(
    ("promised", "found", "fit"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", "a\nb", False),
        ("a…c", "abbbc", True),
        ("…", "any\nlines\n", True),
        ("…", "", True),
        ("a\n…\nz", "a\nb\nz", True),
        ("a\n…\nz", "a\nb", False),
        ("3 *", "3 *", True),
    ],
)
def test_the_comparison_can_tell(promised: str, found: str, *, fit: bool) -> None:
    assert fits(promised, found) is fit


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert 'id="outboxkit-dlq-replay' in (tmp_path / "reference" / "cli.html").read_text()
    assert "OUTBOXKIT_RELAY__BATCH_SIZE" in (tmp_path / "reference" / "settings.html").read_text()


def test_every_log_event_is_documented_with_its_level() -> None:
    page = (DOCS / "reference" / "logs.md").read_text()
    documented = dict(re.findall(r"^\| `([\w.]+)` \| (\w+) \|", page, re.MULTILINE))

    written = dict(_events())

    assert written
    assert {name: documented.get(name) for name in written} == written
    assert documented.keys() == written.keys()


def _events() -> set[tuple[str, str]]:
    """Names and levels of all log calls; a name that is looked up comes from the dictionary of the same module."""
    found: set[tuple[str, str]] = set()
    for file in [*(ROOT / "outboxkit").rglob("*.py"), *(ROOT / "relay" / "outboxkit_relay").rglob("*.py")]:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
                caller, method = ast.unparse(node.func.value), node.func.attr
                level = method if caller == "_log" else "warning" if method == "_say" else ""
                found |= {(name, level) for name in _names(tree, node.args[0]) if level and " " not in name}
    return found


def _names(tree: ast.Module, argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    return _values(tree, ast.unparse(argument.value)) if isinstance(argument, ast.Subscript) else []


def _values(tree: ast.Module, table: str) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table and node.value:
            return list(ast.literal_eval(node.value).values())
    return []


def test_every_exit_code_is_documented() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    documented = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in cell.split(",")}

    assert documented == {*map(int, Exit), 130, 143}


def test_no_page_names_a_place_of_one_machine() -> None:
    for page in PAGES:
        assert not re.findall(r"/(?:root|home)/\w+", page.read_text()), page


def test_every_linked_test_exists() -> None:
    page = DOCS / "explanation" / "guarantees.md"
    text = page.read_text()
    linked = re.findall(r"\[(test_\w+)\]\((\S+\.py)\)", text)
    lines = text.partition("## Crash by crash")[2].partition("\n## ")[0].count("\n| ") - 1

    assert len(linked) == lines, "every line of the table has its test"
    assert not [(name, file) for name, file in linked if f"def {name}(" not in (page.parent / file).read_text()]


def test_every_link_into_the_repository_leads_somewhere() -> None:
    """Sphinx looks at links between pages only."""
    links = {(page, link) for page in PAGES for link in re.findall(r"\]\(([\w./-]+)[)#]", page.read_text())}

    assert len(links) > 50
    assert not [(page, link) for page, link in links if not (page.parent / link).exists()]
