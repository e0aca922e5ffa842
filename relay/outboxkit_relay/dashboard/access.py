"""Access and safety of the page: who may do what, which requests are answered at all, and the headers of each answer.

Nothing is decided elsewhere: `Guard` stands around the whole application. A change is a POST whose origin is this page
and whose form carries the token of its cookie; `level_of` says which level each change takes.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from enum import IntEnum
from http import HTTPStatus
from inspect import isawaitable
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["COOKIE", "FIELD", "Access", "Guard", "Resolver", "Visitor", "is_token_of", "level_of", "token_of"]

COOKIE: Final = "outboxkit-csrf"
FIELD: Final = "csrf"
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
    # Not no-referrer: with it browsers send `Origin: null`, and forms of this page could not be told from others'.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
_STATIC: Final = {"cache-control": "no-cache"}  # kept, and asked for again: the answer is mostly that nothing changed
_SAFE: Final = ("GET", "HEAD")


class Access(IntEnum):
    """Levels of access; each includes those before it."""

    READ = 1  #: see everything but payloads and header values
    OPERATE = 2  #: also replay, pause, resume, release, take notes
    ALL = 3  #: also reveal and repair payloads, discard, skip, undo


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """A person at the page.

    Attributes:
        name: for the audit log.
        access: what the person may do.
    """

    name: str
    access: Access = Access.READ

    def may(self, level: Access) -> bool:
        """Tells whether the person has this level."""
        return self.access >= level


Resolver = Callable[[Request], Visitor | Awaitable[Visitor | None] | None]  #: None: nobody we know

_LEVELS: Final = {
    "cancel": Access.ALL,
    "reveal": Access.ALL,
    "repair": Access.ALL,
    "discard": Access.ALL,
    "skip": Access.ALL,
    "compensate": Access.ALL,
}


def level_of(action: str) -> Access:
    """The level that a change takes: what shows or ends something for good takes all of them."""
    return _LEVELS.get(action, Access.OPERATE)


def why_not_host(host: str, allowed: Collection[str]) -> str:
    """Why a request for this host is not answered; empty when it is.

    Another site can make a browser believe that its own name leads to this machine; it cannot change the Host header.
    """
    name = _name_in(host)
    if host in allowed or name in allowed or is_loopback(name):
        return ""
    return f"this page does not answer to the host {name!r}: give dashboard(hosts=[…]) the names that lead to it"


def _name_in(host: str) -> str:
    """The name or address in a Host header; empty when it names none, or a port that is none."""
    try:
        parts = urlsplit(f"//{host}")
        is_one = parts.port != 0
    except ValueError:
        return ""
    return (parts.hostname or "") if is_one else ""


def why_not_origin(host: str, origin: str | None, site: str | None) -> str:
    """Why a change is not accepted from where it comes; empty when it is.

    Args:
        host: as the request names it.
        origin: the header ``Origin``.
        site: the header ``Sec-Fetch-Site``, which no script can set.
    """
    if site is not None and site != "same-origin":
        return "this change comes from another site"
    if origin is None:
        return (
            "" if site == "same-origin" else "this change does not say where it comes from: use the page, or a command"
        )
    return "" if origin.partition("://")[2] == host else "this change comes from another site"


def is_loopback(host: str) -> bool:
    """Tells whether a name or address is this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def readers_on_this_machine(request: Request) -> Visitor | None:
    """The resolver of a page that was given none: whoever is on this machine may look."""
    return Visitor(name="page") if request.client and is_loopback(request.client.host) else None


def token_of(request: Request) -> str:
    """The token of the visitor's forms: that of the cookie, or a new one."""
    kept = request.cookies.get(COOKIE, "")
    return kept if len(kept) >= 32 else secrets.token_urlsafe(32)  # noqa: PLR2004  what we make is longer


def is_token_of(request: Request, given: str) -> bool:
    """Tells whether a form was made for the visitor who sends it."""
    kept = request.cookies.get(COOKIE, "")
    return bool(kept) and hmac.compare_digest(kept.encode(), given.encode())


class Guard:
    """Stands around the application: answers nobody it does not know, and no request that another site has made."""

    def __init__(self, app: ASGIApp, *, resolve: Resolver | None, hosts: Collection[str]) -> None:
        self._app, self._resolve, self._hosts = app, resolve or readers_on_this_machine, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        is_static = scope["path"].removeprefix(scope.get("root_path", "")).startswith("/static/")

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS | (_STATIC if is_static else {}))
            await send(message)

        request = Request(scope)
        status, why = await self._refusal(request)
        answer = PlainTextResponse(why + "\n", status) if why else self._app
        await answer(scope, receive, with_headers)

    async def _refusal(self, request: Request) -> tuple[HTTPStatus, str]:
        host = request.headers.get("host", "")
        if why := why_not_host(host, self._hosts):
            return HTTPStatus.MISDIRECTED_REQUEST, why
        found = self._resolve(request)
        visitor = await found if isawaitable(found) else found
        if visitor is None:
            return HTTPStatus.UNAUTHORIZED, "who are you? Sign in, or open the address that the command has printed"
        request.state.visitor = visitor
        if request.method in _SAFE:
            return HTTPStatus.OK, ""
        why = why_not_origin(host, request.headers.get("origin"), request.headers.get("sec-fetch-site"))
        return HTTPStatus.FORBIDDEN, why
