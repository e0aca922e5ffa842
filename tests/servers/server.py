"""What every test server offers, wherever it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Given", "NotOurs", "Server", "Unavailable", "address"]


class Unavailable(Exception):
    """This source has no such server; the text says what is missing and what would bring it."""


class NotOurs(Exception):
    """A server that was given by URL is somebody else's process: a test may not stop it."""


def address(url: str) -> str:
    """The `host:port` part of a URL, which Kafka's clients call bootstrap servers."""
    return url.partition("://")[2].rpartition("@")[2].split("/")[0]


class Server(Protocol):
    """A real server in reach of the tests.

    `kill` is SIGKILL of every process, `stop` a clean shutdown, `start` brings the same port and data back and returns
    when clients are served; `pause` and `resume` freeze and thaw it (connections stay open, nothing answers); `heal`
    undoes whatever a test left behind; `close` gives the server and its data up. `bootstrap` is the URL's `host:port`.
    """

    name: str
    url: str
    version: str
    source: str

    @property
    def bootstrap(self) -> str: ...
    def kill(self) -> None: ...
    def stop(self) -> None: ...
    def start(self) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def heal(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Given:
    """A server named by an environment variable: used as it is, never started or stopped."""

    name: str
    url: str
    version: str
    source: str

    @property
    def bootstrap(self) -> str:
        return address(self.url)

    def _refuse(self) -> None:
        msg = f"{self.name} was given by {self.source}; tests that stop it need a local one: unset the variable"
        raise NotOurs(msg)

    kill = stop = start = pause = resume = _refuse

    def heal(self) -> None:
        """Nothing to undo: no test could stop it."""

    def close(self) -> None:
        """Nothing to give up: it is not ours."""
