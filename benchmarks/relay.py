"""How fast a relay drains a backlog, beside the ways it is usually done. Real PostgreSQL (fsync on) and a real broker.

    scripts/bench relay [--broker kafka|rabbitmq] [--round-trip MS] [--quick] [--json FILE]

Each contender drains a backlog of its own in a process of its own; they take turns, and the ratios are taken inside a
round, because the machine's speed drifts. Messages have 300 bytes, and every contender sends the same 13 headers.

Kafka:     orm      the tutorial: ORM rows, batch 100, FOR UPDATE SKIP LOCKED, produce, flush, delete
           loop     the usual psycopg loop: batch 100, decoded values, produce, flush, delete
           faststream  faststream-outbox with 64 workers (`benchmarks/peers`, in an environment of its own)
           client   the broker client alone: the same bytes and headers from memory, delivery reports
           outboxkit, two: one relay, and two that share the shards
RabbitMQ:  gather   aio-pika, publishes of 1,000 gathered, confirms (quorum queue)
           pika     pika's select connection, confirms, a window of 2,000, from memory
           outboxkit, keys50, key1: strict order over 10,000 keys, over 50, and all messages of one key; and pipelined
           with one key

With ``--round-trip`` the broker is librdkafka's mock cluster, which answers that much later: it shows what a window is
good for. CPU is the contender's; beside it what PostgreSQL and the broker used meanwhile, where we have started them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
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

import psutil

ROOT = Path(__file__).parents[1]
TOPIC, PARTITIONS, KEYS = "bench", 8, 10_000
PAYLOAD = b'{"filler": "' + b"x" * 286 + b'"}'
COUNTS = {
    "kafka": {
        "orm": 4_000,
        "loop": 20_000,
        "faststream": 5_000,
        "client": 300_000,
        "outboxkit": 300_000,
        "two": 300_000,
    },
    "rabbitmq": {
        "gather": 10_000,
        "pika": 20_000,
        "outboxkit": 30_000,
        "keys50": 30_000,
        "key1": 2_000,
        "key1_pipelined": 30_000,
    },
    "slow": {"loop": 5_000, "outboxkit": 50_000},
}
PROGRAMS = {
    "faststream": (
        str(ROOT / ".venv-peers" / "bin" / "python"),
        str(ROOT / "benchmarks" / "peers" / "faststream_relay.py"),
    )
}
KEYS_OF = {"keys50": 50, "key1": 1, "key1_pipelined": 1}
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


def outboxkit(database: str, broker: str, _count: int, order: str = "") -> None:
    from outboxkit.brokers import open_publisher
    from outboxkit.dialects import open_engine
    from outboxkit.policy import Order
    from outboxkit_relay.core.state import RelayConfig
    from outboxkit_relay.daemon import lifecycle
    from outboxkit_relay.daemon.relay import RelayDaemon

    lifecycle.tune_interpreter()  # as the daemon does
    publisher = open_publisher(broker)
    engine = open_engine(database, patience=timedelta(seconds=10))
    config = RelayConfig(
        once=True, order=Order(order) if order else publisher.features.order, lease=timedelta(seconds=2)
    )
    RelayDaemon(engine, publisher, config).run(threading.Event())
    publisher.close()


def keys50(database: str, broker: str, count: int) -> None:
    outboxkit(database, broker, count)


def key1(database: str, broker: str, count: int) -> None:
    outboxkit(database, broker, count)


def key1_pipelined(database: str, broker: str, count: int) -> None:
    outboxkit(database, broker, count, "pipelined")


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
                headers = [*HEADERS[:1], ("ce_id", str(row.message_id)), ("ce_type", row.type), *HEADERS[3:]]
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
                headers = [*HEADERS[:1], ("ce_id", str(message_id)), ("ce_type", kind), *HEADERS[3:]]
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
    one.__name__: one for one in (outboxkit, keys50, key1, key1_pipelined, orm, loop, client, gather, pika)
}

# --- the course ------------------------------------------------------------------------------------------------------


def run_here(name: str, database: str, broker: str, count: int) -> None:
    """(in the contender's process) Prints seconds of wall clock and of CPU."""
    import confluent_kafka  # noqa: F401  imports are not part of the race
    import sqlalchemy  # noqa: F401

    import outboxkit_relay.daemon.relay  # noqa: F401

    began, cpu = time.perf_counter(), _cpu()
    CONTENDERS[name](database, broker, count)
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": _cpu() - cpu}))


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def race(name: str, database: str, broker: str, count: int) -> dict[str, float]:
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [*PROGRAMS.get(one, (sys.executable, __file__, "--contender", one)), database, broker, str(count)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for one in (["outboxkit"] * 2 if name == "two" else [name])
    ]
    said = [child.communicate(timeout=600)[0] for child in running]
    if any(child.returncode for child in running):
        sys.exit(f"{name} failed")
    measured = [json.loads(text.splitlines()[-1]) for text in said]
    # Of two, everything from the start of the first to the end of the last counts: imports too.
    seconds = measured[0]["seconds"] if len(measured) == 1 else time.perf_counter() - began
    return {"rate": count / seconds, "cpu": sum(one["cpu"] for one in measured) / count * 1e6}


class Servers:
    """What the servers have used of the CPU so far; nothing where they are not ours."""

    def __init__(self, **servers: Any) -> None:
        self.processes = {name: psutil.Process(one.pid) for name, one in servers.items() if hasattr(one, "pid")}

    def cpu(self) -> dict[str, float]:
        return {name: self._of(process) for name, process in self.processes.items()}

    @staticmethod
    def _of(process: psutil.Process) -> float:
        used = 0.0
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                used += times.user + times.system + times.children_user + times.children_system
        return used


def fill(database: str, count: int, keys: int = KEYS) -> None:
    import psycopg

    values = {"topic": TOPIC, "payload": PAYLOAD, "keys": keys, "count": count, **PACKED}
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

    kind = "slow" if arguments.round_trip else arguments.broker
    counts = {name: count // (5 if arguments.quick else 1) for name, count in COUNTS[kind].items()}
    if not Path(PROGRAMS["faststream"][0]).exists():
        counts.pop("faststream", None)
    postgres = servers.find("postgres")
    broker: Any = slow_cluster(arguments.round_trip) if arguments.round_trip else servers.find(arguments.broker)
    try:
        database = create_database(postgres.url)
        with create_engine(database).begin() as connection:
            migrations.upgrade(connection)
            fsync = connection.execute(text("SHOW fsync")).scalar_one()
            folder = connection.execute(text("SHOW data_directory")).scalar_one()
        prepare(arguments.broker, broker)
        print(
            f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()} "
            f"{platform.python_version()}; PostgreSQL {postgres.version} (fsync {fsync}, {file_system(folder)}); "
            f"{broker.name} {broker.version}; outboxkit {version('outboxkit')}",
        )
        rounds, used = [], Servers(postgres=postgres, broker=broker)
        for number in range(3 if arguments.quick else 5):
            measured = {}
            for name, count in counts.items():
                fill(database, count, KEYS_OF.get(name, KEYS))
                before = used.cpu()
                measured[name] = race(name, database, broker.url, count)
                for server, seconds in used.cpu().items():
                    measured[name][server] = (seconds - before[server]) / count * 1e6
                if name not in ("client", "gather", "pika", "faststream"):
                    assert left(database) == 0, f"{name} left messages behind"
            rounds.append(measured)
            print(f"round {number + 1}: " + ", ".join(f"{name} {one['rate']:,.0f}/s" for name, one in measured.items()))
    finally:
        broker.close()
        postgres.close()
    report(counts, rounds, arguments.json)


@dataclasses.dataclass
class SlowCluster:
    """librdkafka's mock cluster, in this process, with an artificial round trip."""

    owner: Any
    url: str
    name: str
    version: str

    def close(self) -> None:
        self.owner.purge()


def slow_cluster(milliseconds: int) -> SlowCluster:
    from confluent_kafka import Producer, libversion

    settings = {"test.mock.num.brokers": 1, "test.mock.broker.rtt": milliseconds}
    owner = Producer({"bootstrap.servers": "127.0.0.1:1", "log_level": 0, **settings})
    brokers = owner.list_topics(TOPIC, timeout=10).brokers.values()
    address = ",".join(f"{one.host}:{one.port}" for one in brokers)
    name = f"mock cluster, {milliseconds} ms away, librdkafka"
    return SlowCluster(owner, f"kafka://{address}", name, libversion()[0])


def file_system(folder: str) -> str:
    """Of the data folder: what fsync means depends on it."""
    mounted = [part for part in psutil.disk_partitions(all=True) if Path(folder).is_relative_to(part.mountpoint)]
    return max(mounted, key=lambda part: len(part.mountpoint)).fstype if mounted else "?"


def report(counts: dict[str, int], rounds: list[dict[str, dict[str, float]]], file: Path | None) -> None:
    servers = [name for name in ("postgres", "broker") if name in rounds[0]["outboxkit"]]
    head = f"{'':16}{'messages':>10}{'per second':>12}{'CPU us each':>13}"
    head += "".join(f"{'+ ' + name:>12}" for name in servers)
    print(f"\n{head}   outboxkit is … times as fast (min to max)")
    result = {}
    for name, count in counts.items():
        ratios = [one["outboxkit"]["rate"] / one[name]["rate"] for one in rounds]
        row = {key: statistics.median(one[name][key] for one in rounds) for key in ("rate", "cpu", *servers)}
        row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        result[name] = row
        ratio = f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
        others = "".join(f"{row[server]:>12.1f}" for server in servers)
        print(f"{name:16}{count:>10,}{row['rate']:>12,.0f}{row['cpu']:>13.1f}{others}   {ratio}")
    if {"client", "loop", "orm"} <= result.keys():
        # Where these are far off, something else than a relay was measured.
        against = {name: result["loop"]["ratio"] / result[name]["ratio"] for name in ("client", "orm")}
        print(f"client / loop {against['client']:.1f} (9 expected), orm / loop {against['orm']:.2f} (0.5 expected)")
    if file is not None:
        file.write_text(json.dumps({"counts": counts, "rounds": rounds, "result": result}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=["kafka", "rabbitmq"], default="kafka")
    parser.add_argument("--round-trip", type=int, default=0, metavar="MS", help="of an artificial Kafka cluster")
    parser.add_argument("--quick", action="store_true", help="a fifth of the messages, three rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--contender", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]
    main()
