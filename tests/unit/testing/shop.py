"""An application as users write it: nothing in it knows of tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, MessageContext, Outbox, OutboxMixin, RetryPolicy, event, full_jitter, publish

__all__ = ["PAID", "Base", "Invoice", "InvoiceCreated", "Order", "OrderPlaced", "Paid", "billing", "books", "nowhere"]


class Base(DeclarativeBase):
    """The application's tables; ours are added by the fixture."""


@event("order.placed", version=1)
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    total: int


@event("invoice.created", version=1)
@dataclass(frozen=True)
class InvoiceCreated:
    order_id: int


PAID: dict[str, Any] = {
    "type": "record",
    "name": "Paid",
    "namespace": "shop",
    "fields": [{"name": "order_id", "type": "long"}, {"name": "how", "type": "string"}],
}


@event("order.paid", version=1, schema=PAID)
@dataclass(frozen=True)
class Paid:
    order_id: int
    how: str


class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic="orders", key="id")
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]

    def place(self) -> Order:
        self.emit(lambda: OrderPlaced(order_id=self.id, total=self.total))
        return self


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    attempt: Mapped[int]


nowhere = sessionmaker(create_engine("sqlite:////no/such/folder/production.db"))  # tests must never come here
billing = Consumer("billing", sessions=async_sessionmaker(expire_on_commit=False))
books = Consumer(
    "books",
    sessions=nowhere,
    retry=RetryPolicy(delayed=full_jitter("1h", cap="5h", attempts=3), poison=(ValueError,)),
)


@billing.on(OrderPlaced, topic="orders")
async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
    session.add(Invoice(order_id=placed.order_id, attempt=ctx.attempt))
    publish(session, InvoiceCreated(order_id=placed.order_id), topic="invoices", key=ctx.key)


@books.on(OrderPlaced, topic="orders")
def book(placed: OrderPlaced, session: Session, ctx: MessageContext) -> None:
    """A total of 13 is poison; a negative one fails that many times."""
    if placed.total == 13:
        raise ValueError("nobody likes 13")
    if ctx.attempt <= -placed.total:
        raise RuntimeError(f"attempt {ctx.attempt}")
    session.add(Invoice(order_id=placed.order_id, attempt=ctx.attempt))


@books.on(Paid, topic="payments")
def receive(paid: Paid, session: Session) -> None:
    session.add(Invoice(order_id=paid.order_id, attempt=len(paid.how)))
