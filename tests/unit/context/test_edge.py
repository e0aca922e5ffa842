"""A conversation begins at the edge, and the caller can quote it."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any
from uuid import UUID

import pytest

from outboxkit import context
from outboxkit.context.edge import CorrelationMiddleware, correlating


async def ask(given: str | None, **options: Any) -> tuple[str, str]:
    """The id that the application saw, and the one in the answer."""
    seen, sent = [], []

    async def app(_scope: MutableMapping[str, Any], _receive: Any, send: Any) -> None:
        seen.append(context.correlation_id())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b""})

    async def send(part: MutableMapping[str, Any]) -> None:
        sent.append(part)

    headers = [] if given is None else [(b"x-correlation-id", given.encode())]
    await CorrelationMiddleware(app, **options)({"type": "http", "headers": headers}, None, send)  # type: ignore[arg-type]
    return seen[0], dict(sent[0]["headers"])[b"x-correlation-id"].decode()


def ask_wsgi(given: str | None) -> tuple[str, str]:
    seen: list[str] = []
    told: dict[str, str] = {}

    def app(_environ: Any, start: Any) -> Iterable[bytes]:
        start("200 OK", [("a", "b")])
        seen.append(context.correlation_id())
        yield b""

    def start(_status: str, headers: list[tuple[str, str]], *_: Any) -> Any:
        told.update(headers)

    environ = {} if given is None else {"HTTP_X_CORRELATION_ID": given}
    assert list(correlating(app)(environ, start)) == [b""]
    return seen[0], told["x-correlation-id"]


async def test_a_callers_id_goes_through_and_comes_back() -> None:
    assert await ask("checkout-42") == ("checkout-42", "checkout-42")
    assert ask_wsgi("checkout-42") == ("checkout-42", "checkout-42")


@pytest.mark.parametrize("given", [None, "", "x" * 129, "a b", "a\r\nset-cookie: b", "\x1b[2J"])
async def test_without_an_id_that_can_be_taken_there_is_a_new_one(given: str | None) -> None:
    for seen, told in (await ask(given), ask_wsgi(given)):
        assert str(UUID(seen)) == seen == told


async def test_the_id_of_a_stranger_is_not_taken() -> None:
    seen, _ = await ask("checkout-42", trust=False)

    assert seen != "checkout-42"


async def test_nothing_is_left_behind() -> None:
    await ask("checkout-42")
    ask_wsgi("checkout-42")

    assert context.correlation_id() == ""
