"""Names of tests, which pages link to."""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["functions_in"]


def functions_in(file: Path) -> set[str]:
    tree = ast.walk(ast.parse(file.read_text("utf-8")))
    return {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
