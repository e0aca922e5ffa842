"""Health: ``/livez``, ``/readyz`` and ``/metrics`` of a running relay, over HTTP. Off unless a port is set.

``/livez`` knows the dispatcher only: a database or broker that is away must not restart the process. No answer has a
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from outboxkit.errors import ConfigurationError
from outboxkit_relay.observe.metrics import RelayMetrics, Subject
from outboxkit_relay.observe.sentences import sentence
from outboxkit_relay.observe.stats import why_not_alive, why_not_ready

if TYPE_CHECKING:
    from outboxkit_relay.settings import ProbeSettings

__all__ = ["serving"]

_log: Final = logging.getLogger(__name__)

_DEADLINE: Final = 2.0  # seconds for the request, and again for taking the answer
_MAX_REQUEST: Final = 8192  # bytes: a request line and headers
_MAX_CLIENTS: Final = 100  # the one that has been there longest makes room for the next

Answer = tuple[HTTPStatus, str, bytes]


@contextmanager
def serving(settings: ProbeSettings, subject: Subject) -> Iterator[int | None]:
    """Answers on a port while the block runs; gives the port, None when none is set.

    Raises:
        ConfigurationError: the host is not this machine and ``allow_remote`` is not set, or the port is taken.
    """
    if settings.port is None:
        yield None
        return
    if not (settings.allow_remote or _is_this_machine(settings.host)):
        raise ConfigurationError(
            f"probes.host is {settings.host}: others could read the relay's state there, without a login; "
            "use 127.0.0.1, or set probes.allow_remote = true",
        )
    loop = asyncio.new_event_loop()
    answers = _Answers(subject)
    try:
        listener = loop.run_until_complete(_listen(answers, settings.host, settings.port))
    except OSError as error:
        loop.close()
        raise ConfigurationError(
            f"the probes cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
            "set probes.port"
        ) from None
    thread = threading.Thread(target=loop.run_forever, name="outboxkit-probes", daemon=True)
    thread.start()
    port: int = listener.sockets[0].getsockname()[1]
    _log.info("probes.listening", extra={"host": settings.host, "port": port})
    try:
        yield port
    finally:
        answers.metrics.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listener.close()
        loop.run_until_complete(_cancel_all())
        loop.close()


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _cancel_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


# --- answers -----------------------------------------------------------------------------------------------------


class _Answers:
    """The answer on each path."""

    def __init__(self, subject: Subject) -> None:
        self.metrics = RelayMetrics(subject)
        self._subject = subject
        self._registry = CollectorRegistry()
        self._registry.register(self.metrics)

    async def answer(self, method: str, path: str) -> Answer:
        """Answers one request."""
        if method != "GET":
            return HTTPStatus.NOT_IMPLEMENTED, "text/plain", b"only GET\n"
        found, lease = self._subject.look(), self._subject.lease
        if path == "/livez":
            return _verdict(why_not_alive(found, lease))
        if path == "/readyz":
            now = datetime.now(UTC)
            unavailable = [asdict(one) | {"sentence": sentence(one, now)} for one in found.unavailable] if found else []
            return _verdict(why_not_ready(found, lease), paused=unavailable)
        if path == "/metrics":
            return HTTPStatus.OK, CONTENT_TYPE_LATEST, await asyncio.to_thread(generate_latest, self._registry)
        return HTTPStatus.NOT_FOUND, "text/plain", b"/livez, /readyz or /metrics\n"


def _verdict(why_not: str, **facts: object) -> Answer:
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
