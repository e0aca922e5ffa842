"""What the demo shows fits the terminal; where there is none, nothing is wrapped or coloured."""

from __future__ import annotations

import re

import pytest

from outboxkit_relay.demo.screen import Screen

LONG = "a second relay took over: 99 of 100 orders are confirmed, one message cannot be read, and so it goes on"
FACTS = {"placed": 200, "published": 800, "redelivered": 7, "duplicates caught": 7, "handled": 800, "replayed": 1}


def _tell(screen: Screen) -> None:
    screen.say(3.2, LONG)
    screen.show("outboxkit dlq", f"{LONG}\nshort")
    screen.say(3.5, "next")
    screen.say_facts(FACTS)
    screen.say_verdict("✓", LONG)


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_no_line_is_longer_than_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")

    _tell(Screen(quiet=False))

    lines = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= columns
    assert (len(lines) > 11) is (columns < 140)
    assert "duplicates caught 7" in " ".join(lines)


def test_without_a_terminal_a_line_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    screen = Screen(quiet=False)
    with screen.watching(lambda: {"placed": 1}, 2):
        _tell(screen)

    facts = "placed 200   published 800   redelivered 7   duplicates caught 7   handled 800   replayed 1"
    shown = f"\n  $ outboxkit dlq\n  {LONG}\n  short\n"
    assert capsys.readouterr().out == f"  3.2 s  {LONG}\n{shown}\n  3.5 s  next\n\n{facts}\n✓ {LONG}\n"


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    _tell(Screen(quiet=True))

    assert capsys.readouterr().out == ""


def test_bars_follow_the_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    done = {"placed": 0, "confirmed": 0}

    with Screen(quiet=False).watching(lambda: done, 20):
        done = {"placed": 20, "confirmed": 19}

    shown = capsys.readouterr().out
    assert "20/20" in shown
    assert "19/20" in shown
