"""How fast a consumer handles messages once, beside a hand-written loop: messages per second and processor time.

    scripts/bench consumer [--broker kafka|rabbitmq] [--quick] [--rounds 3] [--json FILE]

All variants read the same messages by the same client. Handlers make one Core insert; only `a` goes without SQLAlchemy:

    a  hand-written loop on psycopg: one transaction a message, inbox row and effect
    a-core  the same loop on SQLAlchemy Core, with the same insert as the handlers of the others
    b  Consumer, single messages, sync and async
    c  Consumer(batch=100), sync and async
    d  Consumer(batch=100) whose handler takes a list
    e  as c by hand without an inbox: the limit

Each variant runs in a process of its own. Time is counted from the first delivery until the last effect is committed;
processor time is that of the process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOPIC = "bench-orders"
KEYS = 100
CLAIM = "INSERT INTO inbox_messages (consumer, source, message_id) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING"
EFFECT = "INSERT INTO effects (variant, number) VALUES (%s, %s)"
VARIANTS = ("a", "a-core", "b-sync", "b-async", "c-sync", "c-async", "d-sync", "d-async", "e")


def subscription(variant: str) -> Any:
    from outboxkit.brokers import Subscription

    return Subscription(consumer=f"bench-{variant}", topics=(TOPIC,))


# --- one variant, in a process of its own ------------------------------------------------------------------------


async def looped(broker: str, variant: str, count: int, write: Callable[[Sequence[Any]], object]) -> float:
    """The loop that people write: what `write` has committed is acknowledged."""
    from outboxkit.brokers import open_subscriber

    subscriber, began, done = open_subscriber(broker, subscription(variant)), 0.0, 0
    while done < count:
        deliveries = await subscriber.receive(500, timedelta(seconds=1))
        began = began or (time.perf_counter() if deliveries else 0.0)
        write(deliveries)
        await subscriber.acknowledge(deliveries)
        done += len(deliveries)
    ended = time.perf_counter()
    await subscriber.close()
    return ended - began


async def by_hand(broker: str, database: str, variant: str, count: int) -> float:
    """On psycopg; `e` writes effects in batches of 100 and has no inbox."""
    import psycopg

    size, has_inbox = (1, True) if variant.startswith("a") else (100, False)
    with psycopg.connect(database.replace("+psycopg", ""), prepare_threshold=1) as connection:

        def write(deliveries: Sequence[Any]) -> None:
            for start in range(0, len(deliveries), size):
                for delivery in deliveries[start : start + size]:
                    if has_inbox:
                        headers = dict(delivery.headers)
                        row = (variant, headers["ce_source"].decode(), headers["ce_id"].decode())
                        connection.execute(CLAIM, row)
                    connection.execute(EFFECT, (variant, json.loads(delivery.payload or b"")["number"]))
                connection.commit()

        return await looped(broker, variant, count, write)


async def by_hand_on_core(broker: str, database: str, variant: str, count: int) -> float:
    """The same, as users of SQLAlchemy write it."""
    from sqlalchemy import create_engine, insert
    from sqlalchemy.dialects.postgresql import insert as insert_ignoring

    from outboxkit import tables

    claim, effect = insert_ignoring(tables.inbox_messages).on_conflict_do_nothing(), insert(effects_table())
    with create_engine(database).connect() as connection:

        def write(deliveries: Sequence[Any]) -> None:
            for delivery in deliveries:
                headers = dict(delivery.headers)
                row = {"source": headers["ce_source"].decode(), "message_id": headers["ce_id"].decode()}
                connection.execute(claim, {"consumer": variant, **row})
                number = json.loads(delivery.payload or b"")["number"]
                connection.execute(effect, {"variant": variant, "number": number})
                connection.commit()

        return await looped(broker, variant, count, write)


async def by_consumer(broker: str, database: str, variant: str, count: int) -> float:
    """Ours: until all effects are committed."""
    from outboxkit.brokers import open_subscriber

    consumer = consumer_of(variant, database)
    stop, began = asyncio.Event(), 0.0
    inner = open_subscriber(broker, consumer.subscription)

    class Counting:
        features, assignment = inner.features, inner.assignment  # as it is before the run
        release, declare, close = inner.release, inner.declare, inner.close
        done = 0

        async def receive(self, limit: int, timeout: timedelta) -> Any:
            nonlocal began
            found = await inner.receive(limit, timeout)
            began = began or (time.perf_counter() if found else 0.0)
            return found

        async def acknowledge(self, deliveries: Any) -> None:
            await inner.acknowledge(deliveries)
            self.done += len(deliveries)
            if self.done >= count:
                stop.set()

    await consumer.run(Counting(), stop)
    return time.perf_counter() - began


def consumer_of(variant: str, database: str) -> Any:
    from sqlalchemy import create_engine, insert
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
    from sqlalchemy.orm import Session, sessionmaker

    from outboxkit import Consumer

    kind, way = variant.split("-")[:2]
    statement = insert(effects_table())
    sessions: Any = (
        async_sessionmaker(create_async_engine(database, pool_size=18))
        if way == "async"
        else sessionmaker(create_engine(database, pool_size=18))
    )
    consumer = Consumer(f"bench-{variant}", sessions=sessions, batch=1 if kind == "b" else 100)
    placed = event_class()

    async def one_async(event: placed, session: AsyncSession) -> None:  # type: ignore[valid-type]
        await session.execute(statement, {"variant": variant, "number": event.number})  # type: ignore[attr-defined]

    def one(event: placed, session: Session) -> None:  # type: ignore[valid-type]
        session.execute(statement, {"variant": variant, "number": event.number})  # type: ignore[attr-defined]

    async def many_async(events: list[placed], session: AsyncSession) -> None:  # type: ignore[valid-type]
        await session.execute(statement, [{"variant": variant, "number": event.number} for event in events])  # type: ignore[attr-defined]

    def many(events: list[placed], session: Session) -> None:  # type: ignore[valid-type]
        session.execute(statement, [{"variant": variant, "number": event.number} for event in events])  # type: ignore[attr-defined]

    chosen: Any = {"b": (one, one_async), "c": (one, one_async), "d": (many, many_async)}[kind][way == "async"]
    chosen.__annotations__ = {
        name: list[placed] if name == "events" else placed if name == "event" else {"session": AsyncSession}.get(name)  # type: ignore[valid-type]
        for name in ("event", "events", "session")
        if name in chosen.__annotations__
    }
    if way == "sync":
        chosen.__annotations__["session"] = Session
    consumer.on(placed, topic=TOPIC)(chosen)
    return consumer


def effects_table() -> Any:
    from sqlalchemy import Column, Integer, MetaData, Table, Text

    return Table("effects", MetaData(), Column("variant", Text), Column("number", Integer))


def event_class() -> Any:
    from dataclasses import make_dataclass

    from outboxkit import event

    return event("order.placed", version=1)(make_dataclass("OrderPlaced", [("number", int)]))


def child(broker: str, database: str, variant: str, count: int) -> None:
    import gc
    import importlib

    for module in (
        "psycopg",
        "sqlalchemy.ext.asyncio",
        "outboxkit.consumer",
        "outboxkit.codecs.json",
        broker_module(broker),
    ):
        importlib.import_module(module)  # the start of a process is not what is measured
    by_loop = by_hand_on_core if variant.startswith("a-core") else by_hand
    run = by_loop if variant[0] in "ae" else by_consumer
    gc.freeze()
    processor = time.process_time()
    seconds = asyncio.run(run(broker, database, variant, count))
    print(json.dumps({"seconds": seconds, "processor": time.process_time() - processor}))


def broker_module(broker: str) -> str:
    return "outboxkit.brokers.kafka" if broker.startswith("kafka") else "outboxkit.brokers.rabbitmq"


# --- all of them -------------------------------------------------------------------------------------------------


def prepare(broker: str, kind: str, rounds: list[str], count: int) -> None:
    """Declares every variant's queue or group, then publishes the messages once."""
    from outboxkit.brokers import Batch, open_publisher, open_subscriber
    from tests.consumer_fixture import order, row_of

    async def declare() -> None:
        options = {"partitions": "8"} if kind == "kafka" else {}
        for variant in rounds:
            subscriber = open_subscriber(broker, subscription(variant), options)
            await subscriber.declare(subscription(variant))
            await subscriber.close()

    asyncio.run(declare())
    publisher = open_publisher(broker)
    for start in range(0, count, 1_000):
        numbers = range(start, min(start + 1_000, count))
        rows = [row_of(order(n, key=f"k{n % KEYS}", topic=TOPIC), n + 1) for n in numbers]
        receipts = publisher.publish(Batch(TOPIC, rows)).result(timeout=60)
        if receipts.refusals:
            sys.exit(f"not published: {receipts.refusals[0]}")
    publisher.close()


