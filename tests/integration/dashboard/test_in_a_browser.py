"""The page in a real Chromium: the way from a failure to its effect, barriers, and the pictures of the docs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.responses import HTMLResponse
from starlette.routing import Route

from tests.integration.dashboard.conftest import Shop, content, expect, looking, page_of, served
from tests.integration.relay.world import until
from tests.unit.relay.dashboard.world import furnish, plant

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.full

PICTURES = Path(__file__).parents[3] / "docs" / "_static" / "dashboard"
TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BARRIERS = "axe.run().then(found => found.violations.map(one => [one.id, one.impact, one.nodes.map(n => n.html)]))"
TOUR = {
    "overview": "/",
    "messages": "/messages",
    "trace": "/trace?q=order-9",
    "failures": "/failures",
    "replays": "/replays",
    "quarantine": "/quarantine",
    "sagas": "/sagas",
    "saga": "/sagas/show?saga=checkout&key=order-7",
    "control": "/control",
    "audit": "/audit",
    "nowhere": "/letters/none",
}


@pytest.fixture
def furnished(engine: Engine) -> Engine:
    with engine.begin() as connection:
        furnish(connection, letters=344)
    return engine


@pytest.mark.parametrize("script", [True, False], ids=["with the script", "without a script"])
def test_an_operator_finds_a_failure_reads_why_tries_one_and_replays_the_rest(
    chromium: Browser, shop: Shop, engine: Engine, *, script: bool
) -> None:
    shop.place(*range(6))
    with page_of(engine) as address, looking(chromium, script=script) as page:
        page.goto(address)
        until(lambda: "6 dead letters" in content(page))
        page.get_by_role("link", name="6 dead letters").click()
        page.get_by_role("link", name="KeyError").click()
        page.locator("a.row").first.click()
        expect(page.get_by_text("in charge").first).to_be_visible()  # where it failed: the handler's name
        page.get_by_role("button", name="Reveal and repair…").click()
        expect(page.get_by_label("Content, as text to repair")).to_contain_text('"number"')
        page.get_by_label("Content, as text to repair").fill('{"number": 99}')
        page.get_by_role("button", name="Check").click()
        expect(page.get_by_text("It is valid.")).to_be_visible()

        shop.is_mended = True
        page.goto(f"{address}/failures")
        page.get_by_role("link", name="KeyError").click()
        page.get_by_role("link", name="Replay all 6…").click()
        expect(page.get_by_text("6 letters can be replayed, 6 to billing")).to_be_visible()
        expect(page.get_by_text("billing is running")).to_be_visible()
        page.get_by_label("Why").fill("the handler knows the currency now")
        page.get_by_role("button", name="Replay 6 letters").click()
        if script:  # it looks again by itself
            expect(page.get_by_text("It is over.")).to_be_visible()
        else:
            until(lambda: "It is over." in content(page))

        expect(page.locator(".legend .good dd")).to_have_text("6")
        assert sorted(shop.handled) == list(range(6))
        page.get_by_role("link", name="Audit log").click()
        expect(page.get_by_text("the handler knows the currency now").first).to_be_visible()
        page.get_by_role("link", name="Overview").click()
        expect(page.get_by_text("Healthy")).to_be_visible()


def test_the_rest_is_not_sent_when_the_first_letter_dies_again(chromium: Browser, shop: Shop, engine: Engine) -> None:
    shop.place(*range(4))
    with page_of(engine) as address, looking(chromium) as page:
        until(lambda: "4 dead letters" in content(page, f"{address}/failures"))
        page.get_by_role("link", name="KeyError").click()
        page.get_by_role("link", name="Replay all 4…").click()
        page.get_by_label("Why").fill("hoping")
        page.get_by_role("button", name="Replay 4 letters").click()

        expect(page.get_by_text("It was stopped; 3 letters were not sent.")).to_be_visible()
        page.get_by_role("link", name="audit log", exact=True).click()
        expect(page.get_by_text("1 of the canary died again")).to_be_visible()
        assert shop.handled == []


def test_what_is_shown_is_kept_up_to_date_and_the_focus_stays(chromium: Browser, shop: Shop, engine: Engine) -> None:
    shop.place(1)
    with page_of(engine) as address, looking(chromium) as page:
        until(lambda: "1 dead letter" in content(page, address))
        link = page.get_by_role("link", name="1 dead letter")
        link.focus()

        shop.place(2)

        expect(page.get_by_role("link", name="2 dead letters")).to_be_focused()
        page.keyboard.press("/")
        expect(page.get_by_role("searchbox")).to_be_focused()


def test_hostile_text_runs_no_script_and_another_site_cannot_use_the_page(chromium: Browser, furnished: Engine) -> None:
    letter = plant(furnished)
    with page_of(furnished) as address, looking(chromium) as page:
        page.on("dialog", lambda _: pytest.fail("a script ran"))
        for path in (*TOUR.values(), f"/letters/{letter}", f"/replay?letter={letter}"):
            if path != TOUR["nowhere"]:
                page.goto(address + path)
                assert page.locator("main img, main script").count() == 0
        token = page.context.cookies()[0]["value"]

        trap = (
            f'<iframe src="{address}/"></iframe><form method="post" action="{address}/do/pause">'
            f'<input name="csrf" value="{token}"><input name="scope" value="destination">'
            '<input name="name" value="orders"><input name="why" value="x"><button>go</button></form>'
        )
        with served(Starlette(routes=[Route("/", lambda _: HTMLResponse(trap))])) as other:
            stranger = page.context.new_page()
            stranger.goto(other.replace("127.0.0.1", "localhost"))
            with stranger.expect_response(f"{address}/do/pause") as answered:
                stranger.get_by_role("button", name="go").click()
            assert answered.value.status == 403
            stranger.close()
        page.goto(f"{address}/control")
        expect(page.get_by_role("cell", name="orders", exact=True)).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_a_barrier_and_nothing_is_cut(chromium: Browser, furnished: Engine, axe: str, scheme: str) -> None:
    with page_of(furnished) as address:
        for width in (1300, 400, 320):
            with looking(chromium, width=width, scheme=scheme, may_complain=True) as page:
                for name, path in places(page, address).items():
                    page.goto(address + path)
                    for summary in page.locator("summary").all():
                        summary.click()
                    assert page.evaluate(TOO_WIDE) <= 0, (name, width)
                    page.evaluate(axe)
                    assert page.evaluate(BARRIERS) == [], (name, width)


def places(page: Page, address: str) -> dict[str, str]:
    """The tour, with a cause, a letter and a preflight of this database."""
    page.goto(f"{address}/failures")
    cause = page.locator("a.row").first.get_attribute("href") or ""
    page.goto(address + cause)
    letter = page.locator("a.row").first.get_attribute("href") or ""
    group = re.sub(r".*/", "", cause)
    return {**TOUR, "group": cause, "letter": letter, "preflight": f"/replay?group={group}&limit=100"}


@pytest.mark.parametrize(("scheme", "width"), [("light", 1300), ("light", 400), ("dark", 1300), ("dark", 400)])
def test_the_pictures_of_the_documentation(
    chromium: Browser, furnished: Engine, tmp_path: Path, *, scheme: str, width: int
) -> None:
    """They are taken anew here; ``OUTBOXKIT_TEST_PICTURES=docs`` puts those that the documentation shows there."""
    folder = PICTURES if os.environ.get("OUTBOXKIT_TEST_PICTURES") == "docs" else tmp_path
    with page_of(furnished) as address, looking(chromium, width=width, scheme=scheme) as page:
        for name, path in places(page, address).items():
            if name != "nowhere":
                page.goto(address + path)
                picture = tmp_path / f"{name}.{scheme}.{width}.png"
                page.screenshot(path=picture)
                assert picture.stat().st_size > 5_000
                if folder == PICTURES and (PICTURES / picture.name).exists():
                    picture.replace(PICTURES / picture.name)
