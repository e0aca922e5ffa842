"""Pausing and resuming on the command line, and what the status makes of it."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from tests.integration.relay.world import message
from tests.unit.relay.cli.conftest import Outboxkit

WHY = ("--why", "ticket 7")
_MINUTE = timedelta(minutes=1)


def _paused(engine: Engine) -> list[Target]:
    with engine.connect() as connection:
        return [found.target for found in pauses.pauses(connection)]


def _write(engine: Engine, *numbers: int) -> None:
    with engine.begin() as connection:
        outbox.write(connection, [message(number, key=str(number)) for number in numbers])


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        (("orders",), Target(Scope.DESTINATION, "orders")),
        (("--type", "order.placed"), Target(Scope.TYPE, "order.placed")),
        (("orders", "--key", "42"), Target(Scope.KEY, "orders", b"42")),
        (("orders", "--key", "\\xff"), Target(Scope.KEY, "orders", b"\xff")),
    ],
)
def test_a_pause_is_stored_and_a_resume_ends_it(
    outboxkit: Outboxkit, engine: Engine, arguments: tuple[str, ...], target: Target
) -> None:
    assert outboxkit("relay", "pause", *arguments, *WHY).code == 0
    assert _paused(engine) == [target]

    assert outboxkit("relay", "resume", *arguments).code == 0
    assert _paused(engine) == []
    with engine.connect() as connection:
        actions = connection.execute(select(tables.outbox_audit.c.action)).scalars().all()
    assert actions == ["control.pause", "control.resume"]


def test_it_tells_how_much_is_concerned(outboxkit: Outboxkit, engine: Engine) -> None:
    _write(engine, 1, 2)

    assert (
        outboxkit("relay", "pause", "orders", *WHY).out
        == "destination orders: paused, 2 messages of it in the outbox\n"
    )
    one = outboxkit("relay", "pause", "orders", "--key", "2", "--json", *WHY)
    assert json.loads(one.out) == {
        "scope": "key", "name": "orders", "key": "2", "outcome": "paused", "messages": 1,
    }  # fmt: skip


def test_a_dry_run_changes_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    assert "would be paused" in outboxkit("relay", "pause", "orders", "--dry-run", *WHY).out
    assert _paused(engine) == []
    outboxkit("relay", "pause", "orders", *WHY)
    assert "would be resumed" in outboxkit("relay", "resume", "orders", "--dry-run").out
    assert len(_paused(engine)) == 1


def test_what_is_not_paused_cannot_be_resumed(outboxkit: Outboxkit, engine: Engine) -> None:
    done = outboxkit("relay", "resume", "orders")

    assert (done.code, done.out) == (1, "destination orders: not paused, 0 messages of it in the outbox\n")


@pytest.mark.parametrize("arguments", [(), ("--key", "42"), ("orders", "--type", "x"), ("--type", "x", "--key", "42")])
def test_a_target_must_be_named_in_one_way(outboxkit: Outboxkit, engine: Engine, arguments: tuple[str, ...]) -> None:
    done = outboxkit("relay", "pause", *arguments, *WHY)

    assert done.code == 2
    assert "name a destination" in done.err
    assert _paused(engine) == []


def test_a_pause_needs_a_reason(outboxkit: Outboxkit, engine: Engine) -> None:
    assert outboxkit("relay", "pause", "orders").code == 2
    assert _paused(engine) == []


def test_the_list_shows_who_why_and_until_when(outboxkit: Outboxkit, engine: Engine) -> None:
    assert outboxkit("relay", "pauses").err == "nothing is paused\n"
    outboxkit("relay", "pause", "orders", "--for", "2h", "--why", "a \x1b[2J deploy")
    outboxkit("relay", "pause", "--type", "order.placed", *WHY)

    header, first, second = outboxkit("relay", "pauses").out.splitlines()
    assert header.split() == ["PAUSED", "NAME", "BY", "SINCE", "ENDS", "WHY"]
    assert first.split()[:2] == ["destination", "orders"]
    assert "a \\x1b[2J deploy" in first
    assert "when resumed" in second
    found = [json.loads(line) for line in outboxkit("relay", "pauses", "--json").out.splitlines()]
    assert [(one["scope"], one["name"], one["until"] is None) for one in found] == [
        ("destination", "orders", False),
        ("type", "order.placed", True),
    ]


def test_the_status_tells_what_is_paused_and_does_not_call_it_stuck(outboxkit: Outboxkit, engine: Engine) -> None:
    _write(engine, 1)
    with engine.begin() as connection:
        connection.execute(tables.outbox_messages.update().values(recorded_at=database_now(-_MINUTE)))
    assert "oldest pending" in outboxkit("status").out
    outboxkit("relay", "pause", "orders", *WHY)

    done = outboxkit("status")

    assert "oldest pending" not in done.out
    assert "Paused  destination orders, by " in done.out
    assert ": ticket 7" in done.out
    (found,) = json.loads(outboxkit("status", "--json").out)["pauses"]
    assert (found["name"], found["reason"]) == ("orders", "ticket 7")
