"""A newcomer reads a file in one sitting and a function at one glance."""

from __future__ import annotations

import ast
import statistics
from collections import Counter

from tests.architecture.source_tree import (
    ROOT,
    Function,
    files,
    functions,
    lines_without_docstring,
    nodes,
    place,
)

PLUGS = ("brokers", "codecs", "dialects", "registries")


def test_no_module_has_more_than_400_lines() -> None:
    too_long = {place(file): n for file in files() if (n := file.read_text().count("\n")) > 400}

    assert not too_long


def test_no_folder_has_more_than_14_modules() -> None:
    rooms = Counter(file.parent for file in files() if file.stem != "__init__")

    assert not {place(folder): n for folder, n in rooms.items() if n > 14}


def test_no_function_has_more_than_50_lines() -> None:
    too_long = {
        f"{place(file, function)} {function.name}": n
        for file in files()
        for function in functions(file)
        if (n := lines_without_docstring(function)) > 50
    }

    assert not too_long


def test_functions_are_short_as_a_rule() -> None:
    sizes = sorted(lines_without_docstring(function) for file in files() for function in functions(file))

    assert statistics.median(sizes) <= 8
    assert sizes[len(sizes) * 9 // 10] <= 25


def test_a_port_has_at_most_five_methods() -> None:
    """Its `features` value is a fact, not a method."""
    wide = {
        f"{place(file, node)} {node.name}": names
        for file in files(*(f"outboxkit/{plug}/__init__.py" for plug in PLUGS))
        for node in nodes(file)
        if isinstance(node, ast.ClassDef)
        if any(ast.unparse(base).split("[")[0].endswith("Protocol") for base in node.bases)
        if len(names := [part.name for part in node.body if isinstance(part, Function) and not _is_fact(part)]) > 5
    }

    assert not wide


def _is_fact(function: Function) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in function.decorator_list)


def test_the_two_packages_are_where_the_rules_look_for_them() -> None:
    """Otherwise every rule of this folder would pass over nothing."""
    assert ROOT / "outboxkit" / "errors.py" in files()
    assert len(files("relay/outboxkit_relay")) > 1
