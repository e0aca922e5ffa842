"""How a daemon starts and stops on real servers: what an operator must change ends it at once with one line, what only
needs time is waited for."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

import pytest
from confluent_kafka.admin import AdminClient
from sqlalchemy import create_engine, make_url, text

from outboxkit import migrations
from tests import servers
from tests.acceptance import shop
from tests.acceptance.world import comes_true, declare
from tests.deadlines import DEADLINE

CANARY = "CANARY-pa55"
RELAY, CONSUME = ("relay", "run"), ("consume", "tests.acceptance.shop:billing")


def _environment(**settings: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOXKIT_")}
    return kept | {f"OUTBOXKIT_{name}": value for name, value in settings.items()}


def _run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "outboxkit_relay", *arguments],
        env=_environment(**settings),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )


@dataclass
class Daemon:
    """A running command; its log lines arrive in a queue."""

    process: subprocess.Popen[str]
    lines: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    seen: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.put(line)
        self.lines.put(None)

    def wait_for(self, event: str) -> None:
        """Reads its log until the event."""
        while (line := self.lines.get(timeout=DEADLINE)) is not None:
            name = json.loads(line)["event"] if line.startswith("{") else line
            self.seen.append(name)
            if name == event:
                return
        pytest.fail(f"it ended without {event}: {self.seen}")

    def end(self, *signals: signal.Signals) -> int:
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(DEADLINE)


@contextlib.contextmanager
def _daemon(*arguments: str, **settings: str) -> Iterator[Daemon]:
    command = [sys.executable, "-m", "outboxkit_relay", *arguments]
    process = subprocess.Popen(command, env=_environment(**settings), stderr=subprocess.PIPE, text=True)
    daemon = Daemon(process)
    reader = threading.Thread(target=daemon.read)
    reader.start()
    try:
        yield daemon
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture
def prepared(database_url: str) -> str:
    """A database with our tables."""
    engine = create_engine(database_url)
    with engine.begin() as connection:
        migrations.upgrade(connection)
    engine.dispose()
    return database_url


@pytest.fixture
def guarded(prepared: str) -> Iterator[str]:
    """The same, for a role that must say a password; `CANARY` is the wrong one."""
    name = f"guarded_{make_url(prepared).database}"
    engine = create_engine(prepared, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        file = connection.execute(text("SHOW hba_file")).scalar_one()
        before = connection.execute(text("SELECT pg_read_file(:file)"), {"file": file}).scalar_one().replace("\t", " ")
        connection.exec_driver_sql(f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
        _write_hba(connection, file, f"host all {name} all scram-sha-256\nlocal all {name} scram-sha-256\n{before}")
        yield make_url(prepared).set(username=name, password=CANARY).render_as_string(hide_password=False)
        _write_hba(connection, file, before)
        connection.exec_driver_sql(f"DROP ROLE {name}")
    engine.dispose()


def _write_hba(connection: object, file: str, body: str) -> None:
    lines = " UNION ALL ".join(f"SELECT '{line}'" for line in body.replace("'", "''").splitlines() if line)
    connection.exec_driver_sql(f"COPY ({lines}) TO '{file}'")  # type: ignore[attr-defined]
    connection.exec_driver_sql("SELECT pg_reload_conf()")  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [RELAY, CONSUME, ("status",), ("init",)])
def test_a_refused_database_login_is_one_line_and_no_secret(guarded: str, command: tuple[str, ...]) -> None:
    done = _run(*command, DATABASE_URL=guarded, BROKER_URL="memory://x")

    assert done.returncode == 2, done.stderr
    assert "refused the login" in done.stderr
    assert done.stderr.count("\n") == 1
    assert CANARY not in done.stderr + done.stdout


@pytest.mark.parametrize("part", ["username", "database"])
def test_an_unknown_role_or_database_is_a_refusal_too(prepared: str, part: str) -> None:
    there = make_url(prepared)
    wrong = there.set(username="nobody_here") if part == "username" else there.set(database="nobody_here")
    url = wrong.render_as_string(hide_password=False)

    done = _run(*RELAY, DATABASE_URL=url, BROKER_URL="memory://x")

    assert done.returncode == 2
    assert "nobody_here" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_refused_rabbitmq_login_is_one_line_and_no_secret(prepared: str, rabbitmq: servers.Server) -> None:
    address = rabbitmq.url.partition("@")[2]

    for command in (RELAY, CONSUME):
        done = _run(*command, DATABASE_URL=prepared, BROKER_URL=f"amqp://guest:{CANARY}@{address}")

        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("outboxkit: ")
        assert CANARY not in done.stderr


@pytest.mark.parametrize("command", [RELAY, CONSUME])
def test_a_database_that_is_away_is_waited_for_with_one_line_a_change(
    prepared: str, kafka: servers.Server, command: tuple[str, ...]
) -> None:
    url = make_url(prepared)
    if command == CONSUME:
        assert _run("init", "--topic", shop.TOPIC, DATABASE_URL=prepared, BROKER_URL=kafka.url).returncode == 0
    with _Door(url.host or "", url.port or 0) as door:
        there = url.set(host="127.0.0.1", port=door.port).render_as_string(hide_password=False)
        with _daemon(*command, DATABASE_URL=there, BROKER_URL=kafka.url) as daemon:
            daemon.wait_for("database.away")
            door.open()
            daemon.wait_for("database.back")
            daemon.wait_for("relay.joined" if command == RELAY else "consumer.started")
            code = daemon.end(signal.SIGTERM)

    assert code == 0
    assert daemon.seen.count("database.away") == daemon.seen.count("database.back") == 1


@pytest.mark.parametrize("broker", ["kafka", "rabbitmq"])
def test_a_broker_that_is_away_is_waited_for_with_one_line_a_change(
    prepared: str, request: pytest.FixtureRequest, broker: str
) -> None:
    server: servers.Server = request.getfixturevalue(broker)
    with (
        _Door(*_place(server)) as door,
        _daemon(*RELAY, DATABASE_URL=prepared, BROKER_URL=_through(door, server)) as daemon,
    ):
        daemon.wait_for("broker.away")
        door.open()
        daemon.wait_for("broker.back")
        daemon.wait_for("relay.joined")
        code = daemon.end(signal.SIGINT)

    assert code == 0
    assert daemon.seen.count("broker.away") == daemon.seen.count("broker.back") == 1


@pytest.mark.parametrize(("broker", "knocks"), [("kafka", 6), ("rabbitmq", 3)])
def test_a_consumer_whose_broker_is_away_tells_each_change_once(
    prepared: str, request: pytest.FixtureRequest, broker: str, knocks: int
) -> None:
    server: servers.Server = request.getfixturevalue(broker)
    assert _run("init", "--topology", CONSUME[1], DATABASE_URL=prepared, BROKER_URL=server.url).returncode == 0
    with (
        _Door(*_place(server), turns_away=True) as door,
        _daemon(*CONSUME, DATABASE_URL=prepared, BROKER_URL=_through(door, server)) as daemon,
    ):
        daemon.wait_for("consumer.broker_away")
        for _ in range(knocks):  # it looks again and again, longer than a receive takes
            assert door.knocks.acquire(timeout=DEADLINE)
        assert daemon.lines.empty()  # and says no more
        door.open()
        daemon.wait_for("consumer.broker_back")
        code = daemon.end(signal.SIGTERM)

    assert code == 0
    assert daemon.seen.count("consumer.broker_away") == daemon.seen.count("consumer.broker_back") == 1


def test_a_consumer_that_has_lost_kafka_is_back_when_kafka_answers(prepared: str, kafka: servers.Server) -> None:
    declare(kafka.url)
    admin, group = AdminClient({"bootstrap.servers": kafka.bootstrap}), shop.billing.name
    with _daemon(*CONSUME, DATABASE_URL=prepared, BROKER_URL=kafka.url) as daemon:
        daemon.wait_for("consumer.started")
        assert comes_true(lambda: admin.describe_consumer_groups([group])[group].result(30).members)
        kafka.kill()
        with _Door(*_place(kafka), at=_place(kafka)[1], turns_away=True) as door:
            daemon.wait_for("consumer.broker_away")
            for _ in range(6):  # it looks again and again, longer than a receive takes
                assert door.knocks.acquire(timeout=DEADLINE)
            assert daemon.lines.empty()  # silence is no answer
        kafka.start()
        daemon.wait_for("consumer.broker_back")
        code = daemon.end(signal.SIGTERM)

    assert code == 0


def test_a_stop_while_waiting_is_a_clean_exit(prepared: str) -> None:
    with _Door("127.0.0.1", 1) as door:
        url = make_url(prepared).set(host="127.0.0.1", port=door.port).render_as_string(hide_password=False)
        with _daemon(*RELAY, DATABASE_URL=url, BROKER_URL="memory://x") as daemon:
            daemon.wait_for("database.away")

            assert daemon.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_process_at_once(number: signal.Signals, code: int) -> None:
    program = (
        "import signal\n"
        "from outboxkit_relay.daemon.lifecycle import stop_on_signals\n"
        "with stop_on_signals(lambda: print('asked', flush=True)):\n"
        "    print('ready', flush=True)\n"
        "    while True: signal.pause()\n"
    )
    with (
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)  # else a process that ignores the second signal would be waited for
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
        process.send_signal(number)

        assert process.wait(DEADLINE) == code


def test_once_publishes_what_is_there_and_leaves(prepared: str, kafka: servers.Server) -> None:
    settings = {"DATABASE_URL": prepared, "BROKER_URL": kafka.url}
    topic = f"once-{make_url(prepared).database}"
    program = (
        "import os\n"
        "from outboxkit import publish\n"
        "from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import Session\n"
        "engine = create_engine(os.environ['OUTBOXKIT_DATABASE_URL'])\n"
        "with Session(engine) as session, session.begin():\n"
        f"    publish(session, {{'n': 1}}, type='thing.happened', topic={topic!r})\n"
    )
    assert _run("init", "--topic", topic, **settings).returncode == 0
    subprocess.run([sys.executable, "-c", program], env=_environment(**settings), check=True)
    assert _run("status", **settings).returncode == 3

    done = _run("relay", "run", "--once", **settings)

    assert done.returncode == 0, done.stderr
    assert _run("status", **settings).returncode == 0


def _place(server: servers.Server) -> tuple[str, int]:
    host, _, port = server.bootstrap.partition(":")
    return host, int(port)


def _through(door: _Door, server: servers.Server) -> str:
    """The server's URL with the address of the door."""
    return server.url.replace(server.bootstrap, f"127.0.0.1:{door.port}")


