"""A handler that never ends is no reason for a process not to."""

from __future__ import annotations

import subprocess
import sys

from tests.deadlines import DEADLINE

HANGS = """
import asyncio, threading
from outboxkit.consumer.transactions import Threads

async def main():
    begun = threading.Event()
    Threads(1, "hangs").run(lambda: (begun.set(), threading.Event().wait()))
    await asyncio.to_thread(begun.wait)

asyncio.run(main())
"""


def test_a_function_that_never_ends_does_not_keep_the_process_from_ending() -> None:
    assert subprocess.run([sys.executable, "-c", HANGS], timeout=DEADLINE, check=False).returncode == 0
