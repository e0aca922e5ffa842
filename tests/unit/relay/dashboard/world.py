"""An outbox with everything that the page can show, and a visitor who talks to the page as a browser does."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Connection, Engine, func
from starlette.testclient import TestClient

from outboxkit import dead_letters, tables
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, Stage
from outboxkit.headers import from_wire, pack_headers, wire_headers
from outboxkit.message import Message
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit.policy import Failure
from outboxkit.rows import shard_of
from outboxkit_relay.dashboard import Access, Visitor, dashboard

__all__ = ["HERE", "HOSTILE", "Browser", "bury", "furnish", "plant", "rows", "uuid_of", "waiting"]

HERE = "http://127.0.0.1:8080"
HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[2J\u202e{{ 7*7 }}</textarea>"


class PaymentDeclined(Exception):
    pass


class StockUnknown(Exception):
    pass


def _charge() -> None:
    {"amount": 12}["currency"]


def _pick() -> None:
    raise StockUnknown("warehouse 3")


def _refund() -> None:
    raise PaymentDeclined


def _raised(handler: Callable[[], None]) -> BaseException:
    """The error of a handler, with the places that it came through."""
    try:
        handler()
    except Exception as error:  # noqa: BLE001  it is what a consumer does
        return error
    raise AssertionError("the handler has not failed")


def bury(
    connection: Connection,
    *,
    consumer: str = "billing",
    key: bytes = b"order-7",
    payload: bytes = b'{"order": 7, "currency": "EUR"}',
    error: BaseException | None = None,
    headers: tuple[tuple[str, bytes], ...] = (("x-customer", b"ana@example.org"),),
    offset: int = 1,
    topic: str = "orders",
    type_name: str = "order.placed",
) -> DeadLetter:
    """A letter as a consumer writes it."""
    sent = Message(
        id=str(uuid4()),
        type=type_name,
        topic=topic,
        key=key,
        payload=payload,
        content_type="application/json",
        headers=headers,
    )
    delivery = Delivery(
        topic=topic,
        key=key,
        headers=wire_headers(sent),
        payload=payload,
        origin=f"{topic}[0]@{offset}",
        partition=0,
        offset=offset,
    )
    letter = dead_letters.of_delivery(
        delivery,
        from_wire(topic, key, delivery.headers, payload),
        consumer=consumer,
        kind="event",
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error=error or KeyError("currency"),
        attempts=9,
    )
    stored = dead_letters.bury(connection, letter)
    assert stored is not None
    return stored


def waiting(**values: Any) -> dict[str, Any]:
    """Columns of a message that is not published yet."""
    row: dict[str, Any] = {
        "message_id": uuid4(),
        "topic": "orders",
        "key": b"order-7",
        "type": "order.placed",
        "kind": "event",
        "payload": b"{}",
        "content_type": "application/json",
        "occurred_at": datetime.now(UTC),
        **values,
    }
    names = (("ce_id", str(row["message_id"])), ("ce_type", row["type"]))
    row.setdefault("headers", pack_headers(tuple((name, value.encode()) for name, value in names)))
    return {"shard": shard_of(row["topic"], row["key"], row["message_id"], tables.SHARDS), **row}


def furnish(connection: Connection, *, letters: int = 12) -> None:
    """Fills an outbox: processes, causes of death, a stopped key, a saga, a pause, and what was published."""
    now = datetime.now(UTC)
    _processes(connection, now)
    _ledger(connection, now)
    _deaths(connection, now, letters)
    _keys(connection, now)
    _saga(connection, now)
    bank = Target(Scope.DESTINATION, "invoices")
    pauses.pause(connection, bank, by="ana@ops", reason="the bank is away until 14:00")


def _processes(connection: Connection, now: datetime) -> None:
    alive = {"host": "relay-1", "version": "1.0", "expires_at": now + timedelta(hours=1)}
    relay = uuid4()
    started = now - timedelta(hours=5)
    connection.execute(tables.outbox_relays.insert().values(id=relay, started_at=started, **alive))
    connection.execute(tables.outbox_shards.update().values(owner=relay))
    for name, lag in (("billing", 3), ("shipping", 0)):
        row = {"consumer": name, "host": "app-1", "expires_at": now + timedelta(hours=1), "lag": lag, "in_hand": 2}
        connection.execute(tables.inbox_consumers.insert().values(id=uuid4(), **row))


def _ledger(connection: Connection, now: datetime) -> None:
    for minute in range(30):
        ids = [uuid4() for _ in range(40 + 15 * (minute % 7) + minute)]
        row = {
            "relay": uuid4(),
            "topic": "orders",
            "published_at": now - timedelta(minutes=minute, seconds=5),
            "outcome": "published",
            "min_id": min(ids),
            "max_id": max(ids),
            "ids": [one.bytes for one in ids],
            "partitions": [0] * len(ids),
            "offsets": list(range(len(ids))),
        }
        connection.execute(tables.outbox_ledger.insert().values(**row))


def _deaths(connection: Connection, now: datetime, number: int) -> None:
    letters = [
        bury(connection, offset=at, key=f"order-{at % 5}".encode(), error=_raised(_charge)) for at in range(number)
    ]
    letters += [bury(connection, consumer="shipping", offset=900 + at, error=_raised(_pick)) for at in range(3)]
    letter = bury(connection, consumer="billing", type_name="refund.asked", offset=990, error=_raised(_refund))
    for at, one in enumerate(reversed(letters)):
        died = now - timedelta(minutes=28 * at / len(letters))
        this = tables.dead_letters.c.id == one.id
        connection.execute(tables.dead_letters.update().where(this).values(died_at=died))
    dead_letters.annotate(connection, letter.group, by="ana@ops", note="the bank knows, ticket 4711", owner="payments")


def _keys(connection: Connection, now: datetime) -> None:
    stopped = {"topic": "orders", "key": b"order-9", "shard": 1, "position": 77, "reason": "retry"}
    connection.execute(
        tables.outbox_stopped_keys.insert().values(**stopped, attempts=4, due_at=now + timedelta(seconds=40))
    )
    head = {"position": 77, "reason": "retry", "error": "refusing: queue is full", "attempts": 4}
    connection.execute(
        tables.outbox_waiting.insert().values(**waiting(key=b"order-9"), **head, due_at=now + timedelta(seconds=40))
    )
    follower = {"position": 78, "reason": "follower"}
    connection.execute(tables.outbox_waiting.insert().values(**waiting(key=b"order-9"), **follower))
    later = {"reason": "scheduled", "due_at": now + timedelta(hours=3)}
    connection.execute(tables.outbox_waiting.insert().values(**waiting(type="reminder.due", topic="mails"), **later))
    for _ in range(4):
        connection.execute(tables.outbox_messages.insert().values(**waiting(topic="invoices", type="invoice.sent")))


def _saga(connection: Connection, now: datetime) -> None:
    told = ("order.placed: started", "reserve: sent to stock", "reserve: done", "pay: sent to bank")
    history = [[(now - timedelta(minutes=9 - at)).isoformat(), text] for at, text in enumerate(told)]
    row = {"saga": "checkout", "key": "order-7", "version": 1, "status": "running", "step": "pay", "at": 1, "number": 2}
    connection.execute(
        tables.outbox_sagas.insert().values(
            **row, tries=0, done=[0], undo=[], state=b'{"card": "4711"}', history=history, correlation_id="c-1"
        )
    )


def plant(engine: Engine) -> str:
    """Hostile text in every field that a page shows; returns the letter's number."""
    with engine.begin() as connection:
        letter = bury(
            connection,
            consumer=HOSTILE,
            key=HOSTILE.encode(),
            payload=('{"x": "' + "</textarea><script>alert(1)</script>" + '"}').encode(),
            headers=(("x-" + "y" * 9, HOSTILE.encode()), ("outboxkit-attempt", HOSTILE.encode())),
            topic=HOSTILE.replace("\x1b", ""),
            type_name=HOSTILE,
            error=type(HOSTILE, (Exception,), {})(),
        )
        problems = [{"field": HOSTILE, "message": HOSTILE, "fix": HOSTILE}]
        details = {"chain": [HOSTILE], "places": [HOSTILE], "texts": [HOSTILE], "constraint": HOSTILE, "table": HOSTILE}
        values = {"error": HOSTILE, "path": HOSTILE, "problems": problems, "details": details, "origin": HOSTILE}
        this = tables.dead_letters.c.id == letter.id
        connection.execute(tables.dead_letters.update().where(this).values(**values))
        tables_notes = {"group": letter.group, "note": HOSTILE, "owner": HOSTILE, "set_by": HOSTILE}
        connection.execute(tables.dead_letter_groups.insert().values(**tables_notes))
        for table, more in (
            (tables.outbox_messages, {}),
            (tables.outbox_waiting, {"reason": "scheduled", "error": HOSTILE, "due_at": func.now()}),
        ):
            connection.execute(
                table.insert().values(**waiting(topic=HOSTILE, key=HOSTILE.encode(), type=HOSTILE), **more)
            )
        stop = {"topic": HOSTILE, "key": HOSTILE.encode(), "shard": 1, "position": 1, "reason": "retry"}
        connection.execute(tables.outbox_stopped_keys.insert().values(**stop, requested_by=HOSTILE))
        connection.execute(tables.outbox_sagas.update().values(step=HOSTILE, correlation_id=HOSTILE))
        connection.execute(tables.outbox_sagas.update().values(history=[["2026-01-01T10:00:00", HOSTILE]]))
        connection.execute(
            tables.outbox_audit.insert().values(who=HOSTILE, action=HOSTILE, target=HOSTILE, why=HOSTILE)
        )
        connection.execute(tables.outbox_relays.update().values(host=HOSTILE, ended=HOSTILE))
        connection.execute(tables.inbox_consumers.update().values(consumer=HOSTILE, trouble=HOSTILE))
        pauses.pause(connection, Target(Scope.KEY, "orders", HOSTILE.encode()), by=HOSTILE, reason=HOSTILE)
    return str(letter.id)


