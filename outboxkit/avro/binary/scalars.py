"""Checks one value that holds no others: the right Python type, in range, and without losing anything on the way.

Numbers given for a date or time are the raw Avro numbers, as a decoder without logical types would see them.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
import uuid
from collections.abc import Callable, Mapping
from enum import Enum as PyEnum
from typing import Any, Final, NoReturn

from outboxkit.avro.model.nodes import Enum, Fixed, Logical, Node, Primitive
from outboxkit.errors import EncodeError

__all__ = ["Prepare", "Unfit", "leaf", "plain_type", "string", "symbol", "unfit"]

Prepare = Callable[[Any], Any]

_INT: Final = 2**31
_LONG: Final = 2**63
_FLOAT_END: Final = 2.0**128 - 2.0**103
"""From here on a double rounds to infinity in 32 bits."""
_DAY_MS: Final = 86_400_000


class Unfit(EncodeError):
    """A value that the schema does not take; the path grows while it travels up."""


def unfit(value: object, wanted: str) -> NoReturn:
    """Refuses a value; it stays out of the message itself, which is logged and may hold personal data."""
    raise Unfit(f"{type(value).__name__} is not {wanted}")


def leaf(node: Primitive | Fixed) -> Prepare:
    """Returns the check of a primitive or fixed type."""
    logical = node.logical
    if logical is not None and logical.name == "decimal":
        return _decimal(logical)
    if logical is not None and logical.name == "uuid":
        return _uuid if isinstance(node, Primitive) else _uuid_bytes
    if logical is not None and logical.name in _TEMPORAL:
        return _TEMPORAL[logical.name]
    return _fixed(node.size) if isinstance(node, Fixed) else _PRIMITIVE[node.type]


def plain_type(node: Node) -> type | None:
    """Returns the Python type whose every value can be written, or fails in the encoder library; None if there is none.

    Text with lone surrogates and whole numbers of more than 64 bits are refused by the library itself.
    """
    if not isinstance(node, Primitive) or node.logical is not None:
        return None
    return _PLAIN.get(node.type)


def symbol(node: Enum) -> Prepare:
    """Returns the check of an enum's symbols; members of a Python enum count by their value."""
    symbols = frozenset(node.symbols)

    def check(value: Any) -> str:
        if type(value) is str and value in symbols:
            return value
        plain = value.value if isinstance(value, PyEnum) else value
        if not isinstance(plain, str) or plain not in symbols:
            raise Unfit(f"the value is not a symbol of {node.name}")
        return plain

    return check


def string(value: Any) -> str:
    """Checks text: any str but lone surrogates, which have no bytes."""
    if type(value) is str and value.isascii():
        return value
    if not isinstance(value, str):
        unfit(value, "text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise Unfit("the text holds a lone surrogate") from None
    return value


def _null(value: Any) -> None:
    if value is not None:
        unfit(value, "null")


def _boolean(value: Any) -> bool:
    if value is True or value is False:
        return value
    unfit(value, "a boolean")


def _int(value: Any) -> int:
    number: int = value if type(value) is int else _whole(value)
    if -_INT <= number < _INT:
        return number
    raise Unfit("the number does not fit into 32 bits")


def _long(value: Any) -> int:
    number: int = value if type(value) is int else _whole(value)
    if -_LONG <= number < _LONG:
        return number
    raise Unfit("the number does not fit into 64 bits")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        unfit(value, "a whole number")
    return int(value)


def _double(value: Any) -> float:
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        unfit(value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise Unfit("the number does not fit into a double") from None


def _float(value: Any) -> float:
    number = _double(value)
    if -_FLOAT_END < number < _FLOAT_END or not math.isfinite(number):
        return number
    raise Unfit("the number does not fit into a float")


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, bytearray | memoryview):
        unfit(value, "bytes")
    return bytes(value)


def _fixed(size: int) -> Prepare:
    def check(value: Any) -> bytes:
        made = _bytes(value)
        if len(made) != size:
            raise Unfit(f"{len(made)} bytes instead of {size}")
        return made

    return check


def _decimal(logical: Logical) -> Prepare:
    def check(value: Any) -> decimal.Decimal:
        if isinstance(value, int) and not isinstance(value, bool):
            value = decimal.Decimal(value)
        if not isinstance(value, decimal.Decimal):
            unfit(value, "a Decimal")
        sign, digits, exponent = value.as_tuple()
        if not isinstance(exponent, int):
            raise Unfit("the number is not finite")
        if not any(digits):
            return decimal.Decimal(0)
        while exponent < -logical.scale and digits[-1] == 0:
            digits, exponent = digits[:-1], exponent + 1
        if exponent < -logical.scale or len(digits) + exponent + logical.scale > logical.precision:
            raise Unfit(f"the number does not fit into {logical}")
        return decimal.Decimal((sign, digits, exponent))

    return check


def _uuid(value: Any) -> Any:
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(string(value))
    except ValueError:
        raise Unfit("the text is not a UUID") from None


def _uuid_bytes(value: Any) -> bytes:
    return value.bytes if isinstance(value, uuid.UUID) else bytes(_fixed(16)(value))


def _instant(value: Any) -> Any:
    if type(value) is dt.datetime and value.tzinfo is dt.UTC:
        return value
    if not isinstance(value, dt.datetime):
        return _long(value)
    if value.utcoffset() is None:
        raise Unfit("the datetime is naive: give it a time zone, else the host's is taken")
    return value


def _local_instant(value: Any) -> Any:
    if not isinstance(value, dt.datetime):
        return _long(value)
    if value.tzinfo is not None:
        raise Unfit("the datetime has a time zone, which a local timestamp would drop")
    return value


def _date(value: Any) -> Any:
    if isinstance(value, dt.datetime):
        raise Unfit("a datetime is not a date: its time would be dropped")
    return value if isinstance(value, dt.date) else _int(value)


def _time(limit: int, whole: Prepare) -> Prepare:
    def check(value: Any) -> Any:
        if isinstance(value, dt.time):
            if value.tzinfo is not None:
                raise Unfit("the time has a time zone, which would be dropped")
            return value
        number = whole(value)
        if not 0 <= number < limit:
            raise Unfit("the number is not a time of day")
        return number

    return check


_TEMPORAL: Final[Mapping[str, Prepare]] = {
    "date": _date,
    "local-timestamp-micros": _local_instant,
    "local-timestamp-millis": _local_instant,
    "time-micros": _time(_DAY_MS * 1000, _long),
    "time-millis": _time(_DAY_MS, _int),
    "timestamp-micros": _instant,
    "timestamp-millis": _instant,
}

_PLAIN: Final[Mapping[str, type]] = {
    "boolean": bool,
    "bytes": bytes,
    "double": float,
    "int": int,
    "long": int,
    "string": str,
}

_PRIMITIVE: Final[Mapping[str, Prepare]] = {
    "null": _null,
    "boolean": _boolean,
    "int": _int,
    "long": _long,
    "float": _float,
    "double": _double,
    "bytes": _bytes,
    "string": string,
}
