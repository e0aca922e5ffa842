"""How long from a commit until the broker has acknowledged the message, and until a consumer has it, at a trickle.

    scripts/bench latency [--broker kafka|rabbitmq] [--wake poll|notify] [--rate 50] [--quick] [--json FILE]

The relay runs in a process of its own with its defaults, first by adaptive polling, then woken by the writer's
notifications. A writer commits one message at a time; an independent look at the ledger tells when the acknowledgement
was settled. The acknowledgement itself is earlier than that: the figures are upper bounds. Both instants are the
database's own clock; a consumer's is this machine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

ROOT = Path(__file__).parents[1]
TOPIC = "latency"
SPAN = """
SELECT id, extract(epoch FROM ledger.published_at - sent.committed_at) * 1000, extract(epoch FROM sent.committed_at)
FROM sent JOIN (SELECT unnest(ids) AS id, published_at FROM outbox_ledger) AS ledger USING (id)
"""


def declare(kind: str, url: str) -> None:
    from outboxkit.brokers import Subscription, open_subscriber

    async def work() -> None:
        wanted = Subscription(consumer="bench", topics=(TOPIC,))
        subscriber = open_subscriber(url, wanted, {"partitions": "8"} if kind == "kafka" else {})
        await subscriber.declare(wanted)
        await subscriber.close()

    asyncio.run(work())


def trickle(engine: Any, rate: int, seconds: float) -> int:
    """Commits messages one by one; right after each commit the database's clock is noted."""
    from sqlalchemy import text

    from outboxkit import outbox
    from outboxkit.message import Message

    note = text("INSERT INTO sent VALUES (:id, clock_timestamp())")
    began, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - began < seconds:
        if now - began < count / rate:
            time.sleep(count / rate - (now - began))
        message = Message(
            id=str(uuid4()),
            type="tick",
            topic=TOPIC,
            payload=b"x" * 300,
            key=b"%d" % (count % 100),
            content_type="text/plain",
            occurred_at=datetime.now(UTC),
        )
        with engine.begin() as connection:
            outbox.write(connection, [message])
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(note, {"id": message.id})
        count += 1
    return count


class Consumer:
    """Notes when each message arrives."""

    def __init__(self, broker: str) -> None:
        self.arrivals: dict[str, float] = {}
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._receive(broker)))
        self._thread.start()

    async def _receive(self, broker: str) -> None:
        from outboxkit.brokers import Subscription, open_subscriber

        subscriber = open_subscriber(broker, Subscription(consumer="bench", topics=(TOPIC,)))
        while not self._ending.is_set():
            deliveries = await subscriber.receive(100, timedelta(milliseconds=100))
            now = time.time()
            self.arrivals |= {str(UUID(dict(one.headers)["ce_id"].decode())): now for one in deliveries}
            await subscriber.acknowledge(deliveries)
        await subscriber.close()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()


def measure(database: str, broker: str, wake: str, load: tuple[int, float]) -> dict[str, list[float]]:
    """Milliseconds from the commit, for each message."""
    from sqlalchemy import create_engine, text

    from outboxkit.capture import commit_hooks

    rate, seconds = load
    engine = create_engine(database)
    end = commit_hooks.notify(engine) if wake == "notify" else lambda: None
    consumer = Consumer(broker)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS sent"))
        connection.execute(text("CREATE TABLE sent (id uuid PRIMARY KEY, committed_at timestamptz)"))
    environment = {**os.environ, "OUTBOXKIT_DATABASE_URL": database, "OUTBOXKIT_BROKER_URL": broker}
    environment["OUTBOXKIT_RELAY__WAKE"] = wake
    relay = subprocess.Popen(
        [sys.executable, "-m", "outboxkit_relay", "relay", "run"], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        trickle(engine, rate, 1)
        while True:  # until the relay is up and warm
            with engine.connect() as connection:
                if not connection.execute(text("SELECT count(*) FROM outbox_messages")).scalar_one():
                    break
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE sent"))
        count = trickle(engine, rate, seconds)
        rows: list[Any] = []
        while len(rows) < count or any(str(row[0]) not in consumer.arrivals for row in rows):
            with engine.connect() as connection:
                rows = list(connection.execute(text(SPAN)))
            time.sleep(0.1)
        consumed = [(consumer.arrivals[str(name)] - float(at)) * 1000 for name, _, at in rows]
        return {"acknowledged": [float(row[1]) for row in rows], "consumed": consumed}
    finally:
        end()
        consumer.end()
        relay.send_signal(signal.SIGTERM)
        relay.wait(30)
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=["kafka", "rabbitmq"], default="kafka")
    parser.add_argument("--wake", choices=["poll", "notify"], help="default: one after the other")
    parser.add_argument("--rate", type=int, default=50, help="messages per second")
    parser.add_argument("--quick", action="store_true", help="10 seconds instead of 60")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    from sqlalchemy import create_engine

    from outboxkit import migrations
    from tests import servers
    from tests.servers.postgres import create_database

    postgres, broker = servers.find("postgres"), servers.find(arguments.broker)
    try:
        database = create_database(postgres.url)
        with create_engine(database).begin() as connection:
            migrations.upgrade(connection)
        declare(arguments.broker, broker.url)
        load = (arguments.rate, 10 if arguments.quick else 60)
        ways = [arguments.wake] if arguments.wake else ["poll", "notify"]
        found = {way: measure(database, broker.url, way, load) for way in ways}
    finally:
        broker.close()
        postgres.close()
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "postgres": postgres.version,
        "broker": f"{broker.name} {broker.version}",
        "rate": arguments.rate,
    }
    print(", ".join(f"{name} {value}" for name, value in result.items()))
    print(f"{'wake':<8}{'from the commit until':<24}{'messages':>10}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    for way, kinds in found.items():
        for until, spans in kinds.items():
            p50, p99, longest = statistics.median(spans), sorted(spans)[int(len(spans) * 0.99)], max(spans)
            result[f"{way}, {until}"] = {"messages": len(spans), "p50_ms": p50, "p99_ms": p99, "max_ms": longest}
            print(f"{way:<8}{until:<24}{len(spans):>10}{p50:>10.1f}{p99:>10.1f}{longest:>10.1f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
