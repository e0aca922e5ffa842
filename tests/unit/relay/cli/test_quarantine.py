"""Stopped keys on the command line: looking, asking, recording. What the relay makes of it has its own tests."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import Engine, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.consumer import quarantine
from outboxkit.inbox import held
from tests.unit.relay.cli.builders import STOPPED, hold_key, requests_of, stop_key
from tests.unit.relay.cli.conftest import Outboxkit


def _audit(engine: Engine) -> list[tuple[str, str, str]]:
    with engine.connect() as connection:
        return [(row.action, row.target, row.why) for row in connection.execute(select(tables.outbox_audit))]


def test_the_list_shows_the_key_and_why_it_is_stopped(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine)
    stop_key(engine, b"8", reason="parked")

    done = outboxkit("quarantine", "list")

    assert done.code == 0
    header, first, second = done.out.splitlines()
    assert header.split("  ")[0] == "TOPIC"
    assert first.split()[:4] == ["orders", "7", "retry", "3"]
    assert "rejected: no \\x1b[2J" in first
    assert second.split()[:3] == ["orders", "8", "parked"]
    assert "CANARY" not in done.out


def test_the_list_as_json_has_every_fact(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine, b"\xff7", request="skip")

    found = json.loads(outboxkit("quarantine", "list", "--json").out)

    assert found.pop("due_at")
    assert found == {
        "topic": "orders", "key": "\\xff7", "reason": "retry", "position": 5, "attempts": 3, "followers": 2,
        "error": "rejected: no \x1b[2J", "request": "skip", "requested_by": None,
    }  # fmt: skip


def test_the_list_is_bounded_and_says_so(outboxkit: Outboxkit, engine: Engine) -> None:
    for key in (b"1", b"2", b"3"):
        stop_key(engine, key)

    done = outboxkit("quarantine", "list", "--limit", "2", "--topic", "orders")

    assert len(done.out.splitlines()) == 3
    assert "2 of 3: --limit shows more" in done.err
    assert outboxkit("quarantine", "list", "--topic", "payments").err == "no stopped keys\n"


@pytest.mark.parametrize("verb", ["release", "skip"])
def test_a_request_is_recorded_with_its_reason(outboxkit: Outboxkit, engine: Engine, verb: str) -> None:
    stop_key(engine)
    stop_key(engine, b"8")

    done = outboxkit("quarantine", verb, "orders", "7", "--yes", "--why", "ticket 4711")

    assert done.code == 0, done.err
    assert done.out.startswith(f"orders  7  asked for {verb}: its head ")
    assert requests_of(engine) == {b"7": verb, b"8": None}
    assert _audit(engine) == [(f"quarantine.{verb}", "orders 7", "ticket 4711")]


def test_a_dry_run_tells_what_would_happen_and_records_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine)
    stop_key(engine, b"8", reason="parked")

    done = outboxkit("quarantine", "skip", "orders", "7", "8", "--dry-run")

    assert done.code == 0
    assert done.out.splitlines() == [
        "orders  7  would ask for skip: its head becomes a dead letter, 2 messages behind it go on",
        "orders  8  would ask for skip: its head is dead, 2 messages behind it go on",
    ]
    assert set(requests_of(engine).values()) == {None}
    assert _audit(engine) == []


def test_keys_that_cannot_be_asked_about_are_refused_and_the_others_are_not(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    stop_key(engine)
    stop_key(engine, b"8", reason="parked", request="repair")

    partly = outboxkit("quarantine", "release", "orders", "7", "8", "9", "--yes", "--json")
    failed = outboxkit("quarantine", "release", "payments", "7", "--yes")

    assert partly.code == 4
    found = {line["key"]: (line["outcome"], line["reason"]) for line in map(json.loads, partly.out.splitlines())}
    assert found == {
        "7": ("asked for release", "its head is tried at once"),
        "8": ("refused", "its dead head is being replayed"),
        "9": ("refused", "it is not stopped"),
    }
    assert requests_of(engine) == {b"7": "release", b"8": "repair"}
    assert failed.code == 1
    assert failed.out == "payments  7  refused: it is not stopped\n"


def test_a_key_that_went_on_while_the_person_thought_is_not_touched(
    outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_key(engine)

    def think(question: str, *, yes: bool) -> bool:
        with engine.begin() as connection:
            connection.execute(STOPPED.update().values(position=6))
        return True

    monkeypatch.setattr("outboxkit_relay.cli.console.output.confirmed", think)

    done = outboxkit("quarantine", "skip", "orders", "7")

    assert done.code == 1
    assert "its head is another one by now: look again" in done.out
    assert requests_of(engine) == {b"7": None}
    assert _audit(engine) == []


def test_a_no_changes_nothing(outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_key(engine)
    monkeypatch.setattr("outboxkit_relay.cli.console.output.confirmed", lambda _question, **_options: False)

    done = outboxkit("quarantine", "release", "orders", "7")

    assert (done.code, done.err) == (1, "nothing was changed\n")
    assert requests_of(engine) == {b"7": None}


def test_a_key_is_written_as_the_list_shows_it(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine, b"a\xff\x1b7")
    shown = json.loads(outboxkit("quarantine", "list", "--json").out)["key"]
    printed = outboxkit("quarantine", "list").out.splitlines()[1].split()[1]

    for text in (shown, printed):
        assert outboxkit("quarantine", "release", "orders", text, "--yes").code == 0

    assert requests_of(engine) == {b"a\xff\x1b7": "release"}


# --- of consumers ------------------------------------------------------------------------------------------------

ROOM = tables.inbox_waiting


def _rows(engine: Engine) -> list[tuple[str, bool]]:
    with engine.connect() as connection:
        query = select(ROOM.c.reason, ROOM.c.due_at <= database_now()).order_by(ROOM.c.id)
        return [(reason, bool(is_due)) for reason, is_due in connection.execute(query)]


def test_the_list_of_a_consumer_shows_its_keys_and_not_those_of_relays(outboxkit: Outboxkit, engine: Engine) -> None:
    stop_key(engine, b"of-relay")
    hold_key(engine)
    hold_key(engine, b"8", reason="parked", followers=0)

    done = outboxkit("quarantine", "list", "--consumer", "billing")
    (first, *_) = [
        json.loads(line) for line in outboxkit("quarantine", "list", "--consumer", "billing", "--json").out.splitlines()
    ]

    header, *lines = done.out.splitlines()
    assert header.split("  ")[0] == "TOPIC"
    assert [line.split()[:3] for line in lines] == [["orders", "7", "retry"], ["orders", "8", "parked"]]
    assert "KeyError at bill.py:4 in bill \\x1b[2J" in lines[0]
    assert "CANARY" not in done.out
    assert (first["consumer"], first["key"], first["followers"]) == ("billing", "7", 2)
    assert outboxkit("quarantine", "list", "--consumer", "shipping").err.startswith("no stopped keys")


@pytest.mark.parametrize("verb", ["release", "skip"])
def test_a_dry_run_of_a_consumer_changes_nothing(outboxkit: Outboxkit, engine: Engine, verb: str) -> None:
    hold_key(engine)

    done = outboxkit("quarantine", verb, "orders", "7", "--consumer", "billing", "--dry-run")

    assert done.code == 0
    assert "would be " in done.out
    assert _rows(engine) == [("retry", False), ("follower", False), ("follower", False)]
    assert _audit(engine) == []


def test_a_waiting_head_of_a_consumer_is_released_at_once(outboxkit: Outboxkit, engine: Engine) -> None:
    hold_key(engine)

    done = outboxkit("quarantine", "release", "orders", "7", "--consumer", "billing", "--yes", "--why", "it is back")

    assert (done.code, done.out) == (0, "orders  7  released: its head is tried at once\n")
    assert _rows(engine) == [("retry", True), ("follower", False), ("follower", False)]
    assert _audit(engine) == [("quarantine.release", "consumer billing orders 7", "it is back")]


def test_a_waiting_head_of_a_consumer_that_is_skipped_is_a_dead_letter_and_the_next_one_is_due(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    hold_key(engine)

    done = outboxkit("quarantine", "skip", "orders", "7", "--consumer", "billing", "--yes")

    assert done.code == 0
    assert _rows(engine) == [("follower", True), ("follower", False)]
    with engine.connect() as connection:
        (letter,) = connection.execute(select(tables.dead_letters)).all()
        (known,) = connection.execute(select(tables.inbox_messages)).all()
    assert (letter.message_id, letter.type, letter.attempts) == ("m-1", "order.placed", 3)
    assert "tries: KeyError at bill.py:4" in letter.error
    assert known.message_id == "m-1"  # a redelivery has no effect


def test_behind_a_dead_head_of_a_consumer_the_others_go_on(outboxkit: Outboxkit, engine: Engine) -> None:
    hold_key(engine, reason="parked")

    done = outboxkit("quarantine", "release", "orders", "7", "8", "--consumer", "billing", "--yes")

    assert done.code == 4
    assert "orders  7  released: its head is dead, 2 messages behind it go on" in done.out
    assert "orders  8  refused: it is not stopped" in done.out
    assert _rows(engine) == [("follower", True), ("follower", False)]


def test_a_head_that_was_handled_since_it_was_looked_at_is_left_alone(engine: Engine) -> None:
    hold_key(engine, followers=0)
    with engine.begin() as connection:
        (seen,) = held.held(connection, "billing")
        connection.execute(ROOM.update().values(attempts=4))

        assert not quarantine.release(connection, seen, by="ana")
        assert not quarantine.skip(connection, seen, by="ana")
    assert _audit(engine) == []
