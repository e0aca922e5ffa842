"""What a unit test may not do is refused, and noticed where the refusal is swallowed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.unit.alone import alone


def _connect() -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", 9))


def _listen() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("deed", "event"),
    [
        (_connect, "socket.connect"),
        (_listen, "socket.bind"),
        (lambda: socket.getaddrinfo("localhost", 80), "socket.getaddrinfo"),
        (lambda: subprocess.run([sys.executable, "-V"], check=False), "subprocess.Popen"),
        (lambda: os.system("true"), "os.system"),
        (os.fork, "os.fork"),
    ],
)
def test_processes_and_connections_are_refused(deed: Callable[[], object], event: str) -> None:
    with alone() as tried:
        with pytest.raises(AssertionError, match="belongs to tests/integration"):
            deed()
        with contextlib.suppress(AssertionError):
            deed()

    assert [name.partition("(")[0] for name in tried] == [event, event]


def test_an_event_loop_and_threads_are_no_connection() -> None:
    with alone() as tried:
        assert asyncio.run(asyncio.to_thread(lambda: 7)) == 7

    assert tried == []
