"""One concept, one word: names that say nothing are not used, and what a module offers is written down."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.architecture.source_tree import ROOT, exported, files, nodes, place, syntax

EMPTY_WORDS = r"utils?|helpers?|common|misc|managers?|services?|processors?|impl|abstract|dto"


def _says_nothing(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return any(re.fullmatch(EMPTY_WORDS, word) for word in words)


def test_no_module_or_folder_has_a_name_that_says_nothing() -> None:
    parts = {part for file in files() for part in file.relative_to(ROOT).with_suffix("").parts}

    assert not sorted(filter(_says_nothing, parts))


def test_no_class_has_a_name_that_says_nothing() -> None:
    classes = [
        (node.name, place(file, node)) for file in files() for node in nodes(file) if isinstance(node, ast.ClassDef)
    ]

    assert not [c for c in classes if _says_nothing(c[0]) or re.match(r"I[A-Z][a-z]", c[0])]


@pytest.mark.parametrize(
    ("name", "empty"), [("LeaseManager", True), ("retry_utils", True), ("Dialect", False), ("Outbox", False)]
)
def test_the_rule_itself_tells_them_apart(name: str, *, empty: bool) -> None:
    assert _says_nothing(name) is empty


def test_no_two_documented_classes_have_one_name() -> None:
    """The contract of each kind of plug has its own `Features`: the same word for the same thing."""
    pages = (ROOT / "docs" / "reference" / "api").glob("*.md")
    modules = [name for page in pages for name in re.findall(r"^## `([\w.]+)`$", page.read_text(), re.MULTILINE)]
    homes: dict[str, set[str]] = {}
    for offered in map(importlib.import_module, modules):
        for name in offered.__all__:
            found = getattr(offered, name)
            if isinstance(found, type):
                homes.setdefault(name, set()).add(found.__module__)

    assert len(homes) > 100
    assert {name for name, found in homes.items() if len(found) > 1} == {"Features"}


def test_every_module_says_what_it_offers_in_order() -> None:
    """A package that only marks a folder, and a program's `__main__`, offer nothing."""
    wrong = {}
    for file in files():
        names = exported(file)
        only_docstring = len(syntax(file).body) <= 1
        if names is None and not only_docstring and file.stem != "__main__":
            wrong[place(file)] = "no __all__"
        elif names is not None and names != sorted(names, key=_kind_then_name):
            wrong[place(file)] = f"sort it: {sorted(names, key=_kind_then_name)}"

    assert not wrong


def _kind_then_name(name: str) -> tuple[int, str]:
    """Constants, classes, functions, each by name: the order that ruff's RUF022 writes."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_what_the_root_offers_is_short_and_really_there() -> None:
    names = exported(ROOT / "outboxkit" / "__init__.py") or []

    assert len(names) <= 26
    root = importlib.import_module("outboxkit")
    assert not [name for name in names if not hasattr(root, name)]


def test_no_test_takes_from_another_what_belongs_beside_both() -> None:
    """Tests that run on another server as well are imported, and their fixtures."""
    wrong = []
    for file in files("tests"):
        taken = [node for node in nodes(file) if isinstance(node, ast.ImportFrom) and ".test_" in (node.module or "")]
        whole = {node.module for node in taken if node.names[0].name == "*"}
        others = [node for node in taken if node.module not in whole]
        wrong += [place(file, one) for one in others if not one.names[-1].name.startswith("test_")]

    assert not wrong


def test_every_folder_of_tests_is_a_package() -> None:
    """Else pytest takes two modules of one name for one, and the tests of the second are never run."""
    folders = {folder for file in files("tests") for folder in file.parents if folder.is_relative_to(ROOT / "tests")}
    assert not [place(folder) for folder in folders if not (folder / "__init__.py").exists()]
