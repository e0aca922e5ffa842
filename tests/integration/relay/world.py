"""What the relay's tests share: a database with messages in it, a publisher that can be told to fail, and a relay."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import Engine, Table, func, select

from outboxkit import migrations, outbox
from outboxkit.brokers import Batch, Features, Receipts, Refusal
from outboxkit.dialects import open_engine
from outboxkit.message import Message
from outboxkit.policy import Failure, Order
from outboxkit.rows import Row
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.relay import RelayDaemon
from tests import canaries
from tests.deadlines import DEADLINE

__all__ = ["ScriptedPublisher", "count", "engine_for", "message", "relaying", "until", "write"]


class ScriptedPublisher:
    """A publisher that records what it gets and answers as a test tells it, row by row."""

    features = Features(name="scripted", order=Order.PIPELINED, evidence=True, max_message_bytes=None)
    has_ended = False

    def __init__(self) -> None:
        self.sent: list[Row] = []
        self.accepted: list[Row] = []
        self.refuse: Callable[[Row], Failure | None] = lambda _row: None
        self.resets = 0
        self.hold = False
        self._held: list[tuple[Batch, Future[Receipts]]] = []
        self._offsets: dict[str, int] = defaultdict(int)

    def publish(self, batch: Batch) -> Future[Receipts]:
        future: Future[Receipts] = Future()
        self.sent += batch.rows
        if self.hold:
            self._held.append((batch, future))
        else:
            future.set_result(self._answer(batch))
        return future

    def _answer(self, batch: Batch) -> Receipts:
        offsets, refusals = [], []
        for index, row in enumerate(batch.rows):
            failure = self.refuse(row)
            if failure is not None:
                refusals.append(Refusal(index, failure, f"refused as {failure}"))
                offsets.append(-1)
            else:
                self.accepted.append(row)
                offsets.append(self._offsets[batch.destination])
                self._offsets[batch.destination] += 1
        return Receipts([0] * len(batch.rows), offsets, tuple(refusals))

    def release(self) -> None:
        self.hold = False
        for batch, future in self._held:
            future.set_result(self._answer(batch))
        self._held.clear()

    def capacity(self, destination: str) -> int:
        del destination
        return 10_000

    def check(self, destinations: Collection[str], timeout: timedelta) -> Mapping[str, Refusal]:
        del destinations, timeout
        return {}

    def reset(self) -> None:
        self.resets += 1
        for batch, future in self._held:
            unknown = tuple(Refusal(index, Failure.INDETERMINATE, "reset") for index in range(len(batch.rows)))
            future.set_result(Receipts([-1] * len(batch.rows), [-1] * len(batch.rows), unknown))
        self._held.clear()

    def close(self) -> None:
        self.reset()


def engine_for(url: str) -> Engine:
    """A daemon's engine on a database with the outbox tables."""
    engine = open_engine(url, patience=timedelta(seconds=3))
    with engine.begin() as connection:
        migrations.upgrade(connection)
    return engine


def message(number: int, key: str | None = "k", topic: str = "orders", **changes: object) -> Message:
    """A message whose payload is its number."""
    values: dict[str, object] = {
        "id": str(uuid4()),
        "type": "order.placed",
        "topic": topic,
        "key": None if key is None else key.encode(),
        "payload": str(number).encode(),
        "content_type": "application/json",
        "occurred_at": datetime.now(UTC),
        "headers": (("x-person", canaries.HEADER.encode()),),
    }
    return Message(**{**values, **changes})  # type: ignore[arg-type]


def write(engine: Engine, *messages: Message) -> None:
    """Commits messages in one transaction."""
    with engine.begin() as connection:
        outbox.write(connection, messages)


def count(engine: Engine, table: Table, *where: object) -> int:
    """How many rows a table has."""
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()  # type: ignore[arg-type]


@contextmanager
def relaying(
    engine: Engine,
    publisher: object,
    config: RelayConfig | None = None,
    lease: timedelta = timedelta(seconds=2),
) -> Iterator[RelayDaemon]:
    """A relay that runs in a thread of its own while the block runs; its failure fails the test."""
    relay = RelayDaemon(engine, publisher, replace(config or RelayConfig(), lease=lease), drain=timedelta(seconds=5))  # type: ignore[arg-type]
    stop, failures = threading.Event(), []

    def run() -> None:
        try:
            relay.run(stop)
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=run, name="relay")
    thread.start()
    try:
        yield relay
    finally:
        stop.set()
        thread.join(DEADLINE)
    assert not thread.is_alive(), "the relay did not stop"
    assert not failures, failures


def until(fact: Callable[[], object], what: str = "", *, within: float = DEADLINE) -> None:
    """Waits for a fact; fails when it does not come true in time."""
    never = threading.Event()
    for _ in range(int(within / 0.01)):
        if fact():
            return
        never.wait(0.01)
    raise AssertionError(f"did not come true within {within} s: {what or fact}")
