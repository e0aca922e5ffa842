"""Dead letters and stopped keys for commands to find, and what commands leave behind."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import Connection, Engine, select

from outboxkit import dead_letters, tables
from outboxkit._sql import database_now
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, Stage
from outboxkit.headers import from_wire, pack_headers, wire_headers
from outboxkit.message import Message
from outboxkit.policy import Failure

__all__ = ["CANARY", "STOPPED", "audit_of", "bury", "hold_key", "requests_of", "state_of", "stop_key"]

CANARY = "card 4711 \x1b[2J"
STOPPED = tables.outbox_stopped_keys
CONTENT = {"type": "order.placed", "kind": "event", "payload": b"CANARY", "headers": b"\0\0", "content_type": ""}


def bury(engine: Engine, consumer: str = "billing", key: bytes = b"7") -> DeadLetter:
    sent = Message(
        id=str(uuid4()),
        type="order.placed",
        topic="orders",
        key=key,
        payload=f'{{"card": "{CANARY}"}}'.encode(),
        content_type="application/json",
        headers=(("x-customer", b"CANARY-HEADER"),),
    )
    delivery = Delivery(
        topic="orders",
        key=key,
        headers=wire_headers(sent),
        payload=sent.payload,
        origin="orders[0]@1",
        partition=0,
        offset=1,
    )
    letter = dead_letters.of_delivery(
        delivery,
        from_wire("orders", key, delivery.headers, sent.payload),
        consumer=consumer,
        kind="event",
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=KeyError("currency"),
        attempts=9,
    )
    with engine.begin() as connection:
        stored = dead_letters.bury(connection, letter)
    assert stored is not None
    return stored


def state_of(engine: Engine, letter: DeadLetter) -> str:
    with engine.connect() as connection:
        found = dead_letters.get(connection, letter.id)
    assert found is not None
    return found.state.value


def audit_of(engine: Engine) -> list[tuple[str, str]]:
    with engine.connect() as connection:
        return [(row.action, row.why) for row in connection.execute(select(tables.outbox_audit))]


def stop_key(engine: Engine, key: bytes = b"7", *, reason: str = "retry", position: int = 5, request: str = "") -> None:
    """A stopped key with two messages behind its head."""
    due = database_now(timedelta(minutes=2)) if reason == "retry" else None
    values = {"topic": "orders", "key": key, "shard": 0, "position": position, "reason": reason, "due_at": due}
    with engine.begin() as connection:
        connection.execute(STOPPED.insert().values(request=request or None, **values))
        if reason == "retry":
            _wait(connection, key, position, reason="retry", attempts=3, error="rejected: no \x1b[2J")
        for number in (1, 2):
            _wait(connection, key, position + number, reason="follower")


def _wait(connection: Connection, key: bytes, position: int, **values: object) -> None:
    row = {"shard": 0, "message_id": uuid4(), "topic": "orders", "key": key, "position": position}
    times = {"occurred_at": database_now()}
    connection.execute(tables.outbox_waiting.insert().values(**row, **CONTENT, **times, **values))


def requests_of(engine: Engine) -> dict[bytes, str | None]:
    with engine.connect() as connection:
        return {bytes(row.key): row.request for row in connection.execute(select(STOPPED))}


def hold_key(engine: Engine, key: bytes = b"7", *, reason: str = "retry", followers: int = 2) -> None:
    """A key that billing holds, with messages behind its head."""
    place = {"consumer": "billing", "topic": "orders", "key": key, "origin": "orders[0]@1", "partition": 0, "offset": 1}
    headers = pack_headers((("ce_specversion", b"1.0"), ("ce_id", b"m-1"), ("ce_type", b"order.placed")))
    due = database_now(timedelta(minutes=2)) if reason == "retry" else None
    error = "KeyError at bill.py:4 in bill \x1b[2J"
    head: dict[str, Any] = {"reason": reason, "due_at": due, "attempts": 3, "error": error}
    with engine.begin() as connection:
        for values in (head, *[{"reason": "follower"}] * followers):
            connection.execute(
                tables.inbox_waiting.insert().values(**place, headers=headers, payload=b"CANARY", **values)
            )