def measure(broker: str, database: str, variant: str, count: int) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--child", broker, database, variant, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"per_second": count / found["seconds"], "processor_us": found["processor"] / count * 1e6}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        broker, database, variant, count = sys.argv[2:6]
        child(broker, database, variant, int(count))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=["kafka", "rabbitmq"], default="kafka")
    parser.add_argument("--quick", action="store_true", help="1,000 messages instead of 6,000, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    count, rounds = (1_000, 1) if arguments.quick else (6_000, arguments.rounds)
    from sqlalchemy import create_engine

    from outboxkit import migrations
    from tests import servers
    from tests.servers.postgres import create_database

    postgres, broker = servers.find("postgres"), servers.find(arguments.broker)
    names = [f"{variant}-{n}" for n in range(rounds) for variant in arguments.only]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in arguments.only}
    try:
        database = create_database(postgres.url)
        with create_engine(database).begin() as connection:
            migrations.upgrade(connection)
            connection.exec_driver_sql("CREATE TABLE effects (variant text, number int)")
        prepare(broker.url, arguments.broker, names, count)
        for name in names:
            found[name.rpartition("-")[0]].append(measure(broker.url, database, name, count))
        with create_engine(database).connect() as connection:
            effects = connection.exec_driver_sql(
                "SELECT variant, count(*), count(DISTINCT number) FROM effects GROUP BY 1"
            )
            wrong = [tuple(row) for row in effects if tuple(row[1:]) != (count, count)]
        if wrong:
            sys.exit(f"not once each: {wrong}")
    finally:
        broker.close()
        postgres.close()
    report(arguments, postgres, broker, found)


def report(arguments: Any, postgres: Any, broker: Any, found: dict[str, list[dict[str, float]]]) -> None:
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "postgres": postgres.version,
        "broker": f"{broker.name} {broker.version}",
    }
    print(", ".join(f"{name} {value}" for name, value in result.items()))
    medians = {
        variant: {name: statistics.median(one[name] for one in rounds) for name in ("per_second", "processor_us")}
        for variant, rounds in found.items()
    }
    base = medians.get("a-core") or {"per_second": 1.0, "processor_us": 1.0}
    print(f"{'variant':<10}{'messages/s':>12}{'x a-core':>10}{'processor us':>14}{'x a-core':>10}")
    for variant, one in medians.items():
        speed, cost = one["per_second"] / base["per_second"], one["processor_us"] / base["processor_us"]
        print(f"{variant:<10}{one['per_second']:>12,.0f}{speed:>10.2f}{one['processor_us']:>14,.0f}{cost:>10.2f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result | medians, indent=1))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
