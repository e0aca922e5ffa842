"""Findings: what a check of a database or a broker saw, and the line that mends it. Pure.

Whoever examines something yields findings and nothing where all is well: `outboxkit doctor` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "FindingSeverity", "note", "problem", "warning"]


class FindingSeverity(StrEnum):
    """Severities of a finding."""

    PROBLEM = "problem"  #: messages are lost, reordered or stuck, now or at the next fault
    WARNING = "warning"  #: it works, and a promise is weaker than it could be
    NOTE = "note"  #: could not be examined, or is fine for a development machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        check: the name of the check, as the documentation lists it.
        severity: how bad it is.
        seen: what is wrong, with the names and numbers that were found; never a secret.
        fix: what to do, a command or a statement where there is one.
    """

    check: str
    severity: FindingSeverity
    seen: str
    fix: str


def problem(check: str, seen: str, fix: str) -> Finding:
    """Returns a finding by which messages are lost, reordered or stuck."""
    return Finding(check=check, severity=FindingSeverity.PROBLEM, seen=seen, fix=fix)


def warning(check: str, seen: str, fix: str) -> Finding:
    """Returns a finding by which a promise is weaker than it could be."""
    return Finding(check=check, severity=FindingSeverity.WARNING, seen=seen, fix=fix)


def note(check: str, seen: str, fix: str) -> Finding:
    """Returns a finding that harms nobody on a development machine."""
    return Finding(check=check, severity=FindingSeverity.NOTE, seen=seen, fix=fix)
