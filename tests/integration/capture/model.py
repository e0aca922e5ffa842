"""A small shop: the models and events that the capture tests speak about."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import ForeignKey, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from outboxkit import Outbox, OutboxMixin, event, outbox_tables


class Base(DeclarativeBase):
    pass


outbox_tables(Base.metadata)


@event("order.placed")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int | None
    total: int = 0


@event("order.noted")
@dataclass(frozen=True)
class Noted:
    text: str


class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic="orders", key="id")

    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int] = mapped_column(default=0)
    status: Mapped[str] = mapped_column(default="new")
    stamp: Mapped[int] = mapped_column(server_default="7", onupdate=func.length("four"))
    lines: Mapped[list[Line]] = relationship(back_populates="order", cascade="all, delete-orphan")

    def place(self) -> Order:
        self.emit(lambda: OrderPlaced(self.id, self.total))
        return self


class Line(OutboxMixin, Base):
    __tablename__ = "lines"
    __outbox__ = Outbox(topic="lines", key=("order_id", "id"))

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id", ondelete="CASCADE"))
    sku: Mapped[str] = mapped_column(default="")
    order: Mapped[Order] = relationship(back_populates="lines")


class Plain(Base):
    """A model that never emits."""

    __tablename__ = "plain"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(default="", unique=True)
