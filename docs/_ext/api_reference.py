"""Reference pages of the Python API, from signatures as they stand in the source and from docstrings, as Markdown."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from outboxkit import errors

__all__ = ["home", "module", "prose", "root"]

_API = Path(__file__).parents[1] / "reference" / "api"
_LISTS = frozenset({"Args", "Attributes", "Raises"})
_SECTION = re.compile(r"^(Args|Attributes|Guarantee|Index used|Locks|Raises|Returns|Source|Transaction|Writes|Yields):")
_ITEM = re.compile(r"^(?P<name>[\w.*]+(?: \([^)]*\))?): (?P<text>.*)$")
_PLAIN = int | str | bytes | float


def module(name: str) -> Iterator[str]:
    """Yields what a module says of itself, and each of its public names."""
    found = importlib.import_module(name)
    yield from (f"## `{name}`", "", *prose(found), "")
    for public in found.__all__:
        yield from _entry(public, getattr(found, public), found)


def root() -> Iterator[str]:
    """Yields every name of `outboxkit` itself with its first line, and where more is said."""
    package = importlib.import_module("outboxkit")
    yield from ("| name | in one line |", "|---|---|")
    for name in sorted(package.__all__, key=str.lower):
        value = getattr(package, name)
        first = next(prose(value), "") if inspect.getdoc(value) and not isinstance(value, _PLAIN) else ""
        yield f"| {home(name, value)} | {first} |"


def home(name: str, value: object) -> str:
    """Returns the name as a link to the page that describes it, if one does."""
    if inspect.isclass(value) and issubclass(value, errors.OutboxKitError):
        return f"[`{name}`](../errors.md#{value.code})"
    wanted = f"### `{name}`"
    module_name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    for page in sorted(_API.glob("*.md"), key=lambda page: module_name.find(page.stem) < 0):
        text = page.read_text()
        if isinstance(value, ModuleType) and f": api {module_name} -->" in text:
            return f"[`{name}`]({page.name})"
        if f"{wanted}\n" in text:
            return f"[`{name}`]({page.name}#{name.lower()})"
    return f"`{name}`"


def prose(documented: object) -> Iterator[str]:
    """Yields the lines of a docstring in Google's style as Markdown."""
    section = ""
    lines = (inspect.getdoc(documented) or "").splitlines()
    for line in _literals(lines):
        if found := _SECTION.match(line):
            section = found[1]
            text = line.removeprefix(found[0]).strip()
            yield from ("", f"**{section}:** {text}".rstrip(), *([""] if section in _LISTS else []))
        elif section in _LISTS and line.startswith("    "):
            item = _ITEM.match(line.strip()) if not line.startswith("     ") else None
            yield f"- `{item['name']}`: {item['text']}" if item else f"  {line.strip()}"
        elif section and line.startswith("    "):
            yield line.strip()
        else:
            section = section if not line.strip() else ""
            yield line


def _literals(lines: list[str]) -> Iterator[str]:
    """Yields the lines; those after one that ends in two colons are a block of code."""
    code: list[str] = []
    wanted = False
    for line in lines:
        if wanted and (not line.strip() or line.startswith("    ")):
            code.append(line)
            continue
        yield from _fenced(code)
        code, wanted = [], line.endswith("::")
        yield line.removesuffix(":") if wanted else line
    yield from _fenced(code)


def _fenced(code: list[str]) -> Iterator[str]:
    text = textwrap.dedent("\n".join(code)).strip("\n")
    if text:
        language = "toml" if text.startswith("[[") else "text" if "…" in text else "py"
        yield from ("", f"```{language}", *text.splitlines(), "```", "")


def _entry(name: str, value: object, where: ModuleType) -> Iterator[str]:
    if isinstance(value, ModuleType):
        return
    yield from (f"### `{name}`", "")
    if inspect.isclass(value):
        yield from _class(name, value)
    elif inspect.isroutine(value) or hasattr(value, "__wrapped__"):
        yield from (*_code(_header(inspect.unwrap(value))), *prose(value), "")  # type: ignore[arg-type]
    else:
        yield from _constant(name, where)


def _class(name: str, value: type) -> Iterator[str]:
    yield from (*_code(_shape(value)), *prose(value), "")
    for member, found in vars(value).items():
        plain = found.__func__ if isinstance(found, classmethod | staticmethod) else found
        plain = plain.fget if isinstance(plain, property) else plain
        if not member.startswith("_") and inspect.isfunction(plain) and inspect.getdoc(plain):
            yield from (f"#### `{name}.{member}`", "", *_code(_header(plain)), *prose(plain), "")


def _code(text: str) -> Iterator[str]:
    yield from ("```py", *text.splitlines(), "```", "")


def _source(value: Any) -> tuple[list[str], Any]:
    lines, _ = inspect.getsourcelines(value)
    text = textwrap.dedent("".join(lines))
    return text.splitlines(), ast.parse(text).body[0]


def _header(function: Any) -> str:
    """The signature as it stands in the source; of decorators only those that change the call."""
    lines, node = _source(function)
    ends = node.body[0].lineno - 1
    one_line = [lines[node.lineno - 1][: node.body[0].col_offset]]
    header = one_line if ends < node.lineno else lines[node.lineno - 1 : ends]
    kept = [f"@{text}" for one in node.decorator_list if (text := ast.unparse(one)) in _SHOWN]
    return "\n".join([*kept, *header]).rstrip().removesuffix(":")


_SHOWN = frozenset({"classmethod", "staticmethod", "property", "contextmanager", "pytest.fixture"})


def _shape(value: type) -> str:
    """The class line, its fields, members or constructor, as they stand in the source."""
    try:
        lines, node = _source(value)
    except (OSError, TypeError):  # made at run time
        return f"class {value.__name__}"
    head = lines[node.lineno - 1 : node.body[0].lineno - 1] or [f"class {value.__name__}:"]
    fields: list[str] = []
    for one in node.body:
        if isinstance(one, ast.AnnAssign | ast.Assign):
            target = one.target if isinstance(one, ast.AnnAssign) else one.targets[0]
            if not ast.unparse(target).startswith("_") or ast.unparse(target) == "__outbox__":
                fields += lines[one.lineno - 1 : one.end_lineno]
        elif isinstance(one, ast.FunctionDef) and one.name == "__init__":
            fields += [*lines[one.lineno - 1 : one.body[0].lineno - 1]]
            fields[-1] = fields[-1].rstrip().removesuffix(":")
    decorators = [f"@{ast.unparse(one)}" for one in node.decorator_list if "dataclass" in ast.unparse(one)]
    text = "\n".join([*decorators, *head, *(line.replace("#: ", "# ") for line in fields)]).rstrip()
    return text if fields else text.removesuffix(":")


def _constant(name: str, where: ModuleType) -> Iterator[str]:
    """The line that defines it, in the module itself or where the module has it from."""
    lines = inspect.getsource(where).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.ImportFrom) and node.module and name in {one.name for one in node.names}:
            yield from _constant(name, importlib.import_module(node.module))
            return
        target = node.target if isinstance(node, ast.AnnAssign) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else target
        if target is not None and ast.unparse(target) == name:
            yield from _code("\n".join(lines[node.lineno - 1 : node.end_lineno][:12]).replace("#: ", "# "))
            return
