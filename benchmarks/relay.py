"""How fast a relay drains a backlog, beside the ways it is usually done. Real PostgreSQL (fsync on) and a real broker.

    scripts/bench relay [--broker kafka|rabbitmq] [--quick] [--json FILE]

Each contender drains a backlog of its own in a process of its own; they take turns, and the ratios are taken inside a
round, because the machine's speed drifts. Messages have 300 bytes and four headers beside the CloudEvents ones.

Kafka:     orm      the tutorial: ORM rows, batch 100, FOR UPDATE SKIP LOCKED, produce, flush, delete
           loop     the usual psycopg loop: batch 100, decoded values, produce, flush, delete
           client   the broker client alone: the same bytes and headers from memory, delivery reports
           outboxkit
RabbitMQ:  gather   aio-pika, publishes of 1,000 gathered, confirms (quorum queue)
           pika     pika's select connection, confirms, a window of 2,000, from memory
           outboxkit
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TOPIC, PARTITIONS, KEYS = "bench", 8, 10_000
PAYLOAD = b'{"filler": "' + b"x" * 286 + b'"}'
COUNTS = {
    "kafka": {"orm": 4_000, "loop": 20_000, "client": 100_000, "outboxkit": 100_000},
    "rabbitmq": {"gather": 10_000, "pika": 20_000, "outboxkit": 30_000},
}
# One row as capture writes it: the packed headers are frozen bytes, only id and key differ.
FILL = """
INSERT INTO outbox_messages (shard, message_id, topic, key, type, kind, payload, headers, content_type, occurred_at)
SELECT n %% 64, id, %(topic)s, key, 'order.placed', 'event', %(payload)s,
       %(before)s::bytea || convert_to(id::text, 'UTF8') || %(between)s::bytea || key || %(after)s::bytea,
       'application/json', now()
