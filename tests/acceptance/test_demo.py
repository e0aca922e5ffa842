"""The demo as people run it: it succeeds, it judges honestly, and it leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import Engine, text

from outboxkit import migrations
from outboxkit.dialects import open_engine
from outboxkit_relay.demo import judge
from outboxkit_relay.demo.judge import Record

SECONDS = 170.0  # on a busy machine; alone it takes a fifth of that


@contextlib.contextmanager
def _demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A demo whose temporary files are in a folder of the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOXKIT_")}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "outboxkit_relay", "demo", *options],
        env=environment | {"TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _left(folder: Path) -> list[str]:
    """Processes that work in the folder of the demo."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd().startswith(str(folder)):
                found.append(" ".join(process.cmdline()))
    return found


@pytest.mark.timeout(SECONDS + 10)
def test_the_demo_succeeds_and_says_what_it_counted(tmp_path: Path) -> None:
    with _demo(tmp_path, "--orders", "60", "--seed", "7", "--json") as process:
        out, err = process.communicate(timeout=SECONDS)

    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    assert found["ok"]
    assert (found["placed"], found["published"], found["handled"], found["replayed"]) == (60, 240, 240, 1)
    assert found["redelivered"] >= 1
    assert found["duplicates_caught"] >= found["redelivered"]
    assert list(tmp_path.iterdir()) == []
    assert _left(tmp_path) == []


@pytest.mark.timeout(SECONDS + 10)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_ended_demo_leaves_no_process_behind(tmp_path: Path, number: signal.Signals) -> None:
    with _demo(tmp_path, "--orders", "1000") as process:
        assert process.stdout is not None
        assert "are up" in process.stdout.readline()
        assert len(_left(tmp_path)) >= 6

        process.send_signal(number)
        process.wait(SECONDS)

    children = [child for child in psutil.process_iter() if _works_in(child, tmp_path)]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert process.returncode == (130 if number != signal.SIGKILL else -signal.SIGKILL)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd().startswith(str(folder))
    except psutil.Error:
        return False


# --- the judge ---------------------------------------------------------------------------------------------------


_DEAD_LETTER = (
    "INSERT INTO dead_letters (id, side, state, topic, message_id, type, kind, headers, failure, stage, error_class, "
    "error, attempts, fingerprint) "
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


def test_the_judge_is_content_with_what_is_right(engine: Engine) -> None:
    verdict = judge.judge(engine, _records(), 1, poison=1)

    assert verdict.failures == ()
    assert (verdict.placed, verdict.published, verdict.redelivered, verdict.replayed) == (3, 12, 1, 1)


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
def test_the_judge_sees_a_fault_in_the_tables(engine: Engine, fault: str, failure: str) -> None:
    with engine.begin() as connection:
        connection.execute(text(fault))

    assert failure in judge.judge(engine, _records(), 1, poison=1).failures


def test_the_judge_sees_a_fault_in_the_topics(engine: Engine) -> None:
    records = _records()

    def failures(changed: list[Record], duplicates: int = 1) -> tuple[str, ...]:
        return judge.judge(engine, changed, duplicates, poison=1).failures

    assert "every message was published" in failures(records[1:])
    assert "order is kept per key" in failures([records[1], records[0], *records[2:]])
    assert "messages were redelivered" in failures([*records[:12], records[13]])
    assert "the inbox caught every duplicate" in failures(records, duplicates=0)
    assert "the dead letter was replayed once" in failures(records[:13])