class _Door:
    """A port that refuses connections until it is opened; then it forwards them to a server.

    It is any port, or the one that ``at`` names. With ``turns_away`` it accepts connections meanwhile, ends each at
    once, and counts them in ``knocks``.
    """

    def __init__(self, host: str, port: int, *, at: int = 0, turns_away: bool = False) -> None:
        self._goal = (host, port)
        self._is_open = False
        self.knocks = threading.Semaphore(0)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", at))  # taken, but nobody listens: connections are refused
        self.port: int = self._socket.getsockname()[1]
        self._ends: list[socket.socket] = [self._socket]
        self._threads: list[threading.Thread] = []
        if turns_away:
            self._serve()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join()

    def open(self) -> None:
        self._is_open = True
        if not self._threads:
            self._serve()

    def _serve(self) -> None:
        self._socket.listen()
        self._start(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                if not self._is_open:
                    client.close()
                    self.knocks.release()
                    continue
                server = socket.create_connection(self._goal)
                self._ends += [client, server]
                self._start(self._pump, client, server)
                self._start(self._pump, server, client)

    def _start(self, target: object, *arguments: socket.socket) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def test_a_consumer_answers_probes_and_ends_well(prepared: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"DATABASE_URL": prepared, "PROBES__PORT": port}
    with _daemon(*CONSUME, BROKER_URL="memory://x", LOG__FORMAT="json", **place) as consumer:
        consumer.wait_for("consumer.started")

        assert comes_true(lambda: _run("healthcheck", **place).returncode == 0)
        assert consumer.end(signal.SIGTERM) == 0
        done = _run("healthcheck", **place)

    assert "probes.listening" in consumer.seen
    assert (done.returncode, "nothing answers on 127.0.0.1" in done.stderr) == (1, True)
