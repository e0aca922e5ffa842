"""One finding of the compatibility check: what, where in both schemas, why, and how to repair it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["Direction", "Problem", "ProblemKind", "Severity", "fix_for"]


class Severity(Enum):
    """ERROR: some data cannot be read. WARNING: all data can be read, but readers differ in what they see."""

    ERROR = "error"
    WARNING = "warning"


class ProblemKind(Enum):
    """The rule that was broken; the first six are those of Avro Java."""

    NAME_MISMATCH = "NAME_MISMATCH"
    FIXED_SIZE_MISMATCH = "FIXED_SIZE_MISMATCH"
    MISSING_ENUM_SYMBOLS = "MISSING_ENUM_SYMBOLS"
    READER_FIELD_MISSING_DEFAULT_VALUE = "READER_FIELD_MISSING_DEFAULT_VALUE"
    TYPE_MISMATCH = "TYPE_MISMATCH"
    MISSING_UNION_BRANCH = "MISSING_UNION_BRANCH"
    INVALID_DEFAULT = "INVALID_DEFAULT"
    AMBIGUOUS_ALIAS = "AMBIGUOUS_ALIAS"
    LOGICAL_TYPE_CHANGE = "LOGICAL_TYPE_CHANGE"
    ALIAS_STEALS_VALUE = "ALIAS_STEALS_VALUE"
    NAMESPACE_MISMATCH = "NAMESPACE_MISMATCH"
    UNION_BRANCH_SHADOWED = "UNION_BRANCH_SHADOWED"
    BYTES_AS_TEXT = "BYTES_AS_TEXT"


class Direction(Enum):
    """Direction of reading between two versions."""

    NEW_READS_OLD = "new reads old"
    OLD_READS_NEW = "old reads new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One finding.

    Attributes:
        kind: the broken rule.
        severity: error (data is lost or refused) or warning.
        reader_path: field names from the root of the reader: ``OrderPlaced.lines[].sku``, ``payload(union:Card).sum``.
        reader_pointer: JSON pointer into the reader's schema document.
        writer_path: the same place in the writer, by the writer's names.
        writer_pointer: JSON pointer into the writer's schema document.
        reader_fragment: the JSON found at `reader_pointer`.
        writer_fragment: the JSON found at `writer_pointer`, None where the writer has nothing.
        message: what does not fit.
        fix: how to repair it.
        direction: which version reads, when two versions of one subject were compared.
        against: label of the other version (``version 3 (id 41)``), when known.
        example: smallest value, in Avro JSON encoding of the writer's schema, that cannot be read.
        has_example: whether `example` was built (null is an example too).
    """

    kind: ProblemKind
    severity: Severity
    reader_path: str
    reader_pointer: str
    writer_path: str
    writer_pointer: str
    message: str
    fix: str
    reader_fragment: object = None
    writer_fragment: object = None
    direction: Direction | None = None
    against: str | None = None
    example: object = None
    has_example: bool = False

    @property
    def is_error(self) -> bool:
        """True if some data cannot be read."""
        return self.severity is Severity.ERROR

    def __str__(self) -> str:
        return f"{self.kind.value} at {self.reader_path} ({self.reader_pointer or '/'}): {self.message}"


_FIXES: Final[Mapping[ProblemKind, str]] = {
    ProblemKind.NAME_MISMATCH: "give the reader's type the alias {writer_name} (the writer's full name)",
    ProblemKind.FIXED_SIZE_MISMATCH: "a fixed never changes its size: use a new type name in a new field",
    ProblemKind.MISSING_ENUM_SYMBOLS: (
        "give the reader's enum a default and deploy the consumers first, then add symbols"
    ),
    ProblemKind.READER_FIELD_MISSING_DEFAULT_VALUE: (
        'add "default", or make it ["null", …] with default null, or alias the old name if it was renamed'
    ),
    ProblemKind.TYPE_MISMATCH: (
        "only int→long→float→double and string↔bytes are promoted: keep the old type, or add a new field and write both"
    ),
    ProblemKind.MISSING_UNION_BRANCH: "add the branch to the readers first, then let writers use it",
    ProblemKind.INVALID_DEFAULT: "make the default a value of the field's type",
    ProblemKind.AMBIGUOUS_ALIAS: "keep one of the two names: drop the alias, or the writer's second field",
    ProblemKind.LOGICAL_TYPE_CHANGE: "keep the logical type, or add a new field with the new one and write both",
    ProblemKind.ALIAS_STEALS_VALUE: "drop the alias, or the field that still carries the old name",
    ProblemKind.NAMESPACE_MISMATCH: "give the reader's type the alias {writer_name} (the writer's full name)",
    ProblemKind.UNION_BRANCH_SHADOWED: "put the exact type first in the reader's union, and keep short names unique",
    ProblemKind.BYTES_AS_TEXT: "keep bytes, or make sure that every writer sends UTF-8",
}


def fix_for(kind: ProblemKind, *, writer_name: str = "") -> str:
    """Returns the repair of one kind of problem."""
    return _FIXES[kind].format(writer_name=writer_name) if "{" in _FIXES[kind] else _FIXES[kind]
