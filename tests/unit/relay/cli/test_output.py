"""Tables, ages and questions."""

from __future__ import annotations

import io
import os
import shutil
from datetime import timedelta

import click
import pytest

from outboxkit.errors import ConfigurationError
from outboxkit_relay.cli.console import output


def test_what_people_copy_is_never_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["k" * 50, "too large"], ["short", "x" * 100]]

    monkeypatch.setenv("COLUMNS", "70")
    output.table(["KEY", "ERROR"], rows, whole=("KEY",))
    assert [len(line) for line in capsys.readouterr().out.splitlines()] == [57, 61, 70]

    monkeypatch.setenv("COLUMNS", "58")
    output.table(["KEY", "ERROR"], rows, whole=("KEY",))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 58
    assert said.startswith(f"key    {'k' * 50}\nerror  too large\n\nkey    short\nerror  ")


def test_lines_are_wrapped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    output.lines("short\n  fix: add a default or an alias\n")
    assert capsys.readouterr().out == "short\n  fix: add a default or an alias\n"

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    output.lines("short\n  fix: add a default or an alias\n")
    assert capsys.readouterr().out == "short\n  fix: add a default\n    or an alias\n"


def test_a_verdict_goes_on_below_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)

    output.verdict("STUCK", "nobody publishes anything", "red")

    assert click.unstyle(capsys.readouterr().out) == "STUCK  nobody\n       publishes\n       anything\n"


@pytest.mark.parametrize("width", ["80", "140"])
def test_a_table_fits_the_terminal_and_keeps_one_line_a_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str
) -> None:
    monkeypatch.setenv("COLUMNS", width)

    output.table(["ID", "ERROR"], [["1", "x" * 500], ["2", "short"]])

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) == int(width)
    assert lines[1].endswith("…")
    assert lines[2] == "2   short"


def test_a_table_that_is_no_terminals_is_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", os.terminal_size)

    output.table(["ERROR"], [["x" * 500]])

    assert "x" * 500 in capsys.readouterr().out


def test_cells_cannot_command_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["KEY"], [["\x1b[31mred\nnext\u202e"]])
    output.field("key", "\x9b1m")

    out = capsys.readouterr().out
    assert "\\x1b[31mred\\nnext\\u202e" in out
    assert "\\x9b1m" in out
    assert not [character for character in out.replace("\n", "") if not character.isprintable()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0.0s"),
        (0.42, "0.4s"),
        (9.94, "9.9s"),
        (30, "30s"),
        (372, "6m12s"),
        (60, "1m"),
        (7_380, "2h3m"),
        (273_600, "3d4h"),
    ],
)
def test_an_age_is_said_as_people_say_it(seconds: float, text: str) -> None:
    assert output.ago(timedelta(seconds=seconds)) == text


def test_nobody_is_asked_where_nobody_can_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))

    with pytest.raises(ConfigurationError, match="--yes"):
        output.confirmed("Replay 3 messages?", yes=False)


def test_yes_needs_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))

    assert output.confirmed("Replay 3 messages?", yes=True)
