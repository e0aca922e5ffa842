"""The demo's children: what people are told when one has ended."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from outboxkit_relay.demo.world import Child


def _child(code: str, log: Path) -> Child:
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-uc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
        )
    return Child("payments", process, log)


def test_one_that_was_killed_is_not_quoted(tmp_path: Path) -> None:
    code = "import sys; print('up', file=sys.stderr); print('up'); sys.stdin.read()"
    child = _child(code, tmp_path / "log")
    assert child.read_line() == "up"

    child.send(signal.SIGKILL)

    child.process.communicate(timeout=30)
    assert child.last_words() == "killed by SIGKILL"


def test_one_that_gave_up_has_said_why(tmp_path: Path) -> None:
    child = _child("import sys; sys.exit('the queue is gone')", tmp_path / "log")

    child.process.communicate(timeout=30)

    assert child.last_words() == "the queue is gone"


def test_one_that_said_nothing_left_its_exit_code(tmp_path: Path) -> None:
    child = _child("raise SystemExit(3)", tmp_path / "log")

    child.process.communicate(timeout=30)

    assert child.last_words() == "exit code 3"
