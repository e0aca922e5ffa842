"""The processes of the demo: a folder with their settings and logs, and children that never outlive the demo."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from outboxkit_relay.demo import contracts, forked
from outboxkit_relay.settings import environment, variables

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

__all__ = ["Child", "Done", "Failed", "Processes", "started", "until"]

_DEADLINE_SECONDS: Final = 60.0  # for anything that must happen; a slow machine is no failure
_GRACE_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.05


class Failed(Exception):
    """The demo cannot go on."""


@dataclass(frozen=True, slots=True)
class Done:
    """The exit code of a command, and its output."""

    code: int
    out: str


@dataclass(slots=True)
class Child:
    """A process of the demo; its log is a file in the demo's folder."""

    name: str
    process: ForkServerProcess
    pipe: socket.socket  # its standard input; where it answers, its standard output too
    log: Path

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to this process and no other."""
        if self.is_alive() and self.process.pid:
            os.kill(self.process.pid, number)

    def is_alive(self) -> bool:
        """True until it has ended."""
        return self.process.is_alive()

    def say(self, line: str) -> None:
        """Writes a line to its standard input."""
        self.pipe.sendall(f"{line}\n".encode())

    def read_line(self) -> str:
        """Its next line, for a child that answers.

        Raises:
            Failed: it ended instead.
        """
        line = b""
        while not line.endswith(b"\n"):  # nobody speaks before he is asked, so there is no second line to lose
            part = self.pipe.recv(4096)
            if not part:
                self.process.join(_GRACE_SECONDS)
                raise Failed(f"{self.name} ended: {self.last_words()}")
            line += part
        return line.decode().strip()

    def end(self) -> int:
        """Stops it as an operator would: SIGTERM, and patience; returns its exit code."""
        self.ask_to_end()
        return self.wait()

    def ask_to_end(self) -> None:
        """SIGTERM, once: a second one would be an order."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, as soon as it has one; one that does not end is killed."""
        self.process.join(_GRACE_SECONDS)
        return self.kill()

    def dismiss(self) -> None:
        """Closes its standard input, which ends it in its own way, and waits; one that does not end is killed."""
        self.send(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.pipe.shutdown(socket.SHUT_WR)
        self.wait()

    def kill(self) -> int:
        """SIGKILL, if it is still there: it gets no chance to clean up. Its exit code."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return self.process.exitcode or 0

    def stands_still(self) -> bool:
        """True while it is stopped, by SIGSTOP."""
        file = Path(f"/proc/{self.process.pid}/stat")
        if file.exists():
            return file.read_text().rpartition(") ")[2].startswith("T")
        state = ["ps", "-o", "stat=", "-p", str(self.process.pid)]
        return subprocess.run(state, capture_output=True, check=False).stdout.startswith(b"T")  # noqa: S603  constants

    def events(self, name: str) -> list[dict[str, object]]:
        """The lines of its log with this event."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == name]

    def last_words(self) -> str:
        """Why it ended, for people: of one that was killed the end of its log tells something else."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return self.log.read_text().strip().rpartition("\n")[2][-500:] or f"exit code {code}"


@dataclass(slots=True)
class Processes:
    """The demo's folder and its children.

    Attributes:
        folder: database, logs.
        settings: of every child, by the names of settings.
        children: those that must live.
        servers: those of them that the others need.
    """

    folder: Path
    settings: dict[str, str]
    children: list[Child] = field(default_factory=list)
    servers: list[Child] = field(default_factory=list)

    def run(
        self, name: str, module: str, *arguments: str, answers: bool = False, settings: Mapping[str, str] | None = None
    ) -> Child:
        """Runs ``python -m module …`` as a child."""
        variables = environment(**(self.settings | dict(settings or {})))
        child = self._start(name, [module, *arguments], variables, answers=answers)
        self.children.append(child)
        return child

    def serve(self, name: str, module: str, *arguments: str) -> tuple[Child, str]:
        """Starts a server that says its URL; it ends after all others."""
        server = self.run(name, module, *arguments, answers=True)
        self.servers.append(server)
        return server, server.read_line()

    def command(self, *arguments: str, columns: int | None = None) -> Done:
        """Runs ``outboxkit …`` to its end, as a person would, on a terminal of so many columns."""
        variables = environment(**self.settings) | ({"COLUMNS": str(columns)} if columns else {})
        child = self._start("command", ["outboxkit_relay", *arguments], variables)
        child.process.join(_DEADLINE_SECONDS)
        code, out = child.kill(), child.log.read_text()
        child.log.unlink()
        return Done(code, out)

    def _start(
        self, name: str, command: Sequence[str], variables: Mapping[str, str], *, answers: bool = False
    ) -> Child:
        log = self.folder / f"{name}.log"
        log.touch()
        return Child(name, *forked.fork(command, log=log, variables=variables, answers=answers), log)

    def write_names(self, *, prefix: str) -> None:
        """Tells every process of this demo what its topics and consumers begin with."""
        (self.folder / "demo.json").write_text(json.dumps({"prefix": prefix}))

    def write_settings(self) -> Path:
        """A file for a shell, readable by this user only: it has the passwords. For `. FILE`."""
        file = self.folder / "settings.sh"
        file.touch(mode=0o600)
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables(**self.settings).items()]
        file.write_text("".join(lines))
        return file

    def watch(self) -> None:
        """Looks after the children.

        Raises:
            Failed: one that should live is dead.
        """
        for child in self.children:
            if not child.is_alive():
                raise Failed(f"{child.name} ended: {child.last_words()}")

    def end_clients(self) -> None:
        """Stops everybody but the servers as an operator would, so that they leave what they take part in."""
        clients = [child for child in self.children if child not in self.servers]
        for child in clients:
            child.ask_to_end()
        for child in clients:
            self.children.remove(child)
            child.wait()

    def end(self, child: Child) -> int:
        """Stops one child; it is not missed."""
        self.children.remove(child)
        return child.end()

    def kill(self, child: Child) -> None:
        """Kills one child; it is not missed."""
        self.children.remove(child)
        child.kill()


@contextlib.contextmanager
def started(**settings: str) -> Iterator[Processes]:
    """A temporary folder for processes; at the end, however it comes, none is left."""
    folder = Path(tempfile.mkdtemp(prefix="outboxkit-demo-"))
    told = {"registry_url": f"directory:{contracts.SCHEMAS}", "log__format": "json", **settings}
    told.setdefault("database_url", f"sqlite:///{folder / 'demo.db'}")
    processes = Processes(folder, told)
    try:
        yield processes
    finally:
        for child in processes.children:
            if child not in processes.servers:
                child.kill()
        for server in processes.servers:
            server.dismiss()
        shutil.rmtree(folder)


def until(true: Callable[[], bool], processes: Processes, what: str) -> None:
    """Waits for a fact.

    Raises:
        Failed: it does not come true, or a process dies meanwhile.
    """
    deadline = time.monotonic() + _DEADLINE_SECONDS
    while not true():
        processes.watch()
        if time.monotonic() > deadline:
            raise Failed(f"waited {_DEADLINE_SECONDS:.0f} s in vain: {what}")
        time.sleep(_LOOK_SECONDS)
