"""The page is safe before anybody configures it, and a request that another site has made changes nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Mount
from starlette.testclient import TestClient

from outboxkit import tables
from outboxkit.outbox import pauses
from outboxkit_relay.dashboard import Access, Visitor, dashboard
from outboxkit_relay.dashboard.access import COOKIE, FIELD, level_of
from outboxkit_relay.dashboard.actions import ACTIONS
from tests.conftest import PROFILE
from tests.unit.relay.dashboard.odd_values import outages
from tests.unit.relay.dashboard.world import HERE, HOSTILE, Browser, plant, rows

CHANGED = [table for table in tables.METADATA.sorted_tables if table.name != "outbox_version"]
PAGES = ["/", "/messages", "/trace?q=order-7", "/failures", "/replays", "/quarantine", "/sagas", "/control", "/audit"]
FROM_HERE = {"origin": HERE, "sec-fetch-site": "same-origin"}


def everything(engine: Engine) -> dict[str, Any]:
    return {table.name: rows(engine, table) for table in CHANGED}


def forms(browser: Browser) -> dict[str, dict[str, str]]:
    """A form for each action, with which it would change something."""
    with browser.engine.connect() as connection:
        letter = str(connection.execute(select(tables.dead_letters.c.id).limit(1)).scalar_one())
        group = connection.execute(select(tables.dead_letters.c.group).limit(1)).scalar_one()
        scheduled = tables.outbox_waiting.c.reason == "scheduled"
        message = str(connection.execute(select(tables.outbox_waiting.c.message_id).where(scheduled)).scalar_one())
    key = {"topic": "orders", "key": b"order-9".hex(), "position": "77"}
    pause = {"scope": "destination", "name": "invoices", "why": "x"}
    saga = {"saga": "checkout", "key": "order-7"}
    known = {
        "cancel": {"message": message, "why": "x"},
        "compensate": saga,
        "discard": {"ids": letter, "why": "x"},
        "note": {"group": group, "note": "x"},
        "pause": {**pause, "name": "orders"},
        "release": key,
        "repair": {"letter": letter, "text": "{}", "step": "send"},
        "replay": {"number": str(uuid4()), "ids": letter},
        "resume": pause,
        "resume-saga": saga,
        "reveal": {"letter": letter},
        "skip": key,
    }
    return {name: known.get(name, {"number": str(uuid4())}) for name in ACTIONS}


@pytest.mark.parametrize("action", ACTIONS)
def test_a_forged_form_changes_nothing(furnished: Engine, action: str) -> None:
    """Each request has one fault; that none has two is seen in the test of each action."""
    browser = Browser(furnished)
    browser.get("/")
    token, form = browser.client.cookies[COOKIE], forms(browser)[action]
    before = everything(furnished)

    answers = {
        "no token": browser.client.post(f"/do/{action}", data=form, headers=FROM_HERE),
        "a foreign token": browser.client.post(f"/do/{action}", data={**form, FIELD: "x" * 43}, headers=FROM_HERE),
    }
    good = {**form, FIELD: token}
    for name, headers in {
        "another site": {"origin": "https://evil.example", "sec-fetch-site": "cross-site"},
        "another origin, an old browser": {"origin": "https://evil.example"},
        "an opaque origin": {"origin": "null"},
        "another port": {"origin": "http://127.0.0.1:9"},
        "a sister site": {"origin": HERE, "sec-fetch-site": "same-site"},
        "no origin": {},
        "a rebound name": {**FROM_HERE, "host": "evil.example", "origin": "http://evil.example"},
    }.items():
        answers[name] = browser.client.post(f"/do/{action}", data=good, headers=headers)
    answers["GET"] = browser.client.get(f"/do/{action}", params=good, headers=FROM_HERE)

    assert {
        name: answer.status_code for name, answer in answers.items() if answer.status_code not in (403, 405, 421)
    } == {}
    assert everything(furnished) == before


@pytest.mark.parametrize("action", ACTIONS)
def test_who_may_not_changes_nothing(furnished: Engine, action: str) -> None:
    form = forms(Browser(furnished))[action]
    before = everything(furnished)

    for access in Access:
        if access < level_of(action):
            browser = Browser(furnished, access)
            browser.get("/")
            answer = browser.client.post(
                f"/do/{action}", data={**form, FIELD: browser.client.cookies[COOKIE]}, headers=FROM_HERE
            )
            assert answer.status_code == 403
            assert f"this takes {level_of(action).name.lower()}" in answer.text
    unknown = TestClient(dashboard(furnished, access=lambda _: None), base_url=HERE)
    assert unknown.post(f"/do/{action}", data=form, headers=FROM_HERE).status_code == 401

    assert everything(furnished) == before


def test_what_reveals_or_ends_something_takes_all() -> None:
    levels = {action: level_of(action) for action in ACTIONS}

    assert min(levels.values()) == Access.OPERATE
    assert {action for action, level in levels.items() if level == Access.ALL} == {
        "cancel", "compensate", "discard", "repair", "reveal", "skip",
    }  # fmt: skip


def test_without_a_resolver_this_machine_may_read_and_nobody_else_anything(furnished: Engine) -> None:
    app = dashboard(furnished)
    here, elsewhere = (TestClient(app, base_url=HERE, client=(host, 1)) for host in ("127.0.0.1", "10.1.2.3"))

    assert here.get("/").status_code == 200
    assert "may read" in here.get("/").text
    assert elsewhere.get("/").status_code == 401
    form = {"scope": "destination", "name": "orders", "why": "x", FIELD: here.cookies[COOKIE]}
    assert here.post("/do/pause", data=form, headers=FROM_HERE).status_code == 403


def test_a_name_of_another_site_is_not_answered(furnished: Engine) -> None:
    def look(host: str, *allowed: str) -> int:
        app = dashboard(furnished, access=lambda _: Visitor(name="ana"), hosts=allowed)
        return TestClient(app, base_url=f"http://{host}").get("/").status_code

    assert look("evil.example") == 421
    assert look("127.0.0.1.evil.example") == 421
    for odd in ("[::1", "127.0.0.1:abc", "127.0.0.1:0", "]", "::1]"):
        headers = {"host": odd}
        app = dashboard(furnished, access=lambda _: Visitor(name="ana"))
        assert TestClient(app, base_url=HERE).get("/", headers=headers).status_code == 421, odd
    assert look("localhost:8080") == look("[::1]:8080") == look("127.0.0.1") == 200
    assert look("ops.example.org", "ops.example.org") == look("ops.example.org:8443", "ops.example.org") == 200


def test_a_resolver_may_be_a_coroutine_function_and_the_page_a_part_of_another_application(furnished: Engine) -> None:
    async def who(request: Request) -> Visitor | None:
        name = request.headers.get("x-user")
        return Visitor(name=name, access=Access.OPERATE) if name else None

    app = Starlette(routes=[Mount("/outbox", dashboard(furnished, access=who))])
    client = TestClient(app, base_url=HERE, headers={"x-user": "ben"})

    text = client.get("/outbox/").text
    links = set(re.findall(r'(?:href|src|action)="(/[^"]*)"', text))
    assert links
    assert not [link for link in links if not link.startswith("/outbox/")]
    assert all(client.get(link).status_code == 200 for link in links if "/do/" not in link)
    form = {"scope": "type", "name": "order.placed", "why": "x", FIELD: client.cookies[COOKIE]}
    done = client.post("/outbox/do/pause", data=form, headers=FROM_HERE)
    assert done.url.path == "/outbox/control"
    with furnished.connect() as connection:
        assert ("order.placed", "ben") in {(one.target.name, one.by) for one in pauses.pauses(connection)}


@pytest.mark.parametrize(
    "path", [*PAGES, "/static/page.css", "/static/page.js", "/nowhere", "/letters/none", "/do/none"]
)
def test_each_answer_forbids_what_the_page_does_not_need(browser: Browser, path: str) -> None:
    answer = browser.client.get(path)

    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "form-action 'self'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-frame-options"] == "DENY"
    assert answer.headers["cache-control"] == ("no-cache" if path.startswith("/static/") else "no-store")
    assert answer.headers["referrer-policy"] == "same-origin"


def test_the_cookie_is_for_this_page_and_no_script(browser: Browser) -> None:
    cookie = browser.client.get("/").headers["set-cookie"].lower()

    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_a_form_has_a_bound(browser: Browser) -> None:
    answer = browser.send("repair", letter=str(uuid4()), text="x" * 1_000_001)

    assert answer.status_code == 413


def test_no_value_of_an_address_a_field_or_a_header_is_an_outage(furnished: Engine) -> None:
    assert outages(furnished, every=1 if PROFILE == "full" else 23) == []


# --- hostile text ------------------------------------------------------------------------------------------------


class _Seen(HTMLParser):
    """Elements of a page, with what would run a script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.dangerous: list[tuple[str, str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            text = (value or "").strip().lower()
            if name.startswith("on") or name == "style" or text.startswith(("javascript:", "data:")):
                self.dangerous.append((tag, name, text))


def seen(text: str) -> _Seen:
    found = _Seen()
    found.feed(text)
    return found


def test_hostile_text_is_shown_and_nothing_more(browser: Browser) -> None:
    letter = plant(browser.engine)
    group = rows(browser.engine, tables.dead_letter_groups)[-1]["group"]
    addresses = [
        *PAGES,
        f"/letters/{letter}",
        f"/failures/{group}",
        f"/replay?letter={letter}",
        f"/replay?group={group}",
    ]
    addresses += [
        "/sagas/show?saga=checkout&key=order-7",
        f"/messages?q={'%3Cscript%3E'}",
        "/sagas/show?saga=%3Cscript%3E",
    ]
    addresses += ["/messages?q=%22%3E%3Cscript%3E%20topic:%22%3Cimg%22", "/?done=%3Cscript%3E"]
    texts = {address: browser.client.get(address).text for address in addresses}
    texts["reveal"] = browser.press(f"/letters/{letter}", "reveal").text
    texts["repair"] = browser.send("repair", **browser.fields(f"/letters/{letter}", "reveal"), text=HOSTILE).text

    for address, text in texts.items():
        found = seen(text)
        assert found.dangerous == [], address
        assert found.tags.count("script") == 1, address
        assert "img" not in found.tags, address
        assert "style" not in found.tags, address
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text), address
        assert "{{ 7*7 }}" in text or HOSTILE not in text, address
        assert "49" not in text or "7*7" in text or address == "/", address
    assert sum("alert(1)" in text for text in texts.values()) >= 10, "void: the text was not shown"


# --- payloads ----------------------------------------------------------------------------------------------------


def test_payloads_and_foreign_headers_are_masked_on_every_page(browser: Browser) -> None:
    letter = str(rows(browser.engine, tables.dead_letters)[0]["id"])
    group = rows(browser.engine, tables.dead_letters)[0]["group"]

    for address in (
        *PAGES,
        f"/letters/{letter}",
        f"/failures/{group}",
        f"/replay?letter={letter}",
        f"/replay?group={group}",
    ):
        text = browser.get(address)
        assert "EUR" not in text, address
        assert "ana@example.org" not in text, address


def test_whoever_reveals_is_in_the_audit_log_each_time(browser: Browser) -> None:
    letter = str(rows(browser.engine, tables.dead_letters)[0]["id"])

    for _ in range(2):
        shown = browser.press(f"/letters/{letter}", "reveal").text
        assert "EUR" in shown
        assert "ana@example.org" in shown

    told = [
        (row["who"], row["target"])
        for row in rows(browser.engine, tables.outbox_audit)
        if row["action"] == "dlq.reveal"
    ]
    assert told == [("ana", letter)] * 2
    assert "EUR" not in browser.get(f"/letters/{letter}")
