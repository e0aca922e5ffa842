"""The shop: an order, and the saga that carries it through the other services or undoes what they did."""

from __future__ import annotations

from dataclasses import dataclass

from contracts import (
    AuthorizePayment,
    CreateShipment,
    OrderCancelled,
    OrderConfirmed,
    OrderPlaced,
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
from services import Base
from sqlalchemy.orm import Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, Outbox, OutboxMixin, publish
from outboxkit.saga import Saga, register, started_by, step


class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic="orders", key="id")
    id: Mapped[int] = mapped_column(primary_key=True)
    item: Mapped[str]
    total: Mapped[int]
    status: Mapped[str] = mapped_column(default="placed")

    def place(self) -> Order:
        self.emit(lambda: OrderPlaced(order_id=self.id, item=self.item, total=self.total))
        return self


@dataclass
class CheckoutState:
    order_id: int
    item: str
    total: int


class Checkout(Saga[CheckoutState], name="checkout", key="order_id"):
    start = started_by(OrderPlaced, topic="orders")
    reserve = step(
        ReserveStock,
        to="inventory",
        done=StockReserved,
        failed=StockRejected,
        replies="stock",
        compensate=ReleaseStock,
        timeout="30s",
        tries=3,
    )
    pay = step(
        AuthorizePayment,
        to="payments",
        done=PaymentAuthorized,
        failed=PaymentDeclined,
        replies="payment-events",
        compensate=VoidPayment,
        timeout="30s",
        tries=3,
    )
    ship = step(
        CreateShipment,
        to="shipping",
        done=ShipmentCreated,
        failed=ShipmentFailed,
        replies="shipments",
        timeout="30s",
        tries=3,
    )

    def on_completed(self, state: CheckoutState, session: Session) -> None:
        order = session.get_one(Order, state.order_id)
        order.status = "confirmed"
        publish(session, OrderConfirmed(order.id, order.item), topic="confirmations", key=str(order.id))

    def on_compensated(self, state: CheckoutState, session: Session) -> None:
        session.get_one(Order, state.order_id).status = "cancelled"
        publish(session, OrderCancelled(state.order_id), topic="cancellations", key=str(state.order_id))


def checkout(sessions: sessionmaker[Session]) -> Consumer:
    """The consumer that runs the saga."""
    consumer = Consumer("checkout", sessions=sessions)
    register(consumer, Checkout)
    return consumer
