"""Every log event has a line in the documentation, and every line an event: whoever adds one tells what it means."""

from __future__ import annotations

import ast
import re

from tests.architecture.source_tree import ROOT, files, syntax

PAGE = ROOT / "docs" / "reference" / "logs.md"


def test_every_log_event_is_documented_with_its_level() -> None:
    page = PAGE.read_text()
    documented = dict(re.findall(r"^\| `([\w.]+)` \| (\w+) \|", page, re.MULTILINE))

    written = dict(_events())

    assert written
    assert {name: documented.get(name) for name in written} == written
    assert documented.keys() == written.keys()


def _events() -> set[tuple[str, str]]:
    """Names and levels of all log calls; a name that is looked up comes from the dictionary of the same module."""
    found: set[tuple[str, str]] = set()
    for file in files():
        tree = syntax(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
                caller, method = ast.unparse(node.func.value), node.func.attr
                level = (
                    method.replace("exception", "error") if caller == "_log" else "warning" if method == "_say" else ""
                )
                names = _names(tree, node.args[0]) if level else []
                found |= {(name, level) for name in names if " " not in name}
    return found


def _names(tree: ast.Module, argument: ast.expr) -> list[str]:
    if isinstance(argument, ast.Constant):
        return [str(argument.value)]
    return _values(tree, ast.unparse(argument.value)) if isinstance(argument, ast.Subscript) else []


def _values(tree: ast.Module, table: str) -> list[str]:
    """The texts of a dictionary of the module, whose values may be constants of it, or of another one."""
    assigned = {
        ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.value
    }
    found = assigned.get(table)
    values = found.values if isinstance(found, ast.Dict) else []
    return [str(ast.literal_eval(assigned.get(ast.unparse(value), value))) for value in values]
