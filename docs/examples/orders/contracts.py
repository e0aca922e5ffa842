"""What the services say to each other: commands ask one of them for something, events tell all what happened."""

from __future__ import annotations

from dataclasses import dataclass

from outboxkit import event


@event("order.placed")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    item: str
    total: int


@event("order.confirmed")
@dataclass(frozen=True)
class OrderConfirmed:
    order_id: int
    item: str


@event("order.cancelled")
@dataclass(frozen=True)
class OrderCancelled:
    order_id: int


@event("stock.reserve")
@dataclass(frozen=True)
class ReserveStock:
    order_id: int
    item: str


@event("stock.release")
@dataclass(frozen=True)
class ReleaseStock:
    order_id: int


@event("stock.reserved")
@dataclass(frozen=True)
class StockReserved:
    order_id: int


@event("stock.rejected")
@dataclass(frozen=True)
class StockRejected:
    order_id: int


@event("payment.authorize")
@dataclass(frozen=True)
class AuthorizePayment:
    order_id: int
    total: int


@event("payment.void")
@dataclass(frozen=True)
class VoidPayment:
    order_id: int


@event("payment.authorized")
@dataclass(frozen=True)
class PaymentAuthorized:
    order_id: int


@event("payment.declined")
@dataclass(frozen=True)
class PaymentDeclined:
    order_id: int


@event("shipment.create")
@dataclass(frozen=True)
class CreateShipment:
    order_id: int
    item: str


@event("shipment.created")
@dataclass(frozen=True)
class ShipmentCreated:
    order_id: int


@event("shipment.failed")
@dataclass(frozen=True)
class ShipmentFailed:
    order_id: int
