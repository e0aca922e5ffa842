"""`outboxkit demo-broker`: a broker that a reader of the tutorial needs not install."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from outboxkit.brokers import Batch, open_publisher
from outboxkit.testing.broker_conformance import make_row
from outboxkit_relay.settings import environment
from tests.deadlines import DEADLINE

PROGRAM = [sys.executable, "-m", "outboxkit_relay"]
SOON = 20  # seconds; a member that nobody has heard leaving is missed after 45
APP = """
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import Consumer, Message

billing = Consumer("billing", sessions=sessionmaker(create_engine("sqlite:///app.db")))

@billing.on("order.placed", topic="orders")
def bill(placed: Message, session: Session) -> None:
    print(placed.payload.decode(), flush=True)
"""


def test_it_serves_other_processes_by_the_url_in_its_file_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "broker.url"
    settings = environment(database_url=f"sqlite:///{tmp_path}/app.db", broker_url_file=str(file))
    serve = [*PROGRAM, "demo-broker", str(file)]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=settings) as broker:
        assert broker.stdout is not None
        said = broker.stdout.readline()
        url = file.read_text().strip()

        init = [*PROGRAM, "init", "--topic", "orders"]
        done = subprocess.run(init, env=settings, capture_output=True, text=True, check=False)
        broker.send_signal(signal.SIGTERM)

    assert said == f"serving {url} until Ctrl-C; export OUTBOXKIT_BROKER_URL_FILE={file}\n"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "topic orders created with 4 partitions"
    assert (broker.returncode, file.exists()) == (0, False)


def test_who_takes_over_from_a_consumer_that_was_stopped_handles_within_seconds(tmp_path: Path) -> None:
    """As in the tutorial: stop billing, repair it, start it again."""
    (tmp_path / "app.py").write_text(APP)
    file = tmp_path / "broker.url"
    settings = environment(database_url=f"sqlite:///{tmp_path}/app.db", broker_url_file=str(file))
    with subprocess.Popen([*PROGRAM, "demo-broker", str(file)], stdout=subprocess.PIPE, text=True) as broker:
        assert broker.stdout is not None
        assert broker.stdout.readline()
        init = [*PROGRAM, "init", "--topology", "app:billing"]
        subprocess.run(init, env=settings, cwd=tmp_path, capture_output=True, check=True, timeout=DEADLINE)
        publisher = open_publisher(file.read_text().strip())

        waited = []
        for order in ('"first"', '"second"'):
            row = make_row("orders", order.encode())
            with subprocess.Popen(
                [*PROGRAM, "consume", "app:billing"], env=settings, cwd=tmp_path, stdout=subprocess.PIPE, text=True
            ) as consumer:
                assert not publisher.publish(Batch("orders", [row])).result(DEADLINE).refusals
                began = time.monotonic()
                assert consumer.stdout is not None
                assert consumer.stdout.readline() == f"{order}\n"
                waited.append(time.monotonic() - began)
                consumer.send_signal(signal.SIGTERM)
            assert consumer.returncode == 0

        publisher.close()
        broker.send_signal(signal.SIGTERM)
    assert max(waited) < SOON