FROM (
    SELECT n, gen_random_uuid() AS id, convert_to('key-' || n %% %(keys)s, 'UTF8') AS key
    FROM generate_series(1, %(count)s) AS n
) AS made
"""
HEADERS = [
    ("ce_specversion", b"1.0"),
    ("ce_id", b"0198c5d2-7f00-7000-8000-000000000001"),
    ("ce_type", b"order.placed"),
    ("ce_source", b"bench"),
    ("content-type", b"application/json"),
    ("ce_time", b"2026-11-24T08:30:00.000000Z"),
    ("ce_partitionkey", b"key-1"),
    ("tenant", b"a"),
    ("region", b"eu"),
    ("trace", b"0af7651916cd43dd"),
    ("user", b"42"),
    ("ce_sequence", b"00000000000000000001"),
    ("ce_recordedtime", b"2026-11-24T08:30:00.000000Z"),
]
PACKED = {
    "before": b"\3" + b"\0".join(name.encode() for name, _ in HEADERS[:11]) + b"\x00\x001.0\0",
    "between": b"\0order.placed\0bench\0application/json\x002026-11-24T08:30:00.000000Z\0",
    "after": b"\0a\0eu\x000af7651916cd43dd\x0042",
}

# --- contenders: each publishes everything that is there, and returns when it is acknowledged ------------------------


def outboxkit(database: str, broker: str, _count: int) -> None:
    from outboxkit.brokers import open_publisher
    from outboxkit.dialects import open_engine
    from outboxkit_relay import lifecycle
    from outboxkit_relay.relay import Relay
    from outboxkit_relay.state import Rules

    lifecycle.collect_rarely()  # as the daemon does
    publisher = open_publisher(broker)
    engine = open_engine(database, patience=timedelta(seconds=10))
    Relay(engine, publisher, Rules(once=True, order=publisher.features.order)).run(threading.Event())
    publisher.close()


def producer(broker: str) -> Any:
    from confluent_kafka import Producer

    made = Producer({"bootstrap.servers": broker.removeprefix("kafka://"), "enable.idempotence": True, "linger.ms": 2})
    made.list_topics(timeout=10)
    return made


def orm(database: str, broker: str, _count: int) -> None:
    from sqlalchemy import create_engine, select
    from sqlalchemy.orm import DeclarativeBase, Session

    from outboxkit import tables

    class Base(DeclarativeBase):
        pass

    class Stored(Base):
        __table__ = tables.outbox_messages.to_metadata(Base.metadata)

    kafka, engine = producer(broker), create_engine(database)
    batch = select(Stored).order_by(Stored.position).limit(100).with_for_update(skip_locked=True)
    while True:
        with Session(engine) as session, session.begin():
            rows = session.scalars(batch).all()
            if not rows:
                return
            for row in rows:
                headers = {"ce_id": str(row.message_id), "ce_type": row.type, **dict(HEADERS[7:11])}
                kafka.produce(row.topic, row.payload, row.key, headers=headers)
            kafka.flush()
            for row in rows:
                session.delete(row)


def loop(database: str, broker: str, _count: int) -> None:
    import psycopg

    kafka = producer(broker)
    select = """
        SELECT position, message_id, topic, key, type, payload FROM outbox_messages ORDER BY position LIMIT 100
        FOR UPDATE SKIP LOCKED
    """
    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        while rows := connection.execute(select).fetchall():
            for _, message_id, topic, key, kind, payload in rows:
                headers = {"ce_id": str(message_id), "ce_type": kind, **dict(HEADERS[7:11])}
                kafka.produce(topic, payload, key, headers=headers)
            kafka.flush()
            connection.execute("DELETE FROM outbox_messages WHERE position = ANY(%s)", [[row[0] for row in rows]])
            connection.commit()


def client(_database: str, broker: str, count: int) -> None:
    kafka, acknowledged = producer(broker), 0

    def report(error: object, message: Any) -> None:
        nonlocal acknowledged
        if error is None:
            message.partition(), message.offset()
            acknowledged += 1

    for number in range(count):
        while True:
            try:
                kafka.produce(TOPIC, PAYLOAD, b"key-%d" % (number % KEYS), headers=HEADERS, on_delivery=report)
                break
            except BufferError:
                kafka.poll(0.01)
        if number % 1000 == 0:
            kafka.poll(0)
    kafka.flush()
    assert acknowledged == count


def gather(_database: str, broker: str, count: int) -> None:
    import aio_pika

    async def publish() -> None:
        connection = await aio_pika.connect(broker)
        exchange = await (await connection.channel()).get_exchange(TOPIC)
        headers = {name: value.decode() for name, value in HEADERS}
        for start in range(0, count, 1000):
            messages = (
                aio_pika.Message(PAYLOAD, headers=headers, delivery_mode=2, message_id=f"{start + offset}")
                for offset in range(min(1000, count - start))
            )
            await asyncio.gather(*(exchange.publish(message, "order.placed") for message in messages))
        await connection.close()

    asyncio.run(publish())


def pika(_database: str, broker: str, count: int) -> None:
    import pika as client_library

    properties = client_library.BasicProperties(
        delivery_mode=2, headers={name: value.decode() for name, value in HEADERS}, message_id="0"
    )
    sent = confirmed = 0

    def fill(channel: Any) -> None:
        nonlocal sent
        while sent < count and sent - confirmed < 2000:
            channel.basic_publish(TOPIC, "order.placed", PAYLOAD, properties)
            sent += 1

    def on_confirm(channel: Any, frame: Any) -> None:
        nonlocal confirmed
        tag = frame.method.delivery_tag
        confirmed = max(confirmed, tag) if frame.method.multiple else confirmed + 1
        confirmed = tag if frame.method.multiple else confirmed
        if confirmed >= count:
            channel.connection.close()
        elif sent - confirmed < 1000:
            fill(channel)

    def on_channel(channel: Any) -> None:
        channel.confirm_delivery(lambda frame: on_confirm(channel, frame))
        fill(channel)

    connection = client_library.SelectConnection(
        client_library.URLParameters(broker),
        on_open_callback=lambda opened: opened.channel(on_open_callback=on_channel),
        on_close_callback=lambda opened, _error: opened.ioloop.stop(),
    )
    connection.ioloop.start()


CONTENDERS: dict[str, Callable[[str, str, int], None]] = {
    one.__name__: one for one in (outboxkit, orm, loop, client, gather, pika)
}

# --- the course ------------------------------------------------------------------------------------------------------


def run_here(name: str, database: str, broker: str, count: int) -> None:
    """(in the contender's process) Prints seconds of wall clock and of CPU."""
    import confluent_kafka  # noqa: F401  imports are not part of the race
    import sqlalchemy  # noqa: F401

    import outboxkit_relay.relay  # noqa: F401

    began, cpu = time.perf_counter(), _cpu()
    CONTENDERS[name](database, broker, count)
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": _cpu() - cpu}))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def race(name: str, database: str, broker: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--contender", name, database, broker, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=600)
    measured = json.loads(done.stdout.splitlines()[-1])
    return {"rate": count / measured["seconds"], "cpu": measured["cpu"] / count * 1e6}


