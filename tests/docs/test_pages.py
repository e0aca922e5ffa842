"""The documentation is true: it builds without a warning, its blocks run, and nothing is left out."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from outboxkit import errors
from outboxkit_relay.cli.main import program
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.settings import PREFIX, Settings
from tests import servers
from tests.docs.blocks import DOCS, ROOT, TUTORIAL, Reader, apart, blocks, commands, environment, fits

PAGES = sorted({ROOT / "README.md", ROOT / "llms.txt", *DOCS.rglob("*.md")} - set((DOCS / "_build").rglob("*.md")))
RUNNABLE = [page for page in PAGES if page not in TUTORIAL and any(True for _ in blocks(page.read_text()))]


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


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages as HTML; a warning of the build is an error."""
    folder = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def _text(page: Path) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())


def test_the_numbers_of_one_day_are_no_promise() -> None:
    page = (
        "<!-- numbers differ -->\n```console\n$ count\n 1.2 s  placed 7  1f00ba47\n```\n```console\n$ count\n1\n```\n"
    )
    differ, same = blocks(page)
    (command,) = commands(differ)

    assert not same.numbers_differ
    assert fits(command.promised, "13 s  placed 19  019ab3cd", numbers_differ=True)
    assert not fits(command.promised, " 13 s  killed 19  019ab3cd", numbers_differ=True)
    assert not fits(command.promised, " 13 s  placed 7  1f00ba47")


def test_the_pages_build_without_a_warning(built: Path) -> None:
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.is_relative_to(DOCS)}

    assert not [page for page in pages if not (built / f"{page}.html").is_file()]
    index = (built / "llms.txt").read_text()
    assert not [page for page in pages if f"(_sources/{page}.md.txt)" not in index]


def test_every_command_and_option_is_documented(built: Path) -> None:
    text = _text(built / "reference" / "cli.html")
    found = dict(_commands("outboxkit", program))

    assert {"outboxkit", "outboxkit demo", "outboxkit dlq replay"} <= found.keys()
    assert not [name for name, command in found.items() if not command.help or name not in text]
    for name, command in found.items():
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{name} {option.opts} says nothing"
                assert all(flag in text for flag in option.opts), (name, option.opts)


def _commands(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """As a user can call them, whatever the page is made from."""
    yield name, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for part in command.list_commands(context):
            sub = command.get_command(context, part)
            assert sub is not None
            yield from _commands(f"{name} {part}", sub)


def test_every_setting_is_documented(built: Path) -> None:
    text = _text(built / "reference" / "settings.html")
    found = dict(_settings(Settings, PREFIX))

    assert "OUTBOXKIT_RELAY__BATCH_SIZE" in found
    assert not [name for name, meaning in found.items() if not meaning or name not in text]


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, f"{prefix}{name.upper()}__")
        elif not field.exclude:
            yield f"{prefix}{name.upper()}", field.description or ""


def test_every_error_is_documented_under_its_code(built: Path) -> None:
    page = (built / "reference" / "errors.html").read_text()
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OutboxKitError)
    ]

    assert len({kind.code for kind in kinds}) == len(kinds) > 10, "a code names one error"
    assert not [kind for kind in kinds if not kind.__doc__ or kind.__name__ not in page]
    assert not [kind.code for kind in kinds if f'id="{kind.code.replace("_", "-")}"' not in page]


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
