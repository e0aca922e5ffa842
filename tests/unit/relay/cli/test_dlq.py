"""Dead letters on the command line: choosing, masking, asking, doing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dead_letters.cause import details_of
from tests.unit.relay.cli.builders import audit_of, bury, state_of
from tests.unit.relay.cli.conftest import Outboxkit


def test_the_list_shows_who_and_why_and_no_payload(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    done = outboxkit("dlq", "list")

    assert done.code == 0
    (header, row) = done.out.splitlines()
    assert header.split() == ["ID", "STATE", "CONSUMER", "TYPE", "KEY", "ERROR", "DIED"]
    assert row.startswith(f"{str(letter.id)[:8]}  dead   billing   order.placed")
    assert "KeyError" in row
    assert "4711" not in done.out


def test_options_choose(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine, "billing", b"1")
    bury(engine, "shipping", b"2")

    def found(*options: str) -> list[str]:
        done = outboxkit("dlq", "list", "--json", *options)
        assert done.code == 0
        return [json.loads(line)["key"] for line in done.out.splitlines()]

    assert sorted(found()) == ["1", "2"]
    assert found("--consumer", "shipping") == ["2"]
    assert found("--key", "1") == ["1"]
    assert found("--type", "order.cancelled") == []
    assert found("--state", "replayed") == []
    assert sorted(found("--state", "all", "--side", "consumer")) == ["1", "2"]
    assert found("--side", "relay") == []
    assert len(found("--limit", "1")) == 1
    assert sorted(found("--since", "1h")) == ["1", "2"]


def test_a_letter_that_is_damaged_does_not_hide_the_others(outboxkit: Outboxkit, engine: Engine) -> None:
    damaged, whole = bury(engine, key=b"1"), bury(engine, key=b"2")
    letters = tables.dead_letters
    with engine.begin() as connection:
        connection.execute(letters.update().where(letters.c.id == damaged.id).values(headers=b"\0\7\0"))

    listed = outboxkit("dlq", "list", "--json")
    shown = outboxkit("dlq", "show", str(damaged.id))

    assert {json.loads(line)["id"] for line in listed.out.splitlines()} == {str(damaged.id), str(whole.id)}
    assert "(unreadable)" in shown.out


@pytest.mark.parametrize(
    "command", ["dlq list", "dlq groups", "dlq replay --yes", "dlq discard --yes --why x", "quarantine list"]
)
def test_a_consumer_that_nobody_knows_is_told_as_that(outboxkit: Outboxkit, engine: Engine, command: str) -> None:
    start = {"id": uuid4(), "consumer": "billing", "host": "a/1/b", "expires_at": database_now()}
    with engine.begin() as connection:
        connection.execute(tables.inbox_consumers.insert().values(**start))

    known = outboxkit(*command.split(), "--consumer", "billing")
    mistyped = outboxkit(*command.split(), "--consumer", "biling")
    strange = outboxkit(*command.split(), "--consumer", "x\x1b[2J")

    assert "is known as" not in known.err
    assert mistyped.err.endswith(": no consumer is known as biling; did you mean billing?\n")
    assert strange.err.endswith(": no consumer is known as x\\x1b[2J\n")


def test_show_masks_what_is_personal(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    for options in ([], ["--json"]):
        done = outboxkit("dlq", "show", str(letter.id)[:8], *options)

        assert done.code == 0
        assert str(letter.id) in done.out
        assert "order.placed" in done.out
        assert "4711" not in done.out
        assert "CANARY-HEADER" not in done.out
    assert audit_of(engine) == []


def test_explain_begins_with_the_own_code_and_says_that_the_text_is_masked(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    try:
        json.loads("{CANARY")
    except ValueError as error:
        details = details_of(error)
    found = bury(engine)
    letters = tables.dead_letters
    with engine.begin() as connection:
        connection.execute(letters.update().where(letters.c.id == found.id).values(details=details))

    done = outboxkit("dlq", "explain", str(found.id))

    lines = [line.partition("  ") for line in done.out.splitlines()]
    places = [(name, text.strip()) for name, _, text in lines if name in ("your code", "place")]
    assert [name for name, _ in places] == ["your code", *["place"] * (len(places) - 1)]
    assert "test_dlq.py" in places[0][1]
    assert "json/decoder.py" in places[-1][1]
    assert "text          masked, it may quote data: Consumer(keep_error_text=True) keeps it" in done.out
    assert "CANARY" not in done.out


def test_reveal_shows_it_escaped_and_says_so_in_the_audit_log(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    done = outboxkit("dlq", "show", str(letter.id), "--reveal")

    assert "card 4711 \\x1b[2J" in done.out
    assert "\x1b" not in done.out
    assert "CANARY-HEADER" in done.out
    assert [action for action, _ in audit_of(engine)] == ["dlq.reveal"]


@pytest.mark.parametrize(("name", "code"), [("0000", 1), ("xyz!", 2), ("ab", 2), ("f" * 40, 2)])
def test_a_name_that_means_nothing_is_one_line(outboxkit: Outboxkit, engine: Engine, name: str, code: int) -> None:
    done = outboxkit("dlq", "show", name)

    assert done.code == code
    assert done.err.count("\n") == 1


def test_a_name_that_means_two_letters_is_refused(outboxkit: Outboxkit, engine: Engine) -> None:
    first, second = bury(engine, key=b"1"), bury(engine, key=b"2")
    letters = tables.dead_letters
    with engine.begin() as connection:
        for letter, number in ((first, 1), (second, 2)):
            new = UUID(int=(0xABCD1234 << 96) + number)
            connection.execute(letters.update().where(letters.c.id == letter.id).values(id=new))

    assert "several" in outboxkit("dlq", "show", "abcd1234").err
    assert outboxkit("dlq", "show", str(UUID(int=(0xABCD1234 << 96) + 2))).code == 0


def test_replay_sends_the_message_to_the_consumer_that_failed(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    done = outboxkit("dlq", "replay", str(letter.id)[:8], "--yes", "--why", "fixed in 2.4.1")

    assert done.code == 0
    assert done.out == f"{str(letter.id)[:8]}  queued\n"
    assert state_of(engine, letter) == "replaying"
    assert audit_of(engine) == [("dlq.replay", "fixed in 2.4.1")]
    with engine.connect() as connection:
        (row,) = connection.execute(select(tables.outbox_messages)).all()
    assert row.message_id == UUID(letter.message_id)
    assert b"outboxkit-replay-for" in row.headers


def test_a_dry_run_changes_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    for command in (["replay"], ["discard", "--why", "x"]):
        done = outboxkit("dlq", *command, "--all", "--dry-run")

        assert done.code == 0
        assert f"would {command[0]}" in done.out
    assert state_of(engine, letter) == "dead"
    assert audit_of(engine) == []


def test_everything_is_never_meant_by_accident(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    assert outboxkit("dlq", "replay", "--yes").code == 2
    assert outboxkit("dlq", "discard", "--yes", "--why", "x").code == 2
    assert state_of(engine, letter) == "dead"


def test_without_a_terminal_nobody_is_asked(
    outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = bury(engine)
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)

        done = outboxkit("dlq", "replay", "--all")

    assert done.code == 2
    assert "Replay 1 message (billing 1)?" in done.err
    assert "--yes" in done.err
    assert state_of(engine, letter) == "dead"


def test_some_refused_is_partly_done_and_all_refused_has_failed(outboxkit: Outboxkit, engine: Engine) -> None:
    first, second = bury(engine, key=b"1"), bury(engine, key=b"2")
    assert outboxkit("dlq", "discard", str(first.id), "--yes", "--why", "test order").code == 0

    partly = outboxkit("dlq", "replay", str(first.id), str(second.id), "--yes")
    nothing = outboxkit("dlq", "replay", str(first.id), "--yes")

    assert partly.code == 4
    assert "refused" in partly.out
    assert "queued" in partly.out
    assert nothing.code == 1
    assert (state_of(engine, first), state_of(engine, second)) == ("discarded", "replaying")


def test_discard_closes_a_letter_and_says_why(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    done = outboxkit("dlq", "discard", "--consumer", "billing", "--yes", "--why", "a test order")

    assert done.out == f"{str(letter.id)[:8]}  discarded\n"
    assert state_of(engine, letter) == "discarded"
    assert audit_of(engine) == [("dlq.discard", "a test order")]
    assert outboxkit("dlq", "list").out == ""


def test_letters_that_were_closed_while_the_person_thought_are_told_and_not_counted(
    outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, replayed, deleted = bury(engine, key=b"1"), bury(engine, key=b"2"), bury(engine, key=b"3")
    letters = tables.dead_letters

    def think(question: str, *, yes: bool) -> bool:
        with engine.begin() as connection:
            connection.execute(letters.update().where(letters.c.id == replayed.id).values(state="replayed"))
            connection.execute(letters.delete().where(letters.c.id == deleted.id))
        return True

    monkeypatch.setattr("outboxkit_relay.cli.console.output.confirmed", think)

    done = outboxkit("dlq", "discard", "--all", "--why", "x")

    assert done.code == 4
    assert sorted(done.out.splitlines()) == sorted(
        f"{str(letter.id)[:8]}  {told}"
        for letter, told in (
            (dead, "discarded"),
            (replayed, "refused: it is replayed"),
            (deleted, "refused: it is gone"),
        )
    )


def test_a_repaired_payload_goes_out_under_a_new_id(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)
    Path("repaired.json").write_text('{"card": "none"}')

    done = outboxkit("dlq", "replay", str(letter.id), "--payload", "repaired.json", "--yes")

    assert done.code == 0
    with engine.connect() as connection:
        (row,) = connection.execute(select(tables.outbox_messages)).all()
    assert row.payload == b'{"card": "none"}'
    assert row.message_id != UUID(letter.message_id)
    assert state_of(engine, letter) == "replayed"


def test_discarding_a_dead_head_asks_the_relay_to_let_its_followers_go(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)
    stopped = tables.outbox_stopped_keys
    values = {"topic": "orders", "key": b"7", "shard": 0, "position": 5, "reason": "parked"}
    with engine.begin() as connection:
        letters = tables.dead_letters
        connection.execute(letters.update().values(side="relay", consumer="", source_position=5))
        connection.execute(stopped.insert(), [values, {**values, "key": b"8"}])

    assert outboxkit("dlq", "discard", str(letter.id), "--yes", "--why", "x").code == 0

    with engine.connect() as connection:
        found = connection.execute(select(stopped.c.key, stopped.c.request).order_by(stopped.c.key))
        assert [tuple(row) for row in found] == [(b"7", "skip"), (b"8", None)]
