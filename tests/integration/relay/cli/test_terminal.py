"""Questions, where somebody sits at a terminal and where nobody does; and what a person waits for."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import Engine

from outboxkit_relay.settings import environment
from tests.deadlines import DEADLINE
from tests.unit.relay.cli.builders import bury, requests_of, state_of, stop_key
from tests.unit.relay.cli.conftest import Outboxkit


@pytest.mark.parametrize(("answer", "state", "code"), [("y", "replaying", 0), ("n", "dead", 1), ("", "dead", 1)])
def test_a_person_is_asked_with_the_count(engine: Engine, answer: str, state: str, code: int) -> None:
    letter, other = bury(engine, key=b"1"), bury(engine, "shipping", key=b"2")
    here, there = pty.openpty()
    command = [sys.executable, "-m", "outboxkit_relay", "dlq", "replay", "--all"]

    process = subprocess.Popen(command, stdin=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(here, f"{answer}\n".encode())
    _, talk = process.communicate(timeout=DEADLINE)
    os.close(here)
    os.close(there)

    assert process.returncode == code
    assert "Replay 2 messages (" in talk
    assert "billing 1" in talk
    assert "[y/N]" in talk
    assert {state_of(engine, letter), state_of(engine, other)} == {state}


def test_without_a_terminal_and_without_yes_nothing_is_asked(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine)
    command = [
        sys.executable,
        "-c",
        "from outboxkit_relay.cli import main; main()",
        "quarantine",
        "skip",
        "orders",
        "7",
    ]

    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "Skip the key 7 of orders (2 messages behind)?" in done.stderr
    assert "Add --yes" in done.stderr
    assert "Usage:" not in done.stderr
    assert requests_of(engine) == {b"7": None}


def test_init_says_that_it_waits_for_the_broker(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = environment(database_url=f"sqlite:///{tmp_path}/app.db", broker_url=f"amqp://me:CANARY-4711@{at}")
        command = [sys.executable, "-m", "outboxkit_relay", "init", "--topic", "orders"]
        with subprocess.Popen(
            command, env=settings, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as init:
            assert init.stderr is not None
            said = init.stderr.readline()
            init.kill()

    assert said.startswith("waiting for the broker at amqp://me:")
    assert said.endswith(f"@{at}\n")
    assert "CANARY" not in said
