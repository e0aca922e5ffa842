"""Health: ``/livez``, ``/readyz`` and ``/metrics`` of a running relay or consumer, over HTTP. Off unless a port is set.

``/livez`` knows the process only: a database or broker that is away must not restart the process. No answer has a
payload, a key or a message id. Listening anywhere but on this machine needs a setting that says so.

One thread serves all clients: a client that is slow costs a socket and nothing else, and is cut after `_DEADLINE`.
Scrapes are made in a thread of their own, so that the two probes never wait for the database.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from prometheus_client import Metric

    from outboxkit_relay.settings import ProbeSettings

__all__ = ["Probed", "serving"]

_log: Final = logging.getLogger(__name__)

_DEADLINE: Final = 2.0  # seconds for the request, and again for taking the answer
_MAX_REQUEST: Final = 8192  # bytes: a request line and headers
_MAX_CLIENTS: Final = 100  # the one that has been there longest makes room for the next

Answer = tuple[HTTPStatus, str, bytes]


class Metrics(Protocol):
    """A collector that may count in the background."""

    def collect(self) -> Iterable[Metric]: ...

    def close(self) -> None:
        """Counts no more."""
        ...


class Probed(Protocol):
    """Something that runs and can be asked how it is."""

    def why_not_alive(self) -> str:
        """The reason to restart the process, empty when there is none."""
        ...

    def readiness(self) -> tuple[str, Mapping[str, object]]:
        """The reason why it does not work, empty when it does; and facts for people."""
        ...

    def metrics(self) -> Metrics:
        """Returns what collects its numbers."""
        ...


@contextmanager
def serving(settings: ProbeSettings, subject: Probed) -> Iterator[int | None]:
    """Answers on a port while the block runs; gives the port, None when none is set.

    Raises:
        ConfigurationError: the host is not this machine and ``allow_remote`` is not set, or the port is taken.
    """
    if settings.port is None:
        yield None
        return
    if not (settings.allow_remote or _is_this_machine(settings.host)):
        raise ConfigurationError(
            f"probes.host is {settings.host}: others could read its state there, without a login; "
            "use 127.0.0.1, or set probes.allow_remote = true",
        )
    answers = _Answers(subject)
    with _loop_in_thread() as loop:
        listener = _listening(loop, answers, settings)
        port: int = listener.sockets[0].getsockname()[1]
        _log.info("probes.listening", extra={"host": settings.host, "port": port})
        try:
            yield port
        finally:
            answers.metrics.close()
            asyncio.run_coroutine_threadsafe(_close(listener), loop).result()


@contextmanager
def _loop_in_thread() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop of the probes' own: the caller may have a running one, and it may be blocked."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="outboxkit-probes", daemon=True)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _listening(loop: asyncio.AbstractEventLoop, answers: _Answers, settings: ProbeSettings) -> asyncio.Server:
    try:
        return asyncio.run_coroutine_threadsafe(_listen(answers, settings.host, settings.port or 0), loop).result()
    except OSError as error:
        raise ConfigurationError(
            f"the probes cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "set probes.port"
        ) from None


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _close(listener: asyncio.Server) -> None:
    listener.close()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


# --- answers -----------------------------------------------------------------------------------------------------


class _Answers:
    """The answer on each path."""

    def __init__(self, subject: Probed) -> None:
        self.metrics = subject.metrics()
        self._subject = subject
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    async def answer(self, method: str, path: str) -> Answer:
        """Answers one request."""
        if method != "GET":
            return HTTPStatus.NOT_IMPLEMENTED, "text/plain", b"only GET\n"
        if path == "/livez":
            return _verdict(self._subject.why_not_alive(), {})
        if path == "/readyz":
            return _verdict(*self._subject.readiness())
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, await asyncio.to_thread(generate_latest, self._registry)
        return HTTPStatus.NOT_FOUND, "text/plain", b"/livez, /readyz or /metrics\n"


def _verdict(why_not: str, facts: Mapping[str, object]) -> Answer:
    status = HTTPStatus.SERVICE_UNAVAILABLE if why_not else HTTPStatus.OK
    answer = {"ok": not why_not, **({"reason": why_not} if why_not else {}), **facts}
    return status, "application/json", json.dumps(answer, default=str).encode() + b"\n"


# --- HTTP --------------------------------------------------------------------------------------------------------


async def _listen(answers: _Answers, host: str, port: int) -> asyncio.Server:
    clients: dict[asyncio.Task[Any] | None, asyncio.StreamWriter] = {}  # in the order in which they came

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        clients[task] = writer
        if len(clients) > _MAX_CLIENTS:
            clients[next(iter(clients))].transport.abort()
        try:
            await _exchange(reader, writer, answers)
        finally:
            del clients[task]
            writer.close()

    return await asyncio.start_server(serve, host, port, limit=_MAX_REQUEST, backlog=_MAX_CLIENTS)


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: _Answers) -> None:
    """Reads one request and answers it; a client that is slow, goes away or says too much gets nothing."""
    with suppress(TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
        async with asyncio.timeout(_DEADLINE):
            head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.partition(b"\r\n")[0].decode("latin-1").partition(" ")
        status, kind, body = await answers.answer(method, rest.partition(" ")[0].partition("?")[0])
        headers = {
            "Content-Type": kind,
            "Content-Length": len(body),
            "Cache-Control": "no-store",
            "Connection": "close",
        }
        lines = [f"HTTP/1.1 {status.value} {status.phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        async with asyncio.timeout(_DEADLINE):
            await writer.drain()
