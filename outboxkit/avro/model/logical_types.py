"""Logical types that count: known by name, on the right base type, with sane properties.

The specification asks that an unknown or invalid logical type is ignored and the base type is used; so does
`logical_of`, and `logical_fault` says why, for the linter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from outboxkit.avro.model.nodes import Logical

__all__ = ["MAX_PRECISION", "decimal_digits", "logical_fault", "logical_of"]

MAX_PRECISION: Final = 4_000
"""Digits of a decimal: turning bytes into digits takes quadratic time."""

_BASES: Final[Mapping[str, tuple[str, ...]]] = {
    "big-decimal": ("bytes",),
    "date": ("int",),
    "decimal": ("bytes", "fixed"),
    "duration": ("fixed",),
    "local-timestamp-micros": ("long",),
    "local-timestamp-millis": ("long",),
    "local-timestamp-nanos": ("long",),
    "time-micros": ("long",),
    "time-millis": ("int",),
    "timestamp-micros": ("long",),
    "timestamp-millis": ("long",),
    "timestamp-nanos": ("long",),
    "uuid": ("string", "fixed"),
}
_SIZES: Final = {"duration": 12, "uuid": 16}


def logical_of(base: str, value: Mapping[str, object]) -> Logical | None:
    """Returns the logical type of a schema object, or None when it has none that counts."""
    name = value.get("logicalType")
    if not isinstance(name, str) or logical_fault(base, value) is not None:
        return None
    if name != "decimal":
        return Logical(name=name)
    return Logical(name=name, precision=_whole(value, "precision") or 0, scale=_whole(value, "scale") or 0)


def logical_fault(base: str, value: Mapping[str, object]) -> str | None:
    """Says why the logical type of a schema object is ignored, or return None."""
    name = value.get("logicalType")
    if name is None:
        return None
    if not isinstance(name, str) or name not in _BASES:
        return f"the logical type {name!r} is unknown"
    if base not in _BASES[name]:
        return f"{name} annotates {' or '.join(_BASES[name])}, not {base}"
    if base == "fixed" and name in _SIZES and value.get("size") != _SIZES[name]:
        return f"{name} needs a fixed of {_SIZES[name]} bytes"
    return _decimal_fault(base, value) if name == "decimal" else None


def decimal_digits(size: int) -> int:
    """Returns how many decimal digits fit into `size` bytes.

    Avro specification, "Decimal": floor(log10(2^(8*n - 1) - 1)).
    """
    # 2^k - 1 has as many digits as 2^k, which is never a power of ten.
    return math.floor((8 * size - 1) * math.log10(2)) if size else 0


def _decimal_fault(base: str, value: Mapping[str, object]) -> str | None:
    precision, scale = _whole(value, "precision"), _whole(value, "scale") if "scale" in value else 0
    if precision is None or not 1 <= precision <= MAX_PRECISION:
        return f"decimal needs a precision from 1 to {MAX_PRECISION}"
    if scale is None or not 0 <= scale <= precision:
        return "the scale of a decimal lies between 0 and its precision"
    size = value.get("size")
    if base == "fixed" and isinstance(size, int) and size < MAX_PRECISION and precision > decimal_digits(size):
        return f"{precision} digits do not fit into {size} bytes"
    return None


def _whole(value: Mapping[str, object], key: str) -> int | None:
    found = value.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None
