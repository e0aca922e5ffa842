"""The demo's events, and their Avro contracts from the package's own data.

The inventory's first release made a classic mistake: its copy of version 2 has no default for the new field, so that it
cannot read what a shop of the previous release still writes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import outboxkit
from outboxkit import event
from outboxkit.events import EventType

__all__ = [
    "CONTRACT_AS_RELEASED",
    "CONTRACT_REPAIRED",
    "SCHEMAS",
    "OldOrderPlaced",
    "OrderPlaced",
    "PaymentAuthorized",
    "ShipmentCreated",
    "StockReserved",
]


def _schemas() -> Path:
    """In an installed package beside the code, in a checkout at its root."""
    package = Path(outboxkit.__file__).parent
    installed = package / "contracts" / "examples"
    return installed if installed.is_dir() else package.parent / "schemas" / "examples"


SCHEMAS: Final = _schemas()


def _schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCHEMAS / name).read_text())
    return found


def _without_defaults(schema: dict[str, Any]) -> dict[str, Any]:
    fields = [{name: value for name, value in field.items() if name != "default"} for field in schema["fields"]]
    return {**schema, "fields": fields}


@event("order.placed", version=1, schema=_schema("order.placed.v1.avsc"))
@dataclass(frozen=True, slots=True)
class OldOrderPlaced:
    """As a shop of the previous release still says it."""

    order_id: int
    customer: str
    quantity: int
    total: int


@event("order.placed", version=2, schema=_schema("order.placed.v2.avsc"))
@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """A customer placed an order."""

    order_id: int
    customer: str
    quantity: int
    total: int
    warehouse: str


@event("stock.reserved")
@dataclass(frozen=True, slots=True)
class StockReserved:
    """The goods of an order are set aside."""

    order_id: int
    customer: str
    total: int


@event("payment.authorized")
@dataclass(frozen=True, slots=True)
class PaymentAuthorized:
    """The customer's bank agrees."""

    order_id: int
    customer: str
    amount: int


@event("shipment.created")
@dataclass(frozen=True, slots=True)
class ShipmentCreated:
    """The parcel is on its way."""

    order_id: int
    customer: str


_V2: Final = _schema("order.placed.v2.avsc")
CONTRACT_REPAIRED: Final = EventType(name="order.placed", version=2, cls=OrderPlaced, schema=_V2, codec="avro")
CONTRACT_AS_RELEASED: Final = EventType(
    name="order.placed", version=2, cls=OrderPlaced, schema=_without_defaults(_V2), codec="avro"
)
