"""The edge of a system: a conversation begins where a request comes in, and its id goes with every message.

`CorrelationMiddleware` is for ASGI, `correlating` for WSGI applications. A caller's id is taken if it is short and
printable; else a new one is made. The answer carries it, so that people can quote it.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from outboxkit.context import correlation

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["HEADER", "CorrelationMiddleware", "correlating"]

HEADER: Final = "x-correlation-id"
_ALLOWED: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")  # it reaches headers, logs and listings

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


class CorrelationMiddleware:
    """Gives each request of an ASGI application a conversation: the caller's, or a new one.

    Args:
        app: the application.
        header: the header that carries the id, in both directions.
        trust: takes the caller's id; False makes a new one for each request, where callers are strangers.
    """

    def __init__(self, app: _App, *, header: str = HEADER, trust: bool = True) -> None:
        self._app, self._trust = app, trust
        self._header = header.lower().encode("latin-1")

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        """Answers one request or connection."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == self._header), b"") if self._trust else b""
        name = _accepted(given.decode("latin-1"))

        async def answering(part: MutableMapping[str, Any]) -> None:
            if part["type"] == "http.response.start":
                part = {**part, "headers": [*part.get("headers", ()), (self._header, name.encode())]}
            await send(part)

        with correlation(name):
            return await self._app(scope, receive, answering)


def correlating(app: WSGIApplication, *, header: str = HEADER, trust: bool = True) -> WSGIApplication:
    """Wraps a WSGI application: each request has a conversation; see `CorrelationMiddleware`."""
    variable = "HTTP_" + header.upper().replace("-", "_")

    def wrapped(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        name = _accepted(environ.get(variable, "") if trust else "")

        def answering(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, (header, name)], *error)

        with correlation(name):
            # Read here: what the application makes while it is iterated belongs to the conversation, too.
            return list(app(environ, answering))

    return wrapped


def _accepted(given: str) -> str:
    return given if _ALLOWED.fullmatch(given) else str(uuid4())
