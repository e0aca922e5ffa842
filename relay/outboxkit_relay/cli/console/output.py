"""What people see: tables that fit, ages, questions. Every value is escaped: data must not command a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit_relay import redaction

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import timedelta

__all__ = ["ago", "columns", "confirmed", "field", "lines", "plain", "print_json", "safe", "table", "verdict"]

_GAP: Final = 2
_WHOLE_SECONDS: Final = 10  # from here on tenths say nothing
_NARROWEST: Final = 8  # of a column that is cut
_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))


def print_json(value: Any) -> None:
    """One JSON value in one line; escaped to ASCII, so that no control character reaches a terminal."""
    click.echo(json.dumps(value, default=str))


def safe(text: object) -> str:
    """Text that cannot command a terminal."""
    return redaction.escaped(str(text))


def field(name: str, value: object, width: int = 12) -> None:
    """A line ``name  value``; on a terminal a long value goes on below itself."""
    room = columns()
    text = safe(value)
    lines = textwrap.wrap(text, max(room - width - _GAP, _NARROWEST)) if room else [text]
    for at, line in enumerate(lines or [""]):
        click.echo(f"{name if at == 0 else '':<{width}}  {line}".rstrip())


def verdict(word: str, text: str, colour: str) -> None:
    """A line that begins with a word in colour; on a terminal a long text goes on below itself."""
    room = columns() if sys.stdout.isatty() else None
    text = safe(text)
    lines = textwrap.wrap(text, max(room - len(word) - _GAP, _NARROWEST)) if room else [text]
    click.echo(f"{click.style(word, fg=colour, bold=True)}{' ' * _GAP}{lines[0]}")
    for line in lines[1:]:
        click.echo(f"{' ' * (len(word) + _GAP)}{line}")


def lines(text: str) -> None:
    """Text of several lines; on a terminal what is too long goes on below its own indentation."""
    room = columns() if sys.stdout.isatty() else None
    for line in text.splitlines():
        below = line[: len(line) - len(line.lstrip())] + " " * _GAP
        if room and len(line) > room:
            line = textwrap.fill(line, room, subsequent_indent=below, break_on_hyphens=False)  # noqa: PLW2901  the same line
        click.echo(line)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]], whole: Collection[str] = ()) -> None:
    """Prints columns as wide as their content; on a terminal the widest are cut so that every row is one line.

    Args:
        headers: of the columns.
        rows: of cells.
        whole: headers of columns that people copy. They are not cut: where a row has no room, it becomes a block.
    """
    cells = [[safe(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(headers))]
    fitted = _fitted(widths, columns(), {headers.index(name) for name in whole})
    if whole and not _fits(fitted, columns()):
        _print_blocks(headers, rows)
        return
    for row in cells:
        line = (" " * _GAP).join(_cut(cell, width).ljust(width) for cell, width in zip(row, fitted, strict=True))
        click.echo(line.rstrip())


def _print_blocks(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    width = max(map(len, headers))
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for header, cell in zip(headers, row, strict=True):
            field(header.lower(), cell, width)


def columns() -> int | None:
    """The width of the terminal; None when there is none, and nothing needs to be cut."""
    return shutil.get_terminal_size((0, 0)).columns or None


def ago(age: timedelta) -> str:
    """An age as people say it: ``0.4s``, ``6m12s``, ``3d4h``."""
    seconds = max(0.0, age.total_seconds())
    for unit, name, part, part_name in _UNITS:
        if seconds >= unit:
            whole, rest = int(seconds // unit), int(seconds % unit // part)
            return f"{whole}{name}{rest}{part_name}" if rest else f"{whole}{name}"
    return f"{seconds:.0f}s" if seconds >= _WHOLE_SECONDS else f"{seconds:.1f}s"


def confirmed(question: str, *, yes: bool) -> bool:
    """Whether the person says yes; never asks where nobody can answer.

    Raises:
        click.UsageError: standard input is no terminal, and ``--yes`` is not given.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError(f"{question} Nobody can answer here: standard input is no terminal. Add --yes.")
    return click.confirm(safe(question), err=True)


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Values as JSON has them; None stays."""
    return {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in values.items()
    }


def _fitted(widths: list[int], room: int | None, whole: Collection[int]) -> list[int]:
    """The widths, the widest columns cut until a row fits, but for those that stay whole."""
    fitted = list(widths)
    cuttable = [at for at in range(len(widths)) if at not in whole]
    while not _fits(fitted, room):
        widest = max(cuttable, key=fitted.__getitem__)
        if fitted[widest] <= _NARROWEST:
            break
        fitted[widest] -= 1
    return fitted


def _fits(widths: list[int], room: int | None) -> bool:
    return not room or sum(widths) + _GAP * (len(widths) - 1) <= room


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
