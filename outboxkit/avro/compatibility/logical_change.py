"""Effect of a change of logical type on the values: none, another Python type, or other values.

The specification compares decimals only (scale and precision). Implementations silently apply the reader's unit to the
writer's number, so a timestamp lands in 1970 and an amount is off by 100: those changes are errors here.
"""

from __future__ import annotations

from dataclasses import dataclass

from outboxkit.avro.compatibility.examples import Example
from outboxkit.avro.model.nodes import Fixed, Logical, Primitive

__all__ = ["LogicalChange", "logical_change"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogicalChange:
    """A changed logical type.

    Attributes:
        message: what changes.
        breaks: values are read wrong, or some cannot be read.
        example: a value that cannot be read; None with `breaks` means that no value can be trusted.
    """

    message: str
    breaks: bool
    example: Example | None = None


def logical_change(reader: Primitive | Fixed, writer: Primitive | Fixed) -> LogicalChange | None:
    """Compares the logical types of two nodes whose base types fit."""
    new, old = reader.logical, writer.logical
    if new == old:
        return None
    if new is not None and old is not None:
        return _both(new, old, writer)
    if new is None:
        return LogicalChange(message=f"the writer's {old} is read as plain {reader.type}", breaks=False)
    message = f"the writer's plain {writer.type} is read as {new}"
    outside = _outside(new, writer)
    return LogicalChange(message=message, breaks=outside is not None, example=outside)


def _both(new: Logical, old: Logical, writer: Primitive | Fixed) -> LogicalChange:
    if new.name != old.name:
        return LogicalChange(message=f"the writer's {old} would be read as {new}: other values", breaks=True)
    if new.scale != old.scale:
        return LogicalChange(message=f"{old} read as {new}: values are off by powers of ten", breaks=True)
    if new.precision >= old.precision:
        return LogicalChange(message=f"{old} is read as {new}", breaks=False)
    message = f"{old} has more digits than {new} of the reader"
    return LogicalChange(message=message, breaks=True, example=_too_long(new, writer))


def _outside(new: Logical, writer: Primitive | Fixed) -> Example | None:
    """Returns a plain value that the logical type does not have; dates and instants take any number."""
    if new.name in ("time-millis", "time-micros"):
        return Example(value=-1)
    if new.name == "uuid" and isinstance(writer, Primitive):
        return Example(value="")
    if new.name == "decimal":
        return Example(value="\x7f" + "\xff" * (writer.size - 1) if isinstance(writer, Fixed) else "")
    return None


def _too_long(new: Logical, writer: Primitive | Fixed) -> Example:
    unscaled = 10**new.precision
    size = writer.size if isinstance(writer, Fixed) else unscaled.bit_length() // 8 + 1
    return Example(value=unscaled.to_bytes(size, "big", signed=True).decode("latin-1"))
