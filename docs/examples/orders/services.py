"""Inventory, payments, shipping, recommendations: each with a database and a relay of its own."""

from __future__ import annotations

from bank import bank, hold, void
from contracts import (
    AuthorizePayment,
    CreateShipment,
    OrderConfirmed,
    PaymentAuthorized,
    PaymentDeclined,
    ReleaseStock,
    ReserveStock,
    ShipmentCreated,
    ShipmentFailed,
    StockRejected,
    StockReserved,
    VoidPayment,
)
from sqlalchemy import delete, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, RetryPolicy, full_jitter, outbox_tables, publish

# A refusal of the bank's guard is tried again for about a minute, with delays that grow: an outage is no refusal.
PATIENT = RetryPolicy(delayed=full_jitter("50ms", cap="2s", attempts=40))
STOCK = 12  #: of every item
unroadworthy: set[int] = set()  #: orders that cannot be shipped: a fault switch


class Base(DeclarativeBase): ...


outbox_tables(Base.metadata)


class Reservation(Base):
    __tablename__ = "reservations"
    order_id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]


class Payment(Base):
    __tablename__ = "payments"
    order_id: Mapped[int] = mapped_column(primary_key=True)
    amount: Mapped[int]


class Shipment(Base):
    __tablename__ = "shipments"
    order_id: Mapped[int] = mapped_column(primary_key=True)


class Recommendation(Base):
    __tablename__ = "recommendations"
    order_id: Mapped[int] = mapped_column(primary_key=True)


def inventory(sessions: sessionmaker[Session]) -> Consumer:
    """Reserves stock, and gives it back."""
    consumer = Consumer("inventory", sessions=sessions)

    @consumer.on(ReserveStock, queue="inventory")
    def reserve(command: ReserveStock, session: Session) -> None:
        taken = session.scalar(select(func.count()).where(Reservation.item == command.item)) or 0
        if session.get(Reservation, command.order_id) is None:
            if taken >= STOCK:
                publish(session, StockRejected(command.order_id), topic="stock", key=str(command.order_id))
                return
            session.add(Reservation(order_id=command.order_id, item=command.item))
        publish(session, StockReserved(command.order_id), topic="stock", key=str(command.order_id))

    @consumer.on(ReleaseStock, queue="inventory")
    def release(command: ReleaseStock, session: Session) -> None:
        session.execute(delete(Reservation).where(Reservation.order_id == command.order_id))

    return consumer


def payments(sessions: sessionmaker[Session]) -> Consumer:
    """Authorizes payments at the bank, and voids them."""
    consumer = Consumer("payments", sessions=sessions, retry=PATIENT)

    @consumer.on(AuthorizePayment, queue="payments")
    def authorize(command: AuthorizePayment, session: Session) -> None:
        answer = PaymentDeclined(command.order_id)
        if hold(f"order/{command.order_id}", command.order_id, command.total):
            answer = PaymentAuthorized(command.order_id)
            session.merge(Payment(order_id=command.order_id, amount=command.total))
        publish(session, answer, topic="payment-events", key=str(command.order_id))

    @consumer.on(VoidPayment, queue="payments")
    def give_back(command: VoidPayment, session: Session) -> None:
        void(f"order/{command.order_id}")
        session.execute(delete(Payment).where(Payment.order_id == command.order_id))

    return consumer


def shipping(sessions: sessionmaker[Session]) -> Consumer:
    """Creates shipments, if the parcel can travel."""
    consumer = Consumer("shipping", sessions=sessions)

    @consumer.on(CreateShipment, queue="shipping")
    def ship(command: CreateShipment, session: Session) -> None:
        answer = ShipmentFailed(command.order_id)
        if command.order_id not in unroadworthy:
            answer = ShipmentCreated(command.order_id)
            session.merge(Shipment(order_id=command.order_id))
        publish(session, answer, topic="shipments", key=str(command.order_id))

    return consumer


def recommendations(sessions: sessionmaker[Session]) -> Consumer:
    """Work that can wait: its topic is paused when the shop is under load."""
    consumer = Consumer("recommendations", sessions=sessions)

    @consumer.on(OrderConfirmed, topic="confirmations")
    def recommend(confirmed: OrderConfirmed, session: Session) -> None:
        session.merge(Recommendation(order_id=confirmed.order_id))

    return consumer


__all__ = ["PATIENT", "Base", "bank", "inventory", "payments", "recommendations", "shipping", "unroadworthy"]
