"""Two banks that send each other money: one program twice, each with a database, a relay and a consumer of its own.

A transfer leaves an account in the transaction that writes its event; the other bank books it in the transaction of its
inbox, and sends some of it back from there. Money is created by a second effect and lost with a message.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sqlalchemy import create_engine, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outboxkit import Consumer, event, outbox_tables, publish

__all__ = [
    "ACCOUNTS",
    "BALANCE",
    "Account",
    "Base",
    "Booking",
    "MoneySent",
    "branch",
    "consumer_of",
    "send",
    "topic_of",
]

SIDE = os.environ.get("BANK_SIDE", "north")
RUN = os.environ.get("BANK_RUN", "0")
ACCOUNTS, BALANCE = 20, 1_000
OTHER = {"north": "south", "south": "north"}


class Base(DeclarativeBase):
    pass


outbox_tables(Base.metadata)


@event("money.sent", version=1)
@dataclass(frozen=True)
class MoneySent:
    account: int
    amount: int
    hops: int


class Account(Base):
    __tablename__ = "accounts"
    number: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class Booking(Base):
    """What left (negative) and what came, one row for each message."""

    __tablename__ = "bookings"
    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[int]
    amount: Mapped[int]


def topic_of(side: str, run: str = RUN) -> str:
    return f"bank-{run}-{side}"


def consumer_of(side: str, run: str = RUN) -> str:
    return f"branch-{run}-{side}"


def _book(session: Session, account: int, amount: int) -> None:
    session.execute(update(Account).where(Account.number == account).values(balance=Account.balance + amount))
    session.add(Booking(account=account, amount=amount))


def send(session: Session, side: str, sent: MoneySent, run: str = RUN) -> None:
    """Takes money from an account and sends it to the account of the same number at the other bank."""
    _book(session, sent.account, -sent.amount)
    publish(session, sent, topic=topic_of(side, run), key=str(sent.account), source=side)


_url = os.environ.get("OUTBOXKIT_DATABASE_URL", "sqlite://")
branch = Consumer(consumer_of(SIDE), sessions=sessionmaker(create_engine(_url)))


@branch.on(MoneySent, topic=topic_of(OTHER[SIDE]))
def book(sent: MoneySent, session: Session) -> None:
    _book(session, sent.account, sent.amount)
    if sent.hops and sent.amount > 1:
        send(session, SIDE, MoneySent(sent.account, sent.amount // 2, sent.hops - 1))
