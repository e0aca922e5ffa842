"""What waits in the outbox is listed without payloads, scheduled messages are cancelled, and who did what is told."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from sqlalchemy import Engine, select, update

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.message import Message
from tests.consumer_fixture import order
from tests.unit.relay.cli.builders import bury
from tests.unit.relay.cli.conftest import Outboxkit


def _pending(engine: Engine, **others: str) -> Message:
    message = order(4711, **others)
    with engine.begin() as connection:
        outbox.write(connection, [message])
    return message


def _scheduled(engine: Engine, delay: timedelta = timedelta(hours=1)) -> Message:
    message = order(2)
    with engine.begin() as connection:
        outbox.schedule(connection, [(message, delay)])
    return message


def test_the_list_shows_what_waits_and_no_payload(outboxkit: Outboxkit, engine: Engine) -> None:
    first, later = _pending(engine), _scheduled(engine)

    done = outboxkit("messages", "list")

    header, *rows = done.out.splitlines()
    assert header.split() == ["ID", "STATE", "TOPIC", "TYPE", "KEY", "AGE", "DUE", "ERROR"]
    assert {row.split()[0]: row.split()[1] for row in rows} == {first.id: "pending", later.id: "scheduled"}
    assert "4711" not in done.out


def test_options_choose_messages(outboxkit: Outboxkit, engine: Engine) -> None:
    payment, later = _pending(engine, topic="payments"), _scheduled(engine)

    def found(*options: str) -> list[str]:
        return [
            json.loads(line)["message_id"]
            for line in outboxkit("messages", "list", "--json", *options).out.splitlines()
        ]

    assert found("--topic", "payments") == [payment.id]
    assert found("--state", "scheduled") == [later.id]
    assert set(found("--key", "k")) == {payment.id, later.id}
    assert found("--type", "nothing") == []
    assert len(found("--limit", "1")) == 1


def test_a_scheduled_message_is_cancelled_and_said_so_in_the_log(outboxkit: Outboxkit, engine: Engine) -> None:
    message = _scheduled(engine)

    assert outboxkit("messages", "cancel", message.id, "--dry-run", "--why", "x").code == 0
    assert outboxkit("messages", "list").out
    done = outboxkit("messages", "cancel", message.id, "--yes", "--why", "OPS-9")

    assert (done.code, done.out) == (0, f"{message.id}  cancelled\n")
    assert outboxkit("messages", "list").out == ""
    (line,) = outboxkit("log", "--json").out.splitlines()
    assert (json.loads(line)["action"], json.loads(line)["why"]) == ("messages.cancel", "OPS-9")


@pytest.mark.parametrize("state", ["due", "pending", "unknown"])
def test_what_may_be_out_is_not_cancelled(outboxkit: Outboxkit, engine: Engine, state: str) -> None:
    message = _pending(engine) if state == "pending" else _scheduled(engine)
    if state == "due":
        with engine.begin() as connection:
            connection.execute(update(tables.outbox_waiting).values(due_at=database_now()))
    name = "0190a0a0-0000-7000-8000-000000000000" if state == "unknown" else message.id

    done = outboxkit("messages", "cancel", name, "--yes", "--why", "x")

    assert done.code == 1
    assert "may be at the broker" in done.out
    with engine.connect() as connection:
        assert connection.execute(select(tables.outbox_audit)).all() == []


def test_a_message_that_is_cancelled_in_a_transaction_that_rolls_back_stays(engine: Engine) -> None:
    message = _scheduled(engine)
    with engine.connect() as connection:
        transaction = connection.begin()
        assert outbox.cancel(connection, message.id)
        assert not outbox.cancel(connection, message.id)
        transaction.rollback()
        assert outbox.is_scheduled(connection, message.id)


def test_the_log_is_chosen_by_action_user_and_age(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)
    outboxkit("dlq", "discard", str(letter.id), "--yes", "--why", "a test order")
    outboxkit("relay", "pause", "orders", "--why", "night")

    assert [line.split("  ")[2] for line in outboxkit("log").out.splitlines()[1:]] == ["control.pause", "dlq.discard"]
    assert "a test order" in outboxkit("log", "--action", "dlq").out
    assert outboxkit("log", "--action", "%").out == ""
    assert outboxkit("log", "--by", "nobody").out == ""
    assert len(outboxkit("log", "--since", "1h", "--limit", "1").out.splitlines()) == 2
