"""Our own source as data: the files, their syntax trees, and the facts that the rules speak about."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "PACKAGES",
    "ROOT",
    "Function",
    "calls",
    "exported",
    "files",
    "functions",
    "identifiers",
    "imported",
    "lines_without_docstring",
    "nodes",
    "place",
    "syntax",
]

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "outboxkit", ROOT / "relay" / "outboxkit_relay")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def files(*parts: str) -> tuple[Path, ...]:
    """All modules of both packages, or those at the given places under the root (missing ones are left out)."""
    roots = [ROOT / part for part in parts] if parts else PACKAGES
    found = {file for root in roots for file in (root.rglob("*.py") if root.is_dir() else [root]) if file.is_file()}
    return tuple(sorted(found))


def place(file: Path, node: ast.AST | None = None) -> str:
    """`path:line`, as an editor opens it."""
    line = getattr(node, "lineno", None)
    return f"{file.relative_to(ROOT)}:{line}" if line else str(file.relative_to(ROOT))


@functools.cache
def syntax(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """Every node of the module, walked once for all rules."""
    return tuple(ast.walk(syntax(file)))


def functions(file: Path) -> Iterator[Function]:
    return (node for node in nodes(file) if isinstance(node, Function))


def lines_without_docstring(function: Function) -> int:
    """The function's length from `def` to its last line; a long contract is no fault."""
    doc = function.body[0]
    is_doc = ast.get_docstring(function, clean=False) is not None
    length = (function.end_lineno or 0) - function.lineno + 1
    return length - ((doc.end_lineno or 0) - doc.lineno + 1 if is_doc else 0)


def exported(file: Path) -> list[str] | None:
    """The module's `__all__`, None when it has none."""
    for node in syntax(file).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            value = getattr(node, "value", None)
            return list(ast.literal_eval(value)) if value else None
    return None


def imported(file: Path) -> set[str]:
    """Dotted names of everything the module imports, at any depth of its code."""
    names: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return names


@functools.cache
def calls(file: Path) -> tuple[tuple[str, ast.Call], ...]:
    """Every call with the dotted text of what is called: `datetime.now`, `text`, `random.random`."""
    return tuple((ast.unparse(node.func), node) for node in nodes(file) if isinstance(node, ast.Call))


@functools.cache
def identifiers(file: Path) -> frozenset[str]:
    """Every name that the module defines or uses, and the parts of its own."""
    return frozenset(_identifiers(file))


def _identifiers(file: Path) -> Iterator[str]:
    yield from file.relative_to(ROOT).with_suffix("").parts
    for node in nodes(file):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                yield name
            case ast.keyword(arg=str(name)):
                yield name
            case ast.alias(name=name, asname=other):
                yield from [*name.split("."), other or name]
