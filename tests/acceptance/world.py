"""The acceptance tests' world: the real command line in processes of its own, a writer, and independent readers.

The readers are other clients than the library's: aiokafka for Kafka, pika for RabbitMQ (from a queue of its own).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiokafka
import pika
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outboxkit.brokers import open_subscriber
from outboxkit_relay.cli.console import import_string
from tests import canaries, servers
from tests.acceptance.shop import TOPIC, Base, Order, billing
from tests.deadlines import DEADLINE

ROOT = Path(__file__).parents[2]
ENDLESS = 1_000_000  # orders, more than any test lets a writer place
PAUSE = 0.01  # seconds between two orders of a thread: steady, and the machine has time for the others
AUDIT_QUEUE = f"{TOPIC}.audit"
# A killed member of a Kafka group is missed after its session time-out, 45 s by default.
QUICK_GROUP = "?session.timeout.ms=6000&heartbeat.interval.ms=500"


@dataclass(frozen=True)
class Seen:
    """One message, as an independent client read it."""

    id: str
    key: str
    body: bytes


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "backslashreplace")


class Kafka:
    """Reads the topic with aiokafka."""

    def __init__(self, server: servers.Server, topic: str = TOPIC) -> None:
        self._bootstrap, self._topic = server.bootstrap, topic

    def prepare(self) -> None:
        """A log keeps everything: nothing to prepare."""

    def read(self) -> list[Seen]:
        return asyncio.run(self._read())

    def count(self) -> int:
        return len(self.read())

    async def _read(self) -> list[Seen]:
        # Without a group it is given every partition of the topic, and commits nothing.
        consumer = aiokafka.AIOKafkaConsumer(
            self._topic, bootstrap_servers=self._bootstrap, auto_offset_reset="earliest"
        )
        await consumer.start()
        try:
            partitions = list(consumer.assignment())
            ends = await consumer.end_offsets(partitions)
            found: list[Seen] = []
            while any([await consumer.position(place) < ends[place] for place in partitions]):
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    found += [
                        Seen(_text(dict(record.headers).get("ce_id")), _text(record.key), record.value)
                        for record in records
                    ]
        finally:
            await consumer.stop()
        return found


class RabbitMQ:
    """Reads a second queue with pika, in acknowledged portions; what it has read it keeps."""

    def __init__(self, server: servers.Server, topic: str = TOPIC, queue: str = AUDIT_QUEUE) -> None:
        self._url, self._topic, self._queue = server.url, topic, queue
        self._found: list[Seen] = []

    def prepare(self) -> None:
        with self._channel() as channel:
            channel.queue_declare(self._queue, durable=True, arguments={"x-queue-type": "quorum"})
            channel.queue_bind(self._queue, self._topic, "#")

    def read(self) -> list[Seen]:
        with self._channel() as channel:
            while True:
                method, properties, body = channel.basic_get(self._queue)
                if method is None:
                    return list(self._found)
                key = str(properties.headers.get("cloudEvents:partitionkey", ""))
                self._found.append(Seen(str(properties.message_id), key, body))
                channel.basic_ack(method.delivery_tag)

    def count(self) -> int:
        with self._channel() as channel:
            return len(self._found) + int(channel.queue_declare(self._queue, passive=True).method.message_count)

    @contextlib.contextmanager
    def _channel(self) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
        connection = pika.BlockingConnection(pika.URLParameters(self._url))
        try:
            yield connection.channel()
        finally:
            connection.close()


def declare(url: str) -> None:
    """As ``outboxkit init --topology`` does it, without a process."""

    async def work() -> None:
        wanted = import_string.subscription(billing)
        subscriber = open_subscriber(url, wanted, {})
        try:
            await subscriber.declare(wanted)
        finally:
            await subscriber.close()

    asyncio.run(work())


class AcceptanceEnvironment:
    """A database, a broker, and the processes of outboxkit on them."""

    def __init__(self, database_url: str, broker_url: str, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "OUTBOXKIT_DATABASE_URL": database_url,
            "OUTBOXKIT_BROKER_URL": broker_url,
            "OUTBOXKIT_RELAY__LEASE": "2s",
            "OUTBOXKIT_RELAY__BATCH_SIZE": "100",
            "PYTHONPATH": str(ROOT),
        }
        self.engine: Engine = create_engine(database_url)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._writers: list[Writer] = []

    def run(self, *arguments: str, codes: Collection[int] = (0,)) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself; its failure fails the test, other ``codes`` excepted."""
        done = subprocess.run(
            _command(*arguments),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )
        assert not canaries.found_in(done.stdout, done.stderr)
        assert done.returncode in codes, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """A daemon; what it says goes to a file of the test's folder."""
        log = (self.folder / f"{arguments[0]}-{len(self._processes)}.log").open("wb")
        process = subprocess.Popen(
            _command(*arguments),
            env={**self.environment, **variables},
            cwd=self.folder,
            stdout=log,
            stderr=log,
        )
        log.close()
        self._processes.append(process)
        return process

    def writer(self, orders: int, keys: int) -> Writer:
        """Who places so many orders, as quickly as it can; ends with the world at the latest."""
        self._writers.append(Writer(self.engine, orders, keys))
        return self._writers[-1]

    def load(self, keys: int, *, patient: bool = False) -> Writer:
        """Who places orders steadily until it is told to finish, and has begun already."""
        writer = Writer(self.engine, ENDLESS, keys, patient=patient, pause=PAUSE)
        self._writers.append(writer)
        writer.start(ENDLESS)
        return writer

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """SIGTERM, and the clean exit that must follow."""
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0, self.logs()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait(DEADLINE)
        self.engine.dispose()

    def logs(self) -> str:
        """The end of what every daemon said."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def log(self, process: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
        """What one daemon said, line by line."""
        (path,) = self.folder.glob(f"*-{self._processes.index(process)}.log")
        lines = path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def said(self, process: subprocess.Popen[bytes], event: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.log(process) if line["event"] == event]

    def scalar(self, statement: str) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(text(statement)).scalar_one())

    def create_tables(self) -> None:
        Base.metadata.create_all(self.engine)

    def until(self, fact: Callable[[], object], what: str, deadline: float = DEADLINE) -> None:
        """Waits for a fact; a failure shows what the daemons said."""
        assert comes_true(fact, deadline), f"not within {deadline} s: {what}\n{self.logs()}"


class Writer:
    """Places orders in small transactions, each key by one thread, as a row lock of the customer would do.

    It stops at the end of what it is allowed, or when it is told to finish. A database that is away fails it, unless it
    is patient.
    """

    def __init__(
        self, engine: Engine, orders: int, keys: int, *, threads: int = 2, patient: bool = False, pause: float = 0.0
    ) -> None:
        self._engine, self._orders, self._keys = engine, orders, keys
        self._patient, self._pause = patient, pause
        self.failures = 0
        self.errors: list[BaseException] = []
        self.written = 0
        self._allowed = 0
        self._finishing = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._run, args=(index, threads)) for index in range(threads)]

    def start(self, orders: int) -> None:
        """Places the first orders, and stops there."""
        self._allowed = orders
        for thread in self._threads:
            thread.start()

    def go_on(self, orders: int) -> None:
        """Places orders up to so many in all."""
        with self._changed:
            self._allowed = orders
            self._changed.notify_all()

    def _may_go_on(self, number: int) -> bool:
        return number < self._allowed or self._finishing

    def finish(self) -> None:
        """Places no further order; what was placed is in the database."""
        self.close()
        self.join()

    def close(self) -> None:
        """Tells it to place no further order."""
        with self._changed:
            self._finishing = True
            self._changed.notify_all()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(DEADLINE)
        assert not self.errors, self.errors

    def _run(self, index: int, threads: int) -> None:
        try:
            for number in range(self._orders):
                if number % self._keys % threads == index:
                    with self._changed:
                        self._changed.wait(self._pause)
                        self._changed.wait_for(partial(self._may_go_on, number), DEADLINE)
                    if not self._place_at_last(number):
                        return
                    with self._changed:
                        self.written += 1
        except BaseException as error:  # noqa: BLE001  join() shows it
            self.errors.append(error)

    def _place_at_last(self, number: int) -> bool:
        """Places an order, however often that takes; False when there is to be no further one."""
        while not self._finishing:
            if self._place(number):
                return True
            self.failures += 1
        return False

    def _place(self, number: int) -> bool:
        """Places an order; False when the database was away, and perhaps has it."""
        key, ordinal = number % self._keys, number // self._keys
        try:
            with Session(self._engine) as session, session.begin():
                if not self._patient or session.get(Order, number) is None:
                    session.add(Order(number=number, customer=f"c{key}", ordinal=ordinal).place())
        except DBAPIError:
            if not self._patient:
                raise
            return False
        return True


def comes_true(fact: Callable[[], object], deadline: float = DEADLINE) -> bool:
    """Whether a fact comes true in time."""
    end = time.monotonic() + deadline
    pause = threading.Event()
    while not fact():
        if time.monotonic() > end:
            return False
        pause.wait(0.05)
    return True


def forget(broker: servers.Server) -> None:
    """Each test begins with a topic of its own name that is empty, and with a group that has read nothing."""
    if broker.url.startswith("kafka"):
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        if TOPIC in admin.list_topics(timeout=60).topics:
            admin.delete_topics([TOPIC])[TOPIC].result(30)
        assert comes_true(lambda: TOPIC not in admin.list_topics(timeout=60).topics)
        assert comes_true(partial(_forgets_group, admin, billing.name)), "a consumer of an earlier test still runs"
    else:
        connection = pika.BlockingConnection(pika.URLParameters(broker.url))
        channel = connection.channel()
        for queue in (AUDIT_QUEUE, f"{TOPIC}.{billing.name}"):
            channel.queue_delete(queue)
        channel.exchange_delete(TOPIC)
        connection.close()


# Beside a group with members: one whose coordinator has just started.
_NOT_YET = (
    KafkaError.NON_EMPTY_GROUP,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)


def _forgets_group(admin: AdminClient, group: str) -> bool:
    """False while it has a member: one that was killed is missed only after its session time-out."""
    try:
        admin.delete_consumer_groups([group])[group].result(30)
    except KafkaException as error:
        if error.args[0].code() in _NOT_YET:
            return False
        if error.args[0].code() != KafkaError.GROUP_ID_NOT_FOUND:
            raise
    return True


def ordinal(message: Seen) -> int:
    """The place of a message within its key."""
    found: int = json.loads(message.body)["ordinal"]
    return found


def numbers(seen: list[Seen]) -> list[int]:
    """The place of each message in the workload."""
    return [json.loads(message.body)["number"] for message in seen]


def effects_are_in_order(world: AcceptanceEnvironment) -> bool:
    """Whether the invoices of each customer were made in the order of the orders, each once."""
    with world.engine.connect() as connection:
        rows = connection.execute(text("SELECT customer, ordinal FROM invoices ORDER BY id")).all()
    last: dict[str, int] = {}
    for customer, place in rows:
        if last.get(customer, -1) >= place:
            return False
        last[customer] = place
    return True


def first_occurrences(seen: list[Seen]) -> list[Seen]:
    """Each message once, where it stood first."""
    found: dict[str, Seen] = {}
    for message in seen:
        found.setdefault(message.id, message)
    return list(found.values())


def by_key(seen: list[Seen], ordinal: Callable[[Seen], int]) -> Mapping[str, list[int]]:
    """The ordinals of each key, in the order in which they were seen."""
    found: dict[str, list[int]] = {}
    for message in seen:
        found.setdefault(message.key, []).append(ordinal(message))
    return found


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "outboxkit_relay", *arguments]