def fill(database: str, count: int) -> None:
    import psycopg

    values = {"topic": TOPIC, "payload": PAYLOAD, "keys": KEYS, "count": count, **PACKED}
    with psycopg.connect(database.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("TRUNCATE outbox_messages, outbox_ledger, outbox_waiting")
        connection.execute(FILL, values)
        connection.execute("CHECKPOINT")


def left(database: str) -> int:
    import psycopg

    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        return connection.execute("SELECT count(*) FROM outbox_messages").fetchone()[0]  # type: ignore[index]


def prepare(kind: str, broker: Any) -> None:
    from outboxkit.brokers import Subscription, open_subscriber

    async def declare() -> None:
        wanted = Subscription(consumer="bench", topics=(TOPIC,))
        options = {"partitions": str(PARTITIONS)} if kind == "kafka" else {}
        subscriber = open_subscriber(broker.url, wanted, options)
        await subscriber.declare(wanted)
        await subscriber.close()

    asyncio.run(declare())


def main() -> None:
    arguments = _arguments()
    if arguments.contender:
        name, database, broker, count = arguments.contender
        run_here(name, database, broker, int(count))
        return
    from sqlalchemy import create_engine, text

    from outboxkit import migrations
    from tests import servers
    from tests.servers.postgres import create_database

    counts = {name: count // (5 if arguments.quick else 1) for name, count in COUNTS[arguments.broker].items()}
    postgres, broker = servers.find("postgres"), servers.find(arguments.broker)
    try:
        database = create_database(postgres.url)
        with create_engine(database).begin() as connection:
            migrations.upgrade(connection)
            fsync = connection.execute(text("SHOW fsync")).scalar_one()
        prepare(arguments.broker, broker)
        print(
            f"{platform.machine()}, {platform.python_implementation()} {platform.python_version()}; PostgreSQL "
            f"{postgres.version} (fsync {fsync}); {broker.name} {broker.version}; outboxkit {version('outboxkit')}",
        )
        rounds = []
        for number in range(3 if arguments.quick else 5):
            measured = {}
            for name, count in counts.items():
                fill(database, count)
                measured[name] = race(name, database, broker.url, count)
                if name in ("outboxkit", "orm", "loop"):
                    assert left(database) == 0, f"{name} left messages behind"
            rounds.append(measured)
            print(f"round {number + 1}: " + ", ".join(f"{name} {one['rate']:,.0f}/s" for name, one in measured.items()))
    finally:
        broker.close()
        postgres.close()
    report(counts, rounds, arguments.json)


def report(counts: dict[str, int], rounds: list[dict[str, dict[str, float]]], file: Path | None) -> None:
    print(f"\n{'':12}{'messages':>10}{'per second':>12}{'CPU us each':>13}   outboxkit is … times as fast (min to max)")
    result = {}
    for name, count in counts.items():
        ratios = [one["outboxkit"]["rate"] / one[name]["rate"] for one in rounds]
        row = {
            "rate": statistics.median(one[name]["rate"] for one in rounds),
            "cpu_us": statistics.median(one[name]["cpu"] for one in rounds),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        result[name] = row
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        print(f"{name:12}{count:>10,}{row['rate']:>12,.0f}{row['cpu_us']:>13.1f}   {ratio}")
    if file is not None:
        file.write_text(json.dumps({"counts": counts, "rounds": rounds, "result": result}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=sorted(COUNTS), default="kafka")
    parser.add_argument("--quick", action="store_true", help="a fifth of the messages, three rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
