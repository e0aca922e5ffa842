"""What the page is made of: small, ours alone, and readable in both colour schemes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sqlalchemy import Engine

import outboxkit_relay.dashboard
from outboxkit import tables
from outboxkit_relay.dashboard import charts
from outboxkit_relay.dashboard.setup import History
from tests.unit.relay.dashboard.world import Browser, bury, rows

FOLDER = Path(outboxkit_relay.dashboard.__file__).parent
STYLE = (FOLDER / "static" / "page.css").read_text()
TEXTS = [
    ("ink", "panel"), ("ink", "ground"), ("dim", "panel"), ("dim", "ground"), ("accent", "panel"), ("accent", "ground"),
    ("on-accent", "accent"), ("good", "panel"), ("bad", "panel"), ("bad", "ground"), ("warn", "panel"),
    ("good", "good-ground"), ("warn", "warn-ground"), ("bad", "bad-ground"),
]  # fmt: skip


def schemes() -> dict[str, dict[str, str]]:
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    return {
        name: dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", text)) for name, text in (("light", light), ("dark", dark))
    }


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_computation_is_right() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(scheme: str) -> None:
    colours = schemes()[scheme]

    found = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in TEXTS}
    assert {pair: ratio for pair, ratio in found.items() if ratio < 4.5} == {}


def test_both_schemes_have_the_same_colours_and_no_other_is_used() -> None:
    light, dark = schemes()["light"], schemes()["dark"]

    assert light.keys() == dark.keys()
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE)) == set(light)
    assert not re.findall(r"#[0-9a-f]{3,6}\b", STYLE.partition("*, *::before")[2])


def test_nothing_comes_from_elsewhere_and_nothing_stands_inline() -> None:
    for file in FOLDER.rglob("*.*"):
        if file.suffix in {".html", ".css", ".js"}:
            text = file.read_text()
            assert not re.search(r"(?:https?:)?//\w+\.|@import|url\(", text), file
            assert not re.search(r"\sstyle=|\son\w+=|<style|javascript:|\beval\(|innerHTML", text), file
            assert "|safe" not in text, file
    assert [file.name for file in (FOLDER / "static").glob("*.js")] == ["page.js"]


def test_a_visit_is_small(furnished: Engine) -> None:
    """All bytes of a first visit, uncompressed: a compressed page would tell its token to who can guess along."""
    with furnished.begin() as connection:
        for at in range(100):
            bury(connection, offset=2000 + at)
    browser = Browser(furnished)
    group, letter = (str(rows(furnished, tables.dead_letters)[-1][name]) for name in ("group", "id"))
    static = sum(file.stat().st_size for file in (FOLDER / "static").iterdir())

    sizes = {
        path: static + len(browser.get(path).encode())
        for path in ("/", "/messages", f"/failures/{group}", f"/letters/{letter}", f"/replay?group={group}&limit=100")
    }

    assert {path: size for path, size in sizes.items() if size > 60_000} == {}


def test_a_line_is_drawn_of_numbers_alone() -> None:
    assert charts.sparkline([]).count("points=") == 2
    assert charts.sparkline([1.0]).count("points=") == 2
    assert 'points="0.0,41.0 120.0,22.0 240.0,3.0"' in charts.sparkline([0, 1, 2])
    assert "nan" not in charts.sparkline([0.0, 0.0])
    assert charts.share([("good", 1), ("bad", 3)]).count("<rect") == 2
    assert charts.share([("good", 0)]).count('width="0.00"') == 1


def test_many_visitors_do_not_make_time_run_faster() -> None:
    now = [0.0]
    history = History(clock=lambda: now[0])
    for at in range(400):
        now[0] = at * 0.5
        history.add(at, 0.0)

    assert len(history.pending) == 100
    assert history.pending[-1] == 399
