"""What ``status`` finds and what it calls stuck."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.message import Message
from tests.unit.relay.cli.conftest import Outboxkit


def _write(engine: Engine, topic: str, count: int = 1, *, age: timedelta = timedelta()) -> None:
    messages = [
        Message(
            id=str(uuid4()), type="order.placed", topic=topic, key=b"7", payload=b"{}", occurred_at=datetime.now(UTC)
        )
        for _ in range(count)
    ]
    with engine.begin() as connection:
        outbox.write(connection, messages)
        if age:
            hot = tables.outbox_messages
            connection.execute(hot.update().where(hot.c.topic == topic).values(recorded_at=database_now(-age)))


def _relay(engine: Engine, lease: timedelta = timedelta(seconds=60)) -> None:
    values = {"id": uuid4(), "host": "here", "version": "0", "expires_at": database_now(lease)}
    with engine.begin() as connection:
        connection.execute(tables.outbox_relays.insert().values(**values))


def test_an_empty_outbox_is_healthy(outboxkit: Outboxkit, engine: Engine) -> None:
    done = outboxkit("status")

    assert done.code == 0
    assert done.out.startswith("Healthy  nothing is pending\n")


def test_fresh_messages_under_a_live_relay_are_healthy(outboxkit: Outboxkit, engine: Engine) -> None:
    _write(engine, "orders", 3)
    _relay(engine)

    done = outboxkit("status")

    assert done.code == 0
    assert done.out.startswith("Healthy  3 pending")
    assert "orders" in done.out


@pytest.mark.parametrize("lease", [None, timedelta(seconds=-1)])
def test_messages_without_a_live_relay_are_stuck(outboxkit: Outboxkit, engine: Engine, lease: timedelta | None) -> None:
    _write(engine, "orders")
    if lease:
        _relay(engine, lease)

    done = outboxkit("status")

    assert done.code == 3
    assert "no relay is alive" in done.out


def test_a_message_that_waits_too_long_is_stuck_and_its_topic_named(outboxkit: Outboxkit, engine: Engine) -> None:
    _write(engine, "orders")
    _write(engine, "payments", 2, age=timedelta(seconds=100))
    _relay(engine)

    strict, patient = outboxkit("status"), outboxkit("status", "--limit", "5m")

    assert strict.code == 3
    assert "STUCK  payments: oldest pending 1m40s (limit 30s), 2 pending" in strict.out
    assert "orders: oldest" not in strict.out
    assert patient.code == 0


def test_a_parked_key_is_stuck_and_named(outboxkit: Outboxkit, engine: Engine) -> None:
    with engine.begin() as connection:
        stopped = {"topic": "orders", "key": b"4\x1b[2J", "shard": 0, "position": 1, "reason": "parked"}
        connection.execute(tables.outbox_stopped_keys.insert().values(**stopped))

    done = outboxkit("status")

    assert done.code == 3
    assert "orders: the key 4\\x1b[2J is parked behind a dead head" in done.out


def test_json_says_the_same(outboxkit: Outboxkit, engine: Engine) -> None:
    _write(engine, "payments", 2, age=timedelta(seconds=100))

    done = outboxkit("status", "--json")

    found = json.loads(done.out)
    assert done.code == 3
    assert found["verdict"] == "stuck"
    (topic,) = found["topics"]
    assert (topic["topic"], topic["pending"]) == ("payments", 2)
    assert 99 < topic["oldest_seconds"] < 130
    assert len(found["problems"]) == 2


def test_a_dead_message_is_not_counted_as_handled(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = {
        "id": uuid4(), "side": "consumer", "consumer": "billing", "topic": "t", "message_id": "1", "type": "x",
        "kind": "event", "headers": b"\0\0", "failure": "poison", "stage": "handler", "error_class": "E", "error": "e",
        "attempts": 1, "group": "f",
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.insert().values(**letter))
        for message_id in ("1", "2"):  # the first is there only so that a redelivery has no effect
            connection.execute(tables.inbox_messages.insert().values(consumer="billing", message_id=message_id))

    done = outboxkit("status", "--json")

    (consumer,) = json.loads(done.out)["consumers"]
    assert consumer["handled"] == 1
