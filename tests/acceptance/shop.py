"""The user's application of the acceptance tests: orders are placed, billing makes one invoice for each.

It is an ordinary module: the tests import it to place orders, and ``outboxkit consume tests.acceptance.shop:billing``
runs its handler in a process of its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, Outbox, OutboxMixin, event, outbox_tables

DATABASE_URL = os.environ.get("OUTBOXKIT_DATABASE_URL", "sqlite://")
TOPIC = "shop-orders"  # no other test uses this topic or this consumer


class Base(DeclarativeBase):
    pass


outbox_tables(Base.metadata)


@event("order.placed", version=1)
@dataclass(frozen=True)
class OrderPlaced:
    number: int
    customer: str
    ordinal: int


class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic=TOPIC, key="customer", source="shop")
    number: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]
    ordinal: Mapped[int]

    def place(self) -> Order:
        self.emit(OrderPlaced(self.number, self.customer, self.ordinal))
        return self


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]
    customer: Mapped[str]
    ordinal: Mapped[int]


# Nothing prepared, so that it also works through PgBouncer in transaction mode.
engine = create_engine(
    DATABASE_URL, connect_args={} if DATABASE_URL.startswith("sqlite") else {"prepare_threshold": None}
)
billing = Consumer("shop-billing", sessions=sessionmaker(engine))


@billing.on(OrderPlaced, topic=TOPIC)
def bill(placed: OrderPlaced, session: Session) -> None:
    """One invoice for each order: a second handling would be a second row."""
    session.add(Invoice(number=placed.number, customer=placed.customer, ordinal=placed.ordinal))
