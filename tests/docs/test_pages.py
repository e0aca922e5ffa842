"""The documentation is true: it builds without a warning, its blocks run, and nothing is left out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from outboxkit_relay.lifecycle import Exit
from tests import servers
from tests.docs.blocks import Reader, blocks, fits

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted({ROOT / "README.md", *DOCS.rglob("*.md")} - set((DOCS / "_build").rglob("*.md")))
RUNNABLE = [page for page in PAGES if any(True for _ in blocks(page.read_text()))]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOXKIT_")}
    bin_folder = str(Path(sys.executable).parent)
    return kept | {"PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}


@pytest.mark.timeout(400)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs_and_says_what_the_page_says(
    page: Path, tmp_path: Path, kafka: servers.Server
) -> None:
    reader = Reader(tmp_path, _environment(), {"OUTBOXKIT_BROKER_URL": kafka.url})
    own_topic = f"shop.orders.{uuid4().hex[:8]}"  # other tests use the same broker

    assert reader.read(page.read_text().replace("shop.orders", own_topic)) > 0


def test_there_is_something_to_run() -> None:
    assert DOCS / "tutorial" / "index.md" in RUNNABLE


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


def test_every_named_test_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/.]+\.py)`", page.read_text())}

    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]
