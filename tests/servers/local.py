"""A server that this test session starts itself, from programs that are installed or were downloaded."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.servers import processes
from tests.servers.server import address

__all__ = ["LocalServer"]


@dataclass(kw_only=True)
class LocalServer:
    """One direct child and its data folder; see `tests.servers.server.Server` for the verbs."""

    name: str
    url: str
    version: str
    source: str
    argv: Sequence[str | Path]
    folder: Path
    ready: Callable[[], object]
    user: str | None = None
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    shutdown: signal.Signals = signal.SIGTERM
    farewell: signal.Signals | None = None
    start_seconds: float = 60.0
    _child: subprocess.Popen[bytes] | None = None
    _paused: bool = False

    @property
    def bootstrap(self) -> str:
        return address(self.url)

    @property
    def log(self) -> Path:
        """Everything the server has printed, over all its starts."""
        return self.folder.parent / f"{self.folder.name}.log"

    @property
    def pid(self) -> int:
        """The server's main process."""
        if self._child is None:
            msg = f"{self.name} is not running"
            raise RuntimeError(msg)
        return self._child.pid

    def start(self) -> None:
        if self._running():
            return
        child = self._child = processes.spawn(self.argv, user=self.user, env=self.env, log=self.log)
        try:
            processes.wait_until(
                self.ready, within=self.start_seconds, alive=lambda: child.poll() is None, what=self.name
            )
        except RuntimeError as error:
            self.kill()
            tail = self.log.read_text(errors="replace")[-2000:]
            msg = f"{error}\n--- {self.name}'s last words ---\n{tail}"
            raise RuntimeError(msg) from error

    def kill(self) -> None:
        self._end(gently=None)

    def stop(self) -> None:
        self._end(gently=self.shutdown)

    def _end(self, *, gently: signal.Signals | None) -> None:
        if self._child is not None:
            child, self._child, self._paused = self._child, None, False
            processes.end(child, gently=gently)

    def pause(self) -> None:
        self._paused = True
        for process in processes.tree(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        self._paused = False
        for process in processes.tree(self.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def heal(self) -> None:
        if not self._running():
            self.kill()
            self.start()
        elif self._paused:
            self.resume()
            self.ready()

    def close(self) -> None:
        """The data is thrown away anyway: the quickest end that leaves nothing in the system."""
        self._end(gently=self.farewell)

    def _running(self) -> bool:
        return self._child is not None and self._child.poll() is None
