"""The result of the gate: which findings count, which are allowed for a time, and what they have in common.

An exception to the rules is one dated entry for one kind of problem at one path, never a mode switched off::

    [[allow]]
    subject = "shop.OrderPlaced"
    kind = "READER_FIELD_MISSING_DEFAULT_VALUE"
    path = "OrderPlaced.total"
    until = 2027-01-31
    reason = "the topic was emptied on 2026-11-20"
"""

from __future__ import annotations

import datetime as dt
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from outboxkit.avro.compatibility.history import Mode, Version, check_history
from outboxkit.avro.compatibility.problems import Direction, Problem, ProblemKind
from outboxkit.avro.gate.json_lines import line_of
from outboxkit.avro.model.nodes import Schema
from outboxkit.errors import SchemaError

__all__ = ["Allow", "Finding", "GateResult", "evaluate", "find", "parse_allowed"]

_KEYS: Final = {"subject", "kind", "path", "until", "reason"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One problem of one subject, at one place of one file.

    Attributes:
        subject: the subject whose new version was compared.
        problem: what was found; of several versions with the same problem, that of the latest.
        against: the versions it was found against, oldest first.
        breaks: the mode's words for what no longer works.
        file: where the new version is written, empty when it is in no file.
        line: the line in that file.
    """

    subject: str
    problem: Problem
    against: tuple[str, ...] = ()
    breaks: str = ""
    file: str = ""
    line: int = 1

    @property
    def path(self) -> str:
        """The reader's field path, which allow entries name."""
        return self.problem.reader_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """One exception."""

    subject: str
    kind: ProblemKind
    path: str
    until: dt.date
    reason: str

    def covers(self, finding: Finding) -> bool:
        """True if the entry is about this finding, whatever the date."""
        mine = self.subject, self.kind, self.path
        return mine == (finding.subject, finding.problem.kind, finding.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """The findings of a check, sorted.

    Attributes:
        errors: what must be repaired.
        warnings: what readers may see differently.
        allowed: errors that an entry allows today.
        expired: entries that allow nothing any more because their date has passed.
        unused: entries that no finding needs.
    """

    errors: tuple[Finding, ...] = ()
    warnings: tuple[Finding, ...] = ()
    allowed: tuple[Finding, ...] = ()
    expired: tuple[Allow, ...] = ()
    unused: tuple[Allow, ...] = ()

    @property
    def passed(self) -> bool:
        """True if nothing must be repaired."""
        return not self.errors


def find(
    subject: str,
    new: Schema,
    history: Sequence[Version],
    mode: Mode,
    *,
    file: str = "",
    text: str = "",
) -> list[Finding]:
    """Compares a new version with its history; equal problems of several versions are one finding."""
    groups: dict[tuple[object, ...], list[Problem]] = {}
    for problem in check_history(mode, new, history):
        key = problem.direction, problem.kind, problem.reader_path, problem.writer_path, problem.message
        groups.setdefault(key, []).append(problem)
    return [_finding(subject, group, file, text) for group in groups.values()]


def _finding(subject: str, group: list[Problem], file: str, text: str) -> Finding:
    latest = group[-1]
    # The new version is the reader in one direction and the writer in the other; only it has a file.
    pointer = latest.writer_pointer if latest.direction is Direction.OLD_READS_NEW else latest.reader_pointer
    breaks = {
        Direction.NEW_READS_OLD: "BACKWARD (consumers on the new version cannot read what older ones wrote)",
        Direction.OLD_READS_NEW: "FORWARD (consumers on older versions cannot read what the new one writes)",
    }
    return Finding(
        subject=subject,
        problem=latest,
        against=tuple(one.against or "" for one in group),
        breaks="" if latest.direction is None or not latest.is_error else breaks[latest.direction],
        file=file,
        line=line_of(text, pointer) if text else 1,
    )


def evaluate(findings: Iterable[Finding], allowed: Sequence[Allow], today: dt.date) -> GateResult:
    """Sorts findings into errors, warnings and what is allowed today."""
    found = list(findings)
    errors = [one for one in found if one.problem.is_error]
    current = [entry for entry in allowed if entry.until >= today]
    excused = [one for one in errors if any(entry.covers(one) for entry in current)]
    return GateResult(
        errors=tuple(one for one in errors if one not in excused),
        warnings=tuple(one for one in found if not one.problem.is_error),
        allowed=tuple(excused),
        expired=tuple(entry for entry in allowed if entry.until < today),
        unused=tuple(entry for entry in current if not any(entry.covers(one) for one in errors)),
    )


def parse_allowed(text: str) -> tuple[Allow, ...]:
    """Reads the allow entries of a TOML text.

    Raises:
        SchemaError: an entry lacks a key, has an unknown one, or no date.
    """
    try:
        entries = tomllib.loads(text).get("allow", [])
    except tomllib.TOMLDecodeError as error:
        raise SchemaError(f"the allow entries are no TOML: {error}") from error
    return tuple(_entry(number, one) for number, one in enumerate(entries, 1))


def _entry(number: int, given: dict[str, Any]) -> Allow:
    if set(given) != _KEYS:
        raise SchemaError(f"allow entry {number} needs exactly the keys {', '.join(sorted(_KEYS))}")
    if not isinstance(given["until"], dt.date) or isinstance(given["until"], dt.datetime):
        raise SchemaError(f"allow entry {number}: until is a date, as in 2027-01-31")
    if given["kind"] not in ProblemKind.__members__:
        raise SchemaError(f"allow entry {number}: there is no kind {given['kind']!r}")
    texts = {key: str(given[key]) for key in ("subject", "path", "reason")}
    return Allow(kind=ProblemKind[given["kind"]], until=given["until"], **texts)
