"""Idempotency keys for HTTP: a middleware that makes the answer, the effect and the key one transaction."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from outboxkit.errors import (
    ConfigurationError,
    IdempotencyConflict,
    IdempotencyInProgress,
    IdempotencyOutcomeUnknown,
    OutboxKitError,
)
from outboxkit.idempotency.keys import Outcome, idempotent
from outboxkit.policy import duration

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

__all__ = ["SESSION", "IdempotencyMiddleware"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SESSION: Final = "outboxkit.session"  #: in the request's ``scope``: the session whose transaction holds the key
_REPLAYED: Final = ("idempotency-replayed", "true")
_REFUSALS: Final = (ConfigurationError, IdempotencyInProgress, IdempotencyConflict, IdempotencyOutcomeUnknown)
_STATUS: Final = dict(zip(_REFUSALS, (400, 409, 422, 500), strict=True))
_PROBLEM: Final = "application/problem+json"  # RFC 9457


@dataclass(slots=True)
class _Answer:
    """A response of the application, held back until its transaction is committed."""

    status: int = 0
    headers: tuple[tuple[str, str], ...] = ()
    body: bytearray = field(default_factory=bytearray)

    async def take(self, part: MutableMapping[str, Any]) -> None:
        """Takes one message of the application."""
        if part["type"] == "http.response.start":
            self.status = part["status"]
            self.headers = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in part["headers"])
        elif part["type"] == "http.response.body":
            self.body += part.get("body", b"")

    def outcome(self) -> Outcome:
        """The answer as it is kept."""
        return Outcome(status=self.status, headers=self.headers, body=bytes(self.body))


class IdempotencyMiddleware:
    """Gives each request with an ``Idempotency-Key`` one effect and one answer.

    The handler works in ``request.scope["outboxkit.session"]``: its transaction holds the key, and is committed before
    the answer leaves. Answers below 400 are kept and given again; on any other the transaction is rolled back, so the
    request may be corrected and sent again under its key.

    Args:
        app: the ASGI application.
        sessions: an ``async_sessionmaker``.
        caller: tells callers apart, given the ASGI scope: keys of different callers never meet.
        methods: methods to which it applies.
        ttl: how long an answer is kept.
        wait: longest wait for a request under the same key that is under way.
        required: refuse requests of these methods without a key, with 400.
        max_body: bytes of a request's body; larger ones are refused with 413.
    """

    def __init__(
        self,
        app: App,
        *,
        sessions: async_sessionmaker[AsyncSession],
        caller: Callable[[Scope], str] = lambda _: "",
        methods: Collection[str] = ("POST", "PATCH"),
        ttl: timedelta | str = "24h",
        wait: timedelta | str = "5s",
        required: bool = False,
        max_body: int = 1 << 20,
    ) -> None:
        self._app, self._sessions, self._caller, self._required = app, sessions, caller, required
        self._methods, self._max_body = frozenset(methods), max_body
        self._ttl, self._wait = duration(ttl), duration(wait)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or scope["method"] not in self._methods:
            return await self._app(scope, receive, send)
        key = _header(scope, b"idempotency-key")
        if not key and not self._required:
            return await self._app(scope, receive, send)
        if not key:
            return await _problem(send, 400, "this request needs the header Idempotency-Key")
        body = await _read(receive, self._max_body)
        if body is None:
            return await _problem(send, 413, f"the body of this request has more than {self._max_body:,} bytes")
        try:
            outcome = await self._once(scope, key, body)
        except _REFUSALS as error:
            return await _problem(send, _STATUS[type(error)], error.message, retry_after=_retry_after(error))
        return await _send(send, outcome)

    async def _once(self, scope: Scope, key: str, body: bytes) -> Outcome:
        """The stored answer, or that of the application, committed with its effect."""
        name = f"{self._caller(scope)} {scope['method']} {scope['path']}".strip()
        request = scope["method"].encode() + b"\0" + scope.get("query_string", b"") + b"\0" + body
        async with self._sessions() as session, session.begin() as transaction:
            async with idempotent(session, key, scope=name, request=request, ttl=self._ttl, wait=self._wait) as call:
                if call.stored is not None:
                    stored = call.stored
                    return Outcome(status=stored.status, headers=(*stored.headers, _REPLAYED), body=stored.body)
                answer = _Answer()
                await self._app({**scope, SESSION: session}, _again(body), answer.take)
                outcome = answer.outcome()
                if outcome.status < 400:  # noqa: PLR2004  RFC 9110: errors begin there
                    call.finish(outcome)
            if outcome.status >= 400:  # noqa: PLR2004
                await transaction.rollback()
            return outcome


def _header(scope: Scope, name: bytes) -> str:
    found: str = next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")
    return found


async def _read(receive: Receive, limit: int) -> bytes | None:
    body = bytearray()
    while True:
        part = await receive()
        body += part.get("body", b"")
        if len(body) > limit:
            return None
        if not part.get("more_body"):
            return bytes(body)


def _again(body: bytes) -> Receive:
    """The request's body for the application, which has been read already."""
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> MutableMapping[str, Any]:
        return next(parts, {"type": "http.disconnect"})

    return receive


async def _send(send: Send, outcome: Outcome) -> None:
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in outcome.headers]
    await send({"type": "http.response.start", "status": outcome.status, "headers": headers})
    await send({"type": "http.response.body", "body": outcome.body})


async def _problem(send: Send, status: int, why: str, *, retry_after: int | None = None) -> None:
    body = json.dumps({"status": status, "detail": why}).encode()
    headers = [("content-type", _PROBLEM), ("content-length", str(len(body)))]
    if retry_after is not None:
        headers.append(("retry-after", str(retry_after)))
    await _send(send, Outcome(status=status, headers=tuple(headers), body=body))


def _retry_after(error: OutboxKitError) -> int | None:
    """Whole seconds, as HTTP has them."""
    return max(1, round(error.retry_after.total_seconds())) if isinstance(error, IdempotencyInProgress) else None
