"""Compatibility modes over the history of one subject, in the words of Confluent's registry.

BACKWARD: consumers on the new version read what older ones wrote. FORWARD: consumers on older versions read what the
new one writes. FULL: both. The plain modes look at the latest version only, the transitive ones at all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from outboxkit.avro.compatibility.check import check
from outboxkit.avro.compatibility.problems import Direction, Problem
from outboxkit.avro.model.canonical import fingerprint
from outboxkit.avro.model.nodes import Schema

__all__ = ["Mode", "Version", "check_history"]


class Mode(Enum):
    """Compatibility that a new version of a schema must keep."""

    NONE = "NONE"
    BACKWARD = "BACKWARD"
    BACKWARD_TRANSITIVE = "BACKWARD_TRANSITIVE"
    FORWARD = "FORWARD"
    FORWARD_TRANSITIVE = "FORWARD_TRANSITIVE"
    FULL = "FULL"
    FULL_TRANSITIVE = "FULL_TRANSITIVE"

    @property
    def transitive(self) -> bool:
        """True if every older version counts, not only the latest."""
        return self.value.endswith("_TRANSITIVE")

    @property
    def directions(self) -> tuple[Direction, ...]:
        """Direction in which versions are compared."""
        base = self.value.removesuffix("_TRANSITIVE")
        back = (Direction.NEW_READS_OLD,) if base in ("BACKWARD", "FULL") else ()
        forth = (Direction.OLD_READS_NEW,) if base in ("FORWARD", "FULL") else ()
        return back + forth


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One registered version of a subject."""

    schema: Schema
    number: int | None = None
    schema_id: int | None = None
    label: str | None = None

    def __str__(self) -> str:
        if self.label is not None:
            return self.label
        facts = [] if self.schema_id is None else [f"id {self.schema_id}"]
        facts.append(f"fingerprint {fingerprint(self.schema).hex()}")
        head = "an older version" if self.number is None else f"version {self.number}"
        return f"{head} ({', '.join(facts)})"


def check_history(mode: Mode, new: Schema, history: Sequence[Version | Schema]) -> list[Problem]:
    """Compares a new version with its history (oldest first) and return the problems of **all** failing versions.

    Each problem carries its direction and the version it was found against.
    """
    versions = [one if isinstance(one, Version) else Version(schema=one) for one in history]
    found: list[Problem] = []
    for version in versions if mode.transitive else versions[-1:]:
        for direction in mode.directions:
            pair = (new, version.schema) if direction is Direction.NEW_READS_OLD else (version.schema, new)
            found += [replace(one, direction=direction, against=str(version)) for one in check(*pair)]
    return found
