"""Words: values as people read them, on a terminal or a page. Pure. What is shown is inert: data commands no screen."""

from __future__ import annotations

import unicodedata
from datetime import UTC
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime, timedelta

__all__ = ["ago", "count", "instant", "safe", "shortened", "text_of"]

_ID_LENGTH: Final = 8  # characters of an id, when nothing more is needed
_WHOLE_SECONDS: Final = 10  # from here on tenths say nothing
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


def shortened(ids: Iterable[str]) -> Mapping[str, str]:
    """Returns each id's first characters, as many as tell those of one screen apart, and at least eight.

    Ids of version 7 begin with the time: those of one second share more than eight.
    """
    known = sorted(set(ids))
    length = max((_ID_LENGTH, *(_shared(*pair) + 1 for pair in pairwise(known))))
    return {one: one[:length] for one in known}


def _shared(one: str, other: str) -> int:
    """Number of characters with which both begin."""
    both = zip(one, other, strict=False)
    return next((at for at, (first, second) in enumerate(both) if first != second), min(len(one), len(other)))


def instant(at: datetime | None) -> str:
    """Returns an instant as people read it: ``2026-11-30 12:00:07 UTC``; ``-`` for none."""
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


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
