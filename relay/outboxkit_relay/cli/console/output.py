"""Output: tables that fit, ages, questions. Every value is made inert: data must not command a terminal."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
import unicodedata
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import timedelta

__all__ = [
    "ago",
    "columns",
    "confirmed",
    "count",
    "field",
    "lines",
    "plain",
    "print_json",
    "safe",
    "table",
    "text_of",
    "verdict",
]

_GAP: Final = 2
_WHOLE_SECONDS: Final = 10  # from here on tenths say nothing
_NARROWEST: Final = 8  # of a column that is cut
_UNBOUNDED: Final = 100_000  # columns, where nothing needs to be cut
_UNITS: Final = ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "m"), (60, "m", 1, "s"))
_MAX_MARKS: Final = 3  # combining marks on one letter: more pile up over other lines
_LAST_OF_A_BYTE: Final = 0xFF
_LAST_OF_A_PLANE: Final = 0xFFFF
_SHORT_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Controls, formats (bidirectional ones among them), private and unassigned ones, half surrogates, separators of lines.
_INVISIBLE: Final = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"))
# Letters and marks that show nothing: Unicode's Default_Ignorable_Code_Point beyond the categories above.
_IGNORABLE: Final = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)))
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))


def safe(text: object) -> str:
    """Returns text in one inert line: what cannot be seen, or would move what can be seen, is written as an escape."""
    said = str(text)
    if said.isascii() and said.isprintable():
        return said
    shown, marks = [], 0
    for character in said:
        category = unicodedata.category(character)
        marks = marks + 1 if category.startswith("M") else 0
        is_hidden = category in _INVISIBLE or character in _IGNORABLE or marks > _MAX_MARKS
        shown.append(_escape(character) if is_hidden else character)
    return "".join(shown)


def _escape(character: str) -> str:
    code = ord(character)
    if character in _SHORT_ESCAPES:
        return _SHORT_ESCAPES[character]
    if code <= _LAST_OF_A_BYTE:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= _LAST_OF_A_PLANE else f"\\U{code:08x}"


def text_of(data: bytes | None) -> str:
    """Returns bytes as people read and type them: text, with escapes for what is none; ``-`` for nothing."""
    return "-" if data is None else data.decode("utf-8", "backslashreplace")


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


def ago(age: timedelta) -> str:
    """Returns an age as people say it: ``0.4s``, ``6m12s``, ``3d4h``."""
    seconds = max(0.0, age.total_seconds())
    for unit, name, part, part_name in _UNITS:
        if seconds >= unit:
            whole, rest = int(seconds // unit), int(seconds % unit // part)
            return f"{whole}{name}{rest}{part_name}" if rest else f"{whole}{name}"
    return f"{seconds:.0f}s" if seconds >= _WHOLE_SECONDS else f"{seconds:.1f}s"


def count(number: int, what: str) -> str:
    """Returns a number and its noun: ``1 message``, ``3,120 messages``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def confirmed(question: str, *, yes: bool) -> bool:
    """Tells whether the person says yes; never asks where nobody can answer.

    Raises:
        click.UsageError: standard input is no terminal, and ``--yes`` is not given.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError(f"{safe(question)} Nobody can answer here: standard input is no terminal. Add --yes.")
    return click.confirm(safe(question), err=True)


def plain(values: Mapping[str, object]) -> dict[str, object]:
    """Returns values as JSON has them; None stays."""
    return {
        name: value if isinstance(value, str | int | float | bool | None) else str(value)
        for name, value in values.items()
    }
