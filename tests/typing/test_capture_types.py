"""The public verbs as a type checker sees them: what is right passes, what is wrong is an error."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.sqlalchemy_lines

# The environment of the other SQLAlchemy line has no mypy of its own: the main one's looks into it.
MYPY = sys.executable if find_spec("mypy") else Path(__file__).parents[2] / ".venv" / "bin" / "python"

GOOD = """
from dataclasses import dataclass
from datetime import datetime, timedelta, UTC
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session
from typing_extensions import assert_type
from outboxkit import ChangeCapture, Outbox, OutboxMixin, correlation, event, outbox_tables, publish, send

class Base(DeclarativeBase): ...
outbox_tables(Base.metadata)

@event("order.placed", version=1)
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    total: int

class Order(OutboxMixin, Base):
    __tablename__ = "orders"
    __outbox__ = Outbox(topic="orders", key="id", changes=ChangeCapture(kinds={"created"}, coalesce="flush"))
    id: Mapped[int] = mapped_column(primary_key=True)
    total: Mapped[int]

    def place(self) -> "Order":
        assert_type(self.emit(lambda: OrderPlaced(order_id=self.id, total=self.total)), str)
        return self

assert_type(OrderPlaced(1, 2), OrderPlaced)  # the decorator keeps the class

def use(sync: Session, asynchronous: AsyncSession, scoped: scoped_session[Session],
        both: async_scoped_session[AsyncSession]) -> None:
    with correlation("checkout-42"):
        for session in (sync, asynchronous, scoped, both):
            publish(session, OrderPlaced(1, 2), topic="orders", key="eu", headers={"tenant": "a"})
        send(sync, OrderPlaced(1, 2), to="payments", delay=timedelta(minutes=5), expires=timedelta(hours=1))
        publish(sync, {"a": 1}, type="a.b", topic="t", at=datetime.now(UTC), unique_key="k")
"""

BAD = """
from datetime import timedelta
from sqlalchemy.orm import Session
from outboxkit import ChangeCapture, Outbox, publish, send

def use(session: Session) -> None:
    publish("session", {}, type="a")
    publish(session, {}, type=1)
    publish(session, {}, dealy=timedelta(1))
    send(session, {}, type="a")
    send(session, {}, to="q", delay=5)
    Outbox(topic=1)
    ChangeCapture(kinds={"renamed"})
    publish(session, {}, type="a", kye="1")
    publish(session, {}, type="a", key=1.5)
    Outbox(bulk="maybe")
"""


def check(source: str, folder: Path) -> list[str]:
    file = folder / "user.py"
    file.write_text(source)
    options = ["--strict", "--no-error-summary", "--cache-dir", str(folder), "--python-executable", sys.executable]
    found = subprocess.run([MYPY, "-m", "mypy", *options, file], capture_output=True, text=True, check=False)
    assert not found.stderr
    return [line.split(":")[1] for line in found.stdout.splitlines() if "error:" in line]


def test_a_users_program_is_clean_under_strict(tmp_path: Path) -> None:
    assert check(GOOD, tmp_path) == []


def test_every_mistake_is_an_error_on_its_own_line(tmp_path: Path) -> None:
    wrong = [str(number) for number, line in enumerate(BAD.splitlines(), 1) if line.startswith("    ")]

    assert sorted(set(check(BAD, tmp_path)), key=int) == wrong
