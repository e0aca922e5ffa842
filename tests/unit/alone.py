"""Unit tests run in their process alone. The interpreter itself tells who starts another, or speaks to anybody."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

__all__ = ["alone"]

_REFUSED = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "pty.spawn",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.sendto",
    "subprocess.Popen",
}
_seen: list[list[str]] = []  # of the blocks that are open; an audit hook stays for good, so it looks here


def _hear(event: str, arguments: tuple[object, ...]) -> None:
    if _seen and event in _REFUSED:
        _seen[-1].append(f"{event}({arguments[0] if arguments else ''})")
        raise AssertionError(f"a unit test did {_seen[-1][-1]}: it belongs to tests/integration")


sys.addaudithook(_hear)


@contextlib.contextmanager
def alone() -> Iterator[list[str]]:
    """Refuses processes and connections while the block runs; yields those that were tried."""
    _seen.append([])
    try:
        yield _seen[-1]
    finally:
        _seen.pop()
