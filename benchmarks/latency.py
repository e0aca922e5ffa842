"""How long from a commit until the broker has acknowledged the message, at a steady trickle.

    scripts/bench latency [--broker kafka|rabbitmq] [--rate 50] [--quick] [--json FILE]

The relay runs in a process of its own with its defaults (adaptive polling). A writer commits one message at a time; an
independent look at the ledger tells when the acknowledgement was settled. The acknowledgement itself is earlier than
that: the figures are upper bounds. Both instants are the database's own clock.
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
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).parents[1]
TOPIC = "latency"
SPAN = """
SELECT extract(epoch FROM ledger.published_at - sent.committed_at) * 1000
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


def measure(database: str, broker: str, rate: int, seconds: float) -> list[float]:
    from sqlalchemy import create_engine, text

    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS sent"))
        connection.execute(text("CREATE TABLE sent (id uuid PRIMARY KEY, committed_at timestamptz)"))
    environment = {**os.environ, "OUTBOXKIT_DATABASE_URL": database, "OUTBOXKIT_BROKER_URL": broker}
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
        spans: list[float] = []
        while len(spans) < count:
            with engine.connect() as connection:
                spans = [float(row[0]) for row in connection.execute(text(SPAN))]
        return spans
    finally:
        relay.send_signal(signal.SIGTERM)
        relay.wait(30)
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=["kafka", "rabbitmq"], default="kafka")
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
        spans = sorted(measure(database, broker.url, arguments.rate, 10 if arguments.quick else 60))
    finally:
        broker.close()
        postgres.close()
    result = {
        "machine": platform.machine(),
        "postgres": postgres.version,
        "broker": f"{broker.name} {broker.version}",
        "messages": len(spans),
        "p50_ms": statistics.median(spans),
        "p99_ms": spans[int(len(spans) * 0.99)],
        "max_ms": spans[-1],
    }
    print("commit to settled acknowledgement, " + ", ".join(f"{name} {value}" for name, value in result.items()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
