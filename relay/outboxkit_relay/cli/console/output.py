"""Output: tables that fit, ages, questions. Every value is made inert: data must not command a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final

import click

from outboxkit.errors import ConfigurationError
from outboxkit_relay.words import ago, count, instant, safe, text_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

__all__ = [
    "ago",
    "columns",
    "confirmed",
    "count",
    "field",
    "instant",
    "lines",
    "plain",
    "print_json",
    "safe",
    "table",
    "text_of",
    "verdict",
]

_GAP: Final = 2
_NARROWEST: Final = 8  # of a column that is cut
_UNBOUNDED: Final = 100_000  # columns, where nothing needs to be cut


def print_json(value: Any) -> None:
    """Prints one JSON value in one line; escaped to ASCII, so that no control character reaches a terminal."""
    click.echo(json.dumps(value, default=str))


def field(name: str, value: object, width: int = 12) -> None:
    """Prints a line ``name  value``; on a terminal a long value goes on below itself."""
    room = columns()
    text = safe(value)
    lines = textwrap.wrap(text, max(room - width - _GAP, _NARROWEST)) if room else [text]
    for at, line in enumerate(lines or [""]):
        click.echo(f"{name if at == 0 else '':<{width}}  {line}".rstrip())


def verdict(word: str, text: str, colour: str) -> None:
    """Prints a line that begins with a word in colour; on a terminal a long text goes on below itself."""
    room = columns() if sys.stdout.isatty() else None
    text = safe(text)
    lines = textwrap.wrap(text, max(room - len(word) - _GAP, _NARROWEST)) if room else [text]
    click.echo(f"{click.style(word, fg=colour, bold=True)}{' ' * _GAP}{lines[0]}")
    for line in lines[1:]:
        click.echo(f"{' ' * (len(word) + _GAP)}{line}")


def lines(text: str) -> None:
    """Prints text of several lines; on a terminal what is too long goes on below its own indentation."""
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
    from rich.console import Console  # of all that the command line does, only tables need it
    from rich.table import Table
    from rich.text import Text

    room = columns()
    cells = [[Text(safe(cell), no_wrap=True, overflow="ellipsis") for cell in row] for row in rows]
    if whole and room and _narrowest(headers, cells, whole) > room:
        _print_blocks(headers, rows)
        return
    drawn = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="")
    for header in headers:
        drawn.add_column(Text(header, no_wrap=True, overflow="ellipsis"), no_wrap=header in whole)
    for row in cells:
        drawn.add_row(*row)
    console = Console(width=room or _UNBOUNDED, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(drawn)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def _narrowest(headers: Sequence[str], cells: Sequence[Sequence[Any]], whole: Collection[str]) -> int:
    """Returns the least room for the table: columns that are not whole may be cut."""
    widths = [max(len(header), *(row[at].cell_len for row in cells), 0) for at, header in enumerate(headers)]
    narrowest = [
        width if header in whole else min(width, _NARROWEST) for header, width in zip(headers, widths, strict=True)
    ]
    room: int = sum(narrowest)
    return room + _GAP * (len(headers) - 1)


def _print_blocks(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    width = max(map(len, headers))
    for number, row in enumerate(rows):
        if number:
            click.echo()
        for header, cell in zip(headers, row, strict=True):
            field(header.lower(), cell, width)


def columns() -> int | None:
    """Returns the width of the terminal; None when there is none, and nothing needs to be cut."""
    return shutil.get_terminal_size((0, 0)).columns or None


def confirmed(question: str, *, yes: bool) -> bool:
    """Tells whether the person says yes; never asks where nobody can answer.

    Raises:
        ConfigurationError: standard input is no terminal, and ``--yes`` is not given.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigurationError(f"{safe(question)} Nobody can answer here: standard input is no terminal. Add --yes.")
    return click.confirm(safe(question), err=True)


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Returns values as JSON has them; None stays."""
    return {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in values.items()
    }