@dataclass
class Browser:
    """A visitor: has cookies, fills in forms as they stand on the page."""

    engine: Engine
    access: Access = Access.ALL
    client: TestClient = field(init=False)

    def __post_init__(self) -> None:
        app = dashboard(self.engine, access=lambda _: Visitor(name="ana", access=self.access))
        self.client = TestClient(app, base_url=HERE, follow_redirects=True)

    def get(self, path: str) -> str:
        """The page at a path; it must be there."""
        answer = self.client.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
        return answer.text

    def press(self, path: str, action: str, **typed: str) -> Any:
        """Sends the first form of an action on a page, its hidden fields as they are."""
        return self.send(action, **{**self.fields(path, action), **typed})

    def fields(self, path: str, action: str) -> dict[str, str]:
        """The hidden fields of the first form of an action on a page."""
        (form, *_) = re.findall(rf'<form method="post" action="/do/{action}".*?</form>', self.get(path), re.DOTALL)
        return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', form))

    def send(self, action: str, **fields: str) -> Any:
        """Sends a form as a browser does from the page itself."""
        return self.client.post(f"/do/{action}", data=fields, headers={"origin": HERE, "sec-fetch-site": "same-origin"})


def rows(engine: Engine, table: Any) -> list[dict[str, Any]]:
    """All rows of a table."""
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(table.select()).mappings()]


def uuid_of(url: Any) -> UUID:
    """The number in an address."""
    return UUID(str(url).rpartition("/")[2].partition("?")[0])
