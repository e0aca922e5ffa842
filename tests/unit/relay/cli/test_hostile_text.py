"""Text that somebody else chose stays one inert line in every listing: it neither commands a terminal nor hides."""

from __future__ import annotations

import unicodedata

import pytest
from sqlalchemy import Engine, select

from outboxkit import tables
from outboxkit_relay import words
from outboxkit_relay.cli.console import output
from tests.unit.relay.cli.builders import bury, stop_key
from tests.unit.relay.cli.conftest import Outboxkit

HOSTILE = {
    "terminal": "\x1b]0;title\x07\x1b[2J",
    "c1": "\x9b31m",
    "lines": "one\ntwo\r\nthree\u2028four\x0bfive",
    "bidi": "\u202egnp.exe\u2066\u2069\u061c",
    "invisible": "a\u200bb\u2060c\ufeffd\u00ade\u180ef\u2800g\u3164h\u115fi\ufe0fj\U000e0041k\U000e0101l",
    "private": "\ue000\U0010fffd",
    "unassigned": "\u0378\U0003ffff",
    "stack": "Z" + "\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307" * 3,
    "formula": "=1+1\t@SUM",
    "html": "<script>alert(1)</script>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_shown_can_be_seen_and_stands_in_one_line(name: str) -> None:
    shown = output.safe(HOSTILE[name])

    assert not [character for character in shown if unicodedata.category(character) in words._INVISIBLE]
    assert not set(shown) & words._IGNORABLE
    assert "\n" not in shown
    marks = 0
    for character in shown:
        marks = marks + 1 if unicodedata.combining(character) else 0
        assert marks <= 3


@pytest.mark.parametrize("text", ["order 7", "Bestellung für Zoë", "注文", "e\u0301te\u0301", "שלום", "🙂"])
def test_what_people_write_stays_as_it_is(text: str) -> None:
    assert output.safe(text) == text


def test_two_texts_that_look_alike_are_shown_differently() -> None:
    assert output.safe("pay\u200bment") != output.safe("payment")


@pytest.mark.parametrize("name", HOSTILE)
def test_every_listing_keeps_hostile_fields_in_its_line(outboxkit: Outboxkit, engine: Engine, name: str) -> None:
    letter, text = bury(engine), HOSTILE[name]
    stop_key(engine, text.encode("utf-8", "surrogatepass"))
    letters = tables.dead_letters
    fields = dict.fromkeys(("type", "topic", "error", "error_class", "source", "origin", "path"), text)
    with engine.begin() as connection:
        values = {**fields, "key": text.encode(), "consumer": text, "details": {"chain": [text], "places": [text]}}
        connection.execute(letters.update().values(**values))
        connection.execute(tables.outbox_stopped_keys.update().values(topic=text))
        connection.execute(tables.outbox_waiting.update().values(topic=text, error=text))
        assert connection.scalar(select(letters.c.type)) == text

    commands = (
        ["dlq", "list"], ["dlq", "list", "--json"], ["dlq", "groups"], ["dlq", "groups", "--json"],
        ["dlq", "show", str(letter.id)], ["dlq", "explain", str(letter.id)], ["quarantine", "list"], ["status"],
        ["dlq", "replay", "--all", "--dry-run"], ["dlq", "discard", "--all", "--dry-run", "--why", "x"],
    )  # fmt: skip
    for command in commands:
        done = outboxkit(*command)
        hidden = [one for one in done.out + done.err if one != "\n" and unicodedata.category(one) in words._INVISIBLE]
        assert not hidden, (command, hidden)
    assert len(outboxkit("dlq", "list").out.splitlines()) == 2
