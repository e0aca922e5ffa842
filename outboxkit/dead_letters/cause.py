"""The cause of a death, in words that may be kept: classes, places and names, and texts of our own errors only."""

from __future__ import annotations

import hashlib
import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outboxkit import errors
from outboxkit.errors import OutboxKitError
from outboxkit.signals import DeadLetterRequested

if TYPE_CHECKING:
    from traceback import FrameSummary

__all__ = ["details_of", "group_of", "kind_of", "place_of", "words_of"]

_OTHERS: Final = tuple(
    str(Path(path))
    for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(errors.__file__).parent)
)
_MAX_FRAMES: Final = 40
_MAX_CHAIN: Final = 10
_VALUES: Final = re.compile(r"\d+|'[^']*'|\"[^\"]*\"|\[[^\]]*\]")
_SQLITE_CONSTRAINT: Final = re.compile(
    r"(UNIQUE|NOT NULL|CHECK|FOREIGN KEY) constraint failed(?:: ([\w.]+(?:, [\w.]+)*))?"
)
_FACTS: Final = {"constraint": "constraint_name", "table": "table_name", "column": "column_name"}


def words_of(error: BaseException) -> str:
    """Returns what may be kept of an error: our own words, or only class and place of a foreign one."""
    if isinstance(error, OutboxKitError):
        return error.message
    if isinstance(error, DeadLetterRequested):
        return str(error)
    return f"{type(error).__qualname__} at {place_of(error)}"


def place_of(error: BaseException) -> str:
    """Returns file, line and function of the innermost frame of the application's own code."""
    frame = _own_frame(error)
    return "unknown place" if frame is None else f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def details_of(error: BaseException, *, keep_text: bool = False) -> dict[str, Any]:
    """Returns the chain of an error, the place of every frame and of those that are the application's, and what a
    database error names.

    Args:
        error: the error.
        keep_text: also keep the texts of foreign errors, which may quote data.
    """
    chain, frames = list(_chain(error)), _frames(error)[-_MAX_FRAMES:]
    found: dict[str, Any] = {
        "chain": [type(one).__qualname__ for one in chain],
        "places": list(map(_place, frames)),
        "own": [_place(frame) for frame in frames if _is_own(frame)],
        **_of_database(chain),
    }
    return found | ({"texts": [str(one)[:2000] for one in chain]} if keep_text else {})


def kind_of(error: BaseException) -> str:
    """Returns what stays the same when the same fault strikes again: no line number, no value, no byte offset."""
    frame = _own_frame(error)
    place = "" if frame is None else f"{Path(frame.filename).name} {frame.name}"
    constraint = _of_database(list(_chain(error))).get("constraint", "")
    words = words_of(error).partition(":")[0] if isinstance(error, OutboxKitError | DeadLetterRequested) else ""
    path = _VALUES.sub("", getattr(error, "path", "") or "")
    return "\0".join((type(error).__qualname__, place, constraint, _VALUES.sub("", words), path))


def group_of(*cause: str) -> str:
    """Returns the name of a cause: the same for the same failure, error, place, type, consumer and topic."""
    return hashlib.sha256("\0".join(cause).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen and len(seen) < _MAX_CHAIN:
        seen.append(current)
        yield current
        original = getattr(current, "orig", None)  # SQLAlchemy's wrapper holds the driver's error
        current = original if isinstance(original, BaseException) else current.__cause__ or current.__context__


def _frames(error: BaseException) -> list[FrameSummary]:
    # Without the source lines: they would be read from disk, and are not kept.
    walked = traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False)
    return list(walked)


def _place(frame: FrameSummary) -> str:
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} in {frame.name}"


def _is_own(frame: FrameSummary) -> bool:
    return not frame.filename.startswith(_OTHERS)


def _own_frame(error: BaseException) -> FrameSummary | None:
    frames = _frames(error)
    own = list(filter(_is_own, frames)) or frames
    return own[-1] if own else None


def _of_database(chain: list[BaseException]) -> dict[str, str]:
    """Returns names only: constraint, table, column, SQLSTATE. psycopg has them in ``diag``, asyncpg on the error."""
    found: dict[str, str] = {}
    for error in chain:
        diagnosis = getattr(error, "diag", error)
        for name, attribute in {**_FACTS, "sqlstate": "sqlstate"}.items():
            value = getattr(diagnosis, attribute, None) or (name == "sqlstate" and getattr(error, "sqlstate", None))
            if isinstance(value, str) and value:
                found.setdefault(name, value)
        if match := _SQLITE_CONSTRAINT.match(str(error)) if type(error).__module__ == "sqlite3" else None:
            found.setdefault("constraint", f"{match[1]} {match[2] or ''}".strip())
            found.setdefault("table", (match[2] or "").partition(".")[0])
    return found
