"""The middleware for HTTP, driven as a server drives it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from outboxkit.idempotency import SESSION, IdempotencyMiddleware
from tests.consumer_fixture import Effect, create_tables
from tests.sqlite_template import copied
from tests.unit.idempotency.orders import effects


class Shop:
    """An application whose answer depends on the body: ``ok``, ``wrong``, or ``broken``."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.calls += 1
        body = (await receive())["body"]
        scope[SESSION].add(Effect(message_id="m", number=1))
        if body == b"broken":
            raise RuntimeError
        status = 422 if body == b"wrong" else 201
        await send({"type": "http.response.start", "status": status, "headers": [(b"x-order", b"7")]})
        await send({"type": "http.response.body", "body": b'{"id":', "more_body": True})
        await send({"type": "http.response.body", "body": b" 7}"})


class Client:
    def __init__(self, shop: Shop, engine: AsyncEngine, **options: Any) -> None:
        self.app = IdempotencyMiddleware(shop, sessions=async_sessionmaker(engine), **options)

    async def post(self, body: bytes, key: str = "", method: str = "POST") -> tuple[int, dict[str, str], bytes]:
        parts: Iterator[MutableMapping[str, Any]] = iter([
            {"type": "http.request", "body": body[:1], "more_body": True},
            {"type": "http.request", "body": body[1:]},
        ])
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> MutableMapping[str, Any]:
            return next(parts)

        async def send(part: MutableMapping[str, Any]) -> None:
            sent.append(part)

        headers = [(b"idempotency-key", key.encode())] if key else []
        scope = {"type": "http", "method": method, "path": "/orders", "query_string": b"", "headers": headers}
        await self.app(scope, receive, send)
        found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], found, b"".join(part["body"] for part in sent[1:])


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    url = copied(tmp_path / "keys.db", create_tables)
    found = create_async_engine(url.replace("sqlite", "sqlite+aiosqlite", 1))
    yield found
    await found.dispose()


def counted(engine: AsyncEngine) -> int:
    plain: Engine = create_engine(engine.url.set(drivername="sqlite"))
    try:
        return effects(plain)
    finally:
        plain.dispose()


async def test_the_same_answer_comes_again_and_says_so(engine: AsyncEngine) -> None:
    shop = Shop()
    client = Client(shop, engine)

    first, second = await client.post(b"ok", "k"), await client.post(b"ok", "k")

    assert first == (201, {"x-order": "7"}, b'{"id": 7}')
    assert second == (201, {"x-order": "7", "idempotency-replayed": "true"}, b'{"id": 7}')
    assert (shop.calls, counted(engine)) == (1, 1)


async def test_a_wrong_request_has_no_effect_and_may_be_corrected(engine: AsyncEngine) -> None:
    client = Client(Shop(), engine)

    assert (await client.post(b"wrong", "k"))[0] == 422
    assert counted(engine) == 0
    assert (await client.post(b"ok", "k"))[0] == 201
    assert counted(engine) == 1


async def test_a_request_that_breaks_has_no_effect_and_may_be_repeated(engine: AsyncEngine) -> None:
    client = Client(Shop(), engine)

    with pytest.raises(RuntimeError):
        await client.post(b"broken", "k")

    assert counted(engine) == 0
    assert (await client.post(b"ok", "k"))[0] == 201


async def test_another_body_under_the_same_key_is_a_422(engine: AsyncEngine) -> None:
    client = Client(Shop(), engine)
    await client.post(b"ok", "k")

    status, headers, body = await client.post(b"ok!", "k")

    assert (status, headers["content-type"]) == (422, "application/problem+json")
    assert "another request came under this idempotency key" in json.loads(body)["detail"]


async def test_a_key_may_be_required_and_a_body_has_a_bound(engine: AsyncEngine) -> None:
    client = Client(Shop(), engine, required=True, max_body=3)

    assert (await client.post(b"ok"))[0] == 400
    assert (await client.post(b"okay", "k"))[0] == 413
    assert (await client.post(b"ok", "x" * 300))[0] == 400
    assert counted(engine) == 0


async def test_callers_do_not_share_keys(engine: AsyncEngine) -> None:
    shop = Shop()
    callers = iter(["ana", "ben"])
    client = Client(shop, engine, caller=lambda _: next(callers))

    await client.post(b"ok", "k")
    await client.post(b"ok", "k")

    assert shop.calls == 2
