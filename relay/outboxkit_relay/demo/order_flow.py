"""The demo's services: a shop, and what happens to an order. Each has tables of its own; they talk by events only.

    shop ─ order.placed ─▶ inventory ─ stock.reserved ─▶ payments ─ payment.authorized ─▶ shipping
     ▲                                                                                      │
     └───────────────────────────────── shipment.created ───────────────────────────────────┘

This is what a user's program looks like: handlers know their session and nothing of brokers, retries or duplicates.
"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Final

from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, Outbox, OutboxMixin, outbox_tables, publish
from outboxkit.dialects import open_engine
from outboxkit.events import EventType
from outboxkit.registries import open_registry
from outboxkit_relay.demo import contracts
from outboxkit_relay.demo.contracts import OrderPlaced, PaymentAuthorized, ShipmentCreated, StockReserved
from outboxkit_relay.settings import load

__all__ = [
    "TOPICS",
    "Base",
    "Confirmation",
    "Order",
    "Payment",
    "Reservation",
    "Shipment",
    "confirmation",
    "engine",
    "inventory",
    "inventory_repaired",
    "payments",
    "sessions",
    "shipping",
]

TOPICS: Final = ("orders", "stock", "payments", "shipments")


# On somebody's broker every demo has names of its own, so that a second one begins from nothing.
_NAMES: Final = Path("demo.json")
PREFIX: Final[str] = json.loads(_NAMES.read_text())["prefix"] if _NAMES.is_file() else ""


class Base(DeclarativeBase):
    """Our tables and outboxkit's, in one MetaData."""


outbox_tables(Base.metadata)


class Order(OutboxMixin, Base):
    """The shop's."""

    __tablename__ = "demo_orders"
    __outbox__ = Outbox(topic=f"{PREFIX}orders", key="customer", source="shop")
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    quantity: Mapped[int]
    total: Mapped[int]


class Reservation(Base):
    """The inventory's."""

    __tablename__ = "demo_reservations"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    customer: Mapped[str]
    warehouse: Mapped[str]


class Payment(Base):
    """The payments'."""

    __tablename__ = "demo_payments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    amount: Mapped[int]


class Shipment(Base):
    """The shipping's."""

    __tablename__ = "demo_shipments"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


class Confirmation(Base):
    """The shop's answer to its customer."""

    __tablename__ = "demo_confirmations"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]


engine = open_engine(load().database(), patience=timedelta(seconds=10))
sessions = sessionmaker(engine)
CONCURRENCY: Final = 1 if engine.dialect.name == "sqlite" else 16  # one writer: more of them would wait for each other
_resolve = open_registry(f"directory:{contracts.SCHEMAS}").resolve


def _inventory(contract: EventType) -> Consumer:
    consumer = Consumer(f"{PREFIX}inventory", sessions=sessions, concurrency=CONCURRENCY, resolve=_resolve)

    @consumer.on(contract, topic=f"{PREFIX}orders")
    def reserve(order: OrderPlaced, session: Session) -> None:
        session.add(Reservation(order_id=order.order_id, customer=order.customer, warehouse=order.warehouse))
        reserved = StockReserved(order_id=order.order_id, customer=order.customer, total=order.total)
        publish(session, reserved, topic=f"{PREFIX}stock", key=order.customer, source="inventory")

    return consumer


inventory = _inventory(contracts.CONTRACT_AS_RELEASED)
inventory_repaired = _inventory(contracts.CONTRACT_REPAIRED)

payments = Consumer(f"{PREFIX}payments", sessions=sessions, concurrency=CONCURRENCY)
shipping = Consumer(f"{PREFIX}shipping", sessions=sessions, concurrency=CONCURRENCY)
confirmation = Consumer(f"{PREFIX}confirmation", sessions=sessions, concurrency=CONCURRENCY)


@payments.on(StockReserved, topic=f"{PREFIX}stock")
def authorize(reserved: StockReserved, session: Session) -> None:
    """Asks the bank."""
    session.add(Payment(order_id=reserved.order_id, amount=reserved.total))
    authorized = PaymentAuthorized(order_id=reserved.order_id, customer=reserved.customer, amount=reserved.total)
    publish(session, authorized, topic=f"{PREFIX}payments", key=reserved.customer, source="payments")


@shipping.on(PaymentAuthorized, topic=f"{PREFIX}payments")
def ship(paid: PaymentAuthorized, session: Session) -> None:
    """Packs the parcel."""
    session.add(Shipment(order_id=paid.order_id))
    created = ShipmentCreated(order_id=paid.order_id, customer=paid.customer)
    publish(session, created, topic=f"{PREFIX}shipments", key=paid.customer, source="shipping")


@confirmation.on(ShipmentCreated, topic=f"{PREFIX}shipments")
def confirm(shipped: ShipmentCreated, session: Session) -> None:
    """Tells the customer."""
    session.add(Confirmation(order_id=shipped.order_id))
