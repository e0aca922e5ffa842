"""The demo's world: a folder, a database, and processes that never outlive it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from outboxkit_relay.demo import contracts
from outboxkit_relay.settings import environment, variables

__all__ = ["Child", "Failed", "World", "opened", "until"]

_PATIENCE_SECONDS: Final = 60.0  # for anything that must happen; a slow machine is no failure
_GRACE_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.05


class Failed(Exception):
    """The story cannot go on."""


@dataclass(slots=True)
class Child:
    """A process of the demo; its log is a file in the demo's folder."""

    name: str
    process: subprocess.Popen[str]
    log: Path

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to this process and no other."""
        self.process.send_signal(number)

    def say(self, line: str) -> None:
        """Writes a line to its standard input."""
        assert self.process.stdin is not None  # noqa: S101  every child has one
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read_line(self) -> str:
        """Its next line, for a child that answers.

        Raises:
            Failed: it ended instead.
        """
        assert self.process.stdout is not None  # noqa: S101  asked of children with a pipe only
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"{self.name} ended: {self.last_words()}")
        return line.strip()

    def end(self) -> int:
        """Stops it as an operator would: SIGTERM, and patience; returns its exit code."""
        self.ask_to_end()
        return self.wait()

    def ask_to_end(self) -> None:
        """SIGTERM, once: a second one would be an order."""
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code, as soon as it has one; one that does not end is killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_GRACE_SECONDS)
        self.kill()
        return self.process.returncode

    def dismiss(self) -> None:
        """Closes its standard input, which ends it in its own way, and waits; one that does not end is killed."""
        assert self.process.stdin is not None  # noqa: S101  every child has one
        if self.process.poll() is None:
            self.send(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.wait()

    def kill(self) -> None:
        """SIGKILL: it gets no chance to clean up."""
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.wait()

    def stands_still(self) -> bool:
        """Whether it was stopped, by SIGSTOP."""
        pid, status = os.waitpid(self.process.pid, os.WNOHANG | os.WUNTRACED)
        return pid != 0 and os.WIFSTOPPED(status)

    def events(self, name: str) -> list[dict[str, object]]:
        """The lines of its log with this event."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{"))
        return [line for line in lines if line.get("event") == name]

    def last_words(self) -> str:
        """Why it ended, for people: of one that was killed the end of its log tells something else."""
        code = self.process.poll()
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return self.log.read_text().strip().rpartition("\n")[2][-500:] or f"exit code {code}"


@dataclass(slots=True)
class World:
    """Where the demo happens.

    Attributes:
        folder: database, logs.
        settings: what every child is told, as names of settings.
        children: who must live.
        servers: those of them that the others need.
    """

    folder: Path
    settings: dict[str, str]
    children: list[Child] = field(default_factory=list)
    servers: list[Child] = field(default_factory=list)

    def run(
        self, name: str, module: str, *arguments: str, answers: bool = False, settings: Mapping[str, str] | None = None
    ) -> Child:
        """Starts ``python -m module …`` with this interpreter."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as errors:
            process = subprocess.Popen(  # noqa: S603  our own interpreter and modules
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if answers else errors,
                stderr=errors,
                env=environment(**(self.settings | dict(settings or {}))),
                cwd=self.folder,
                text=True,
                start_new_session=True,  # Ctrl-C is for the demo, which then stops its children in order
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def serve(self, name: str, module: str, *arguments: str) -> tuple[Child, str]:
        """Starts a server that says its URL; it ends after all others."""
        server = self.run(name, module, *arguments, answers=True)
        self.servers.append(server)
        return server, server.read_line()

    def command(self, *arguments: str, columns: int | None = None) -> subprocess.CompletedProcess[str]:
        """Runs ``outboxkit …`` to its end, as a person would, on a terminal of so many columns."""
        return subprocess.run(  # noqa: S603  our own interpreter and modules
            [sys.executable, "-m", "outboxkit_relay", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment(**self.settings) | ({"COLUMNS": str(columns)} if columns else {}),
            cwd=self.folder,
            text=True,
            timeout=_PATIENCE_SECONDS,
            check=False,
        )

    def write_names(self, *, prefix: str) -> None:
        """Tells every process of this telling what its topics and consumers begin with."""
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
            if child.process.poll() is not None:
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
def opened(**settings: str) -> Iterator[World]:
    """A world in a temporary folder. At the end, however it comes, no process is left."""
    folder = Path(tempfile.mkdtemp(prefix="outboxkit-demo-"))
    told = {"registry_url": f"directory:{contracts.SCHEMAS}", "log__format": "json", **settings}
    told.setdefault("database_url", f"sqlite:///{folder / 'demo.db'}")
    world = World(folder, told)
    try:
        yield world
    finally:
        for child in world.children:
            if child not in world.servers:
                child.kill()
        for server in world.servers:
            server.dismiss()
        shutil.rmtree(folder)


def until(true: Callable[[], bool], world: World, what: str) -> None:
    """Waits for a fact.

    Raises:
        Failed: it does not come true, or a process dies meanwhile.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not true():
        world.watch()
        if time.monotonic() > deadline:
            raise Failed(f"waited {_PATIENCE_SECONDS:.0f} s in vain: {what}")
        time.sleep(_LOOK_SECONDS)
