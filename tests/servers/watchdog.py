"""Outlives the test process by a moment: when that dies, by whatever signal, no server survives it.

Run as `python -m tests.servers.watchdog FOLDER`. Reads `+PID` and `-PID` lines; at the end of the stream it kills every
tree that was added and not removed, and deletes FOLDER. (A parent-death signal would not do: it fires when the starting
*thread* ends, and is lost when the child changes its user.)
"""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

from tests.servers.processes import kill_trees

__all__ = ["main"]


def main(stream: TextIO, folder: str) -> None:
    """Follow the stream to its end, then clean up."""
    alive: set[int] = set()
    for line in stream:
        pid = int(line[1:])
        alive.add(pid) if line.startswith("+") else alive.discard(pid)
    kill_trees(alive)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.stdin, sys.argv[1])
