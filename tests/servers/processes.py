"""Children that can be killed whole, and a session folder; nothing of it survives this process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import psutil

__all__ = [
    "drop_to",
    "end",
    "free_ports",
    "kill_trees",
    "knock",
    "owned_folder",
    "session_folder",
    "spawn",
    "tree",
    "wait_until",
]

_ROOT = Path(__file__).parents[2]
T = TypeVar("T")
_one_at_a_time = threading.RLock()
_children: dict[int, subprocess.Popen[bytes]] = {}


def _once(build: Callable[[], T]) -> Callable[[], T]:
    """Build on first use, once even when several threads ask at the same time."""
    kept = functools.cache(build)

    @functools.wraps(build)
    def call() -> T:
        with _one_at_a_time:
            return kept()

    return call


def tree(pid: int) -> list[psutil.Process]:
    """The process and everything below it that still runs; the root first."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [process for process in processes if not _gone(process)]


def _gone(process: psutil.Process) -> bool:
    """Zombies count as gone: where PID 1 is slow to reap, a killed grandchild stays visible for minutes."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill_trees(pids: Iterable[int]) -> None:
    """SIGKILL the processes with all their children and wait until they are gone (their ports and locks are free)."""
    processes = [process for pid in pids for process in tree(pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _wait_for(processes, within=10)


def _wait_for(processes: Iterable[psutil.Process], *, within: float) -> bool:
    """Whether all of them are gone in time; psutil's own wait would wait for zombies."""
    deadline = time.monotonic() + within
    while not all(map(_gone, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@_once
def session_folder() -> Path:
    """One folder for the data of this session's servers; other users may pass through it, not look into it."""
    folder = Path(tempfile.mkdtemp(prefix="outboxkit-test-"))
    folder.chmod(0o711)
    atexit.register(_end_of_session, os.getpid())
    return folder


@_once
def _watchdog() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.servers.watchdog", str(session_folder())],
        stdin=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        start_new_session=True,  # Ctrl-C at the terminal is for pytest, not for this one
    )


def _tell_watchdog(line: str) -> None:
    pipe = _watchdog().stdin
    assert pipe is not None
    with _one_at_a_time:
        pipe.write(f"{line}\n")
        pipe.flush()


def _end_of_session(owner: int) -> None:
    """Kill what is left; the end of its stream lets the watchdog go."""
    if os.getpid() != owner:  # a forked copy of us ends: the servers are not its own
        return
    for child in list(_children.values()):
        end(child)
    watchdog = _watchdog()
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    try:
        watchdog.wait(10)
    except subprocess.TimeoutExpired:  # a forked copy of us still holds the stream open
        watchdog.kill()
        watchdog.wait()
    shutil.rmtree(session_folder(), ignore_errors=True)


def drop_to(*candidates: str) -> str | None:
    """The first existing unprivileged user to run a server as; None when we are not root and need none."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in candidates if name in known)


def owned_folder(path: Path, user: str | None) -> Path:
    """A fresh private folder that belongs to `user`."""
    path.mkdir(mode=0o700)
    if user:
        entry = pwd.getpwnam(user)
        os.chown(path, entry.pw_uid, entry.pw_gid)
    return path


def spawn(
    argv: Sequence[str | Path], *, user: str | None, env: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a direct child in a session of its own; the watchdog knows it until it has been waited for."""
    account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    with log.open("ab") as output:
        child = subprocess.Popen(  # type: ignore[call-overload]  # the three are given together or not at all
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd="/",
            start_new_session=True,
            **account,
        )
    _children[child.pid] = child
    _tell_watchdog(f"+{child.pid}")
    return child  # type: ignore[no-any-return]


def end(child: subprocess.Popen[bytes], *, gently: signal.Signals | None = None) -> None:
    """End a child with everything below it: by its own shutdown signal when given one, by SIGKILL what remains."""
    processes = tree(child.pid)
    if gently is not None and child.poll() is None:
        child.send_signal(gently)
        _wait_for(processes, within=30)
    kill_trees(process.pid for process in processes)
    child.wait()
    _children.pop(child.pid, None)
    _tell_watchdog(f"-{child.pid}")


def free_ports(count: int) -> list[int]:
    """Free loopback ports below 32768: above it, a client's own port can take the number while its server is down."""
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(15000, 32000)  # random, so that two sessions on one machine rarely meet
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.add(port)
    return sorted(found)


def knock(host: str, port: int) -> None:
    """Raise unless something accepts connections there (cheaper and quieter than a client's own retries)."""
    with socket.create_connection((host, port), timeout=2):
        pass


def wait_until(ready: Callable[[], object], *, within: float, alive: Callable[[], bool], what: str) -> None:
    """Call `ready` until it no longer raises; give up when the time is over or the process has died."""
    deadline = time.monotonic() + within
    while True:
        try:
            ready()
        except Exception as error:  # each client library has its own way to say "not yet"
            if not alive() or time.monotonic() > deadline:
                state = "did not answer in time" if alive() else "ended during its start"
                msg = f"{what} {state}: {error}"
                raise RuntimeError(msg) from error
            time.sleep(0.05)
        else:
            return
