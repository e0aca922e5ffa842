"""Values that nobody types, for every field and address of the page: none of them is an outage, or a fault of ours."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from sqlalchemy import Engine
from starlette.testclient import TestClient

from outboxkit import tables
from outboxkit_relay.dashboard import Access, Visitor, dashboard
from outboxkit_relay.dashboard.access import COOKIE, FIELD
from outboxkit_relay.dashboard.actions import ACTIONS
from tests.unit.relay.dashboard.world import HERE, rows

__all__ = ["outages"]

LONG = ("9" * 5_000, "x" * 20_000, "\u20ac" * 2_000)
NUMBERS = (
    "0", "-1", "1.5", "nan", "inf", "1e400", "\u0661", "00", "0g",
    str(2**31), str(2**63), str(-(2**63) - 1), str(10**30),
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "\\x00", "\\xzz", "\x1b[2J", "\u202e", "\U0010ffff", "'", '"', "%", "%s", ":name", "{0}",
    "<b>",
)  # fmt: skip
NONE = "018f0000-0000-7000-8000-000000000000"
VALUES = (*TEXTS, *NUMBERS, *LONG, NONE, f"{{{NONE}}}", f"{NONE} x", "999999999999d", "-1h", "1ms")
TERMS = ("", "id:", "key:", "topic:", "type:", "state:", "age:", "age:>", "none:")
ADDRESSES = (
    "/messages/{}", "/failures/{}", "/letters/{}", "/replays/{}", "/replay?group={}", "/replay?letter={}",
    "/replay?letter=LETTER&limit={}", "/replay?letter=LETTER&force={}", "/trace?q={}", "/sagas?status={}",
    "/sagas/show?saga={}&key=order-7", "/sagas/show?saga=checkout&key={}", "/?done={}", "/{}", "/static/{}",
    "/?done=discarded&number={}&left={}", *(f"/messages?q={quote(term)}{{}}" for term in TERMS),
)  # fmt: skip
FROM_HERE = {"origin": HERE, "sec-fetch-site": "same-origin"}
STOP = {"topic": "orders", "key": "00", "position": "1"}
FORMS: dict[str, dict[str, str]] = {
    "cancel": {"message": NONE, "why": "x"},
    "compensate": {"saga": "checkout", "key": "order-7", "why": "x"},
    "discard": {"ids": NONE, "why": "x"},
    "go-on": {"number": NONE, "rate": "1", "canary": "1", "why": "x"},
    "note": {"group": "GROUP", "note": "x", "owner": "y"},
    "pause": {"scope": "key", "name": "orders", "key": "k", "why": "x", "lasts": "1h"},
    "release": STOP,
    "repair": {"letter": "LETTER", "text": "{}", "step": "check", "why": "x"},
    "replay": {"number": NONE, "ids": NONE, "rate": "1", "canary": "1", "force": "on", "why": "x"},
    "resume": {"scope": "destination", "name": "orders", "why": "x"},
    "resume-saga": {"saga": "checkout", "key": "order-7", "why": "x"},
    "reveal": {"letter": "LETTER"},
    "skip": STOP,
    "stop": {"number": NONE, "why": "x"},
}
HEADS = (
    {"host": "[::1"}, {"host": "127.0.0.1:abc"}, {"host": "127.0.0.1:99999999"}, {"host": "]"}, {"host": ""},
    {"origin": "http://[::1"}, {"origin": ""}, {"origin": "\xff"}, {"cookie": f"{COOKIE}=\xff"}, {"cookie": "=;=;\xff"},
    {"sec-fetch-site": "\xff"}, {"x-fragment": "\xff"}, {"content-type": "\xff"}, {"host": "a b"},
)  # fmt: skip


def outages(engine: Engine, *, every: int = 1) -> list[tuple[int, str]]:
    """Everything that the page answers to with its own fault, or with that of the database: should be nothing.

    Args:
        engine: over a furnished database.
        every: of so many requests one is made; no multiple of the number of `VALUES`, so that each value is tried.
    """
    app = dashboard(engine, access=lambda _: Visitor(name="ana", access=Access.ALL))
    letters = rows(engine, tables.dead_letters)
    names = {"LETTER": str(letters[0]["id"]), "GROUP": str(letters[0]["group"])}
    found = []
    with TestClient(app, base_url=HERE, raise_server_exceptions=False, follow_redirects=False) as client:
        client.get("/")
        requests = [*_looks(names), *_changes(names, client.cookies[COOKIE])]
        for request in [*requests[::every], *_heads()]:
            answer = client.request(**request)
            if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
                found.append((answer.status_code, f"{request['method']} {request['url'][:90]} {request.get('data')}"))
    return found


def _looks(names: dict[str, str]) -> Iterator[dict[str, Any]]:
    for address in ADDRESSES:
        for value in VALUES:
            url = address.replace("LETTER", names["LETTER"]).replace("{}", quote(value, safe=""))
            yield {"method": "GET", "url": url}


def _changes(names: dict[str, str], token: str) -> Iterator[dict[str, Any]]:
    for action in ACTIONS:
        usual = {name: names.get(value, value) for name, value in FORMS[action].items()}
        for name in usual:
            for value in VALUES:
                form = {**usual, name: value, FIELD: token}
                yield {"method": "POST", "url": f"/do/{action}", "data": form, "headers": FROM_HERE}


def _heads() -> Iterator[dict[str, Any]]:
    for head in HEADS:
        headers = {name: value.encode("latin-1") for name, value in head.items()}
        yield {"method": "GET", "url": "/", "headers": headers}
        yield {"method": "POST", "url": "/do/pause", "headers": headers}
