"""What ``status`` finds and what it calls stuck."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.inbox import rows
from outboxkit.message import Message
from outboxkit.rows import CutOff, Dependency
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


def test_only_what_had_an_effect_is_counted_as_handled_and_audit_says_the_same(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    """A dead message, one whose replay is under way, and one whose claim was never finished had none."""
    outcomes = [None, b"an answer", rows.DEAD, rows.REPLAY, rows.UNFINISHED + b"7"]
    with engine.begin() as connection:
        for number, outcome in enumerate(outcomes):
            values = {"consumer": "billing", "message_id": str(number), "outcome": outcome}
            connection.execute(tables.inbox_messages.insert().values(**values))

    status, audit = outboxkit("status", "--json"), outboxkit("audit", "--json")

    (consumer,) = json.loads(status.out)["consumers"]
    assert consumer["handled"] == 2
    assert json.loads(audit.out)["inbox"]["billing"] == {"handled": 2, "dead": 1, "open": 2, "waiting": 0}


def test_a_handled_message_counts_although_another_one_came_under_its_id(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = {
        "id": uuid4(), "side": "consumer", "consumer": "billing", "topic": "t", "message_id": "1", "type": "x",
        "kind": "event", "headers": b"\0\0", "failure": "conflict", "stage": "dedup", "error_class": "E", "error": "e",
        "attempts": 1, "group": "f",
    }  # fmt: skip
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.insert().values(**letter))
        connection.execute(tables.inbox_messages.insert().values(consumer="billing", message_id="1"))

    (consumer,) = json.loads(outboxkit("status", "--json").out)["consumers"]

    assert consumer["handled"] == 1


# --- consumers ---------------------------------------------------------------------------------------------------


def _run(engine: Engine, host: str = "box/1/a", *, lease: timedelta = timedelta(seconds=5), **values: object) -> None:
    """A run of billing that began a minute ago."""
    row = {"id": uuid4(), "consumer": "billing", "host": host, "started_at": database_now(timedelta(minutes=-1))}
    with engine.begin() as connection:
        connection.execute(tables.inbox_consumers.insert().values(expires_at=database_now(lease), **row, **values))


def _cut_off(*, is_new: bool = False, reason: str = "RabbitMQ at mq:5672 is away") -> str:
    since = datetime.now(UTC) - timedelta(seconds=40)
    return CutOff(of=Dependency.BROKER, since=since, reason=reason, is_new=is_new).to_text()


def _room(engine: Engine, reason: str, **values: object) -> None:
    row = {"consumer": "billing", "topic": "orders", "key": b"7", "headers": b"\0\0", "origin": "orders[0]@1"}
    place = {"partition": 0, "offset": 1, "reason": reason}
    with engine.begin() as connection:
        connection.execute(tables.inbox_waiting.insert().values(**row, **place, **values))


def test_a_consumer_that_runs_is_shown_with_each_of_its_runs(outboxkit: Outboxkit, engine: Engine) -> None:
    _run(engine, in_hand=3, lag=1_200)
    _run(engine, "box/2/b", lag=40)

    done, found = outboxkit("status"), json.loads(outboxkit("status", "--json").out)

    assert done.code == 0
    assert "billing   0        0        0       -       1240" in done.out
    assert "billing  box/1/a  running  3        1200  1m" in done.out
    (consumer,) = found["consumers"]
    assert (consumer["lag"], [run["state"] for run in consumer["runs"]]) == (1240, ["running", "running"])


def test_a_consumer_that_is_cut_off_is_stuck_and_says_why_and_what_to_do(outboxkit: Outboxkit, engine: Engine) -> None:
    _run(engine, trouble=_cut_off())
    _run(engine, "box/2/b")

    done, found = outboxkit("status"), json.loads(outboxkit("status", "--json").out)

    assert done.code == 3
    (problem,) = found["problems"]
    assert problem.startswith("billing on box/1/a: RabbitMQ at mq:5672 is away; for 4")
    assert problem.endswith("start the broker, or mend the way to it: the consumer tries again by itself")
    assert f"STUCK  {problem}" in done.out
    assert "cut off" in done.out


@pytest.mark.parametrize(("limit", "code"), [("30s", 3), ("5m", 0)])
def test_a_start_has_as_long_as_a_message_may_be_pending(
    outboxkit: Outboxkit, engine: Engine, limit: str, code: int
) -> None:
    _run(engine, trouble=_cut_off(is_new=True, reason=""))

    done = outboxkit("status", "--limit", limit)

    assert done.code == code
    assert f"{'STUCK' if code else 'Starting'}  billing on box/1/a: starting for 4" in done.out
    assert done.out.count("session.timeout.ms") == 1


@pytest.mark.parametrize(
    ("ended", "state", "code"),
    [(timedelta(minutes=3), "lost", 3), (timedelta(minutes=3), "stopped", 0), (timedelta(days=2), "lost", 0)],
)
def test_a_consumer_whose_last_run_vanished_today_is_stuck(
    outboxkit: Outboxkit, engine: Engine, ended: timedelta, state: str, *, code: int
) -> None:
    _run(engine, lease=-ended, stopped_at=database_now(-ended) if state == "stopped" else None)

    done = outboxkit("status")

    assert done.code == code
    assert ("billing: nobody runs it; the run on box/1/a vanished 3 min ago" in done.out) == (code == 3)
    assert state in done.out


def test_a_run_that_took_over_makes_the_vanished_one_history(outboxkit: Outboxkit, engine: Engine) -> None:
    _run(engine, lease=timedelta(minutes=-1))
    _run(engine, "box/2/b")

    done = outboxkit("status")

    assert done.code == 0
    assert "box/1/a" not in done.out


def test_retries_that_are_due_while_nobody_runs_the_consumer_are_stuck(outboxkit: Outboxkit, engine: Engine) -> None:
    _room(engine, "retry", due_at=database_now(timedelta(minutes=-2)), attempts=1)

    stuck = outboxkit("status")
    _run(engine)

    assert stuck.code == 3
    assert "billing: 1 message due for another try, and nobody runs it" in stuck.out
    assert outboxkit("status").code == 0


def test_a_parked_key_of_a_consumer_is_stuck_and_named(outboxkit: Outboxkit, engine: Engine) -> None:
    _run(engine)
    _room(engine, "parked")
    _room(engine, "follower")

    done, found = outboxkit("status"), json.loads(outboxkit("status", "--json").out)

    assert done.code == 3
    assert "orders: the key 7 of billing is parked behind a dead head, 1 messages wait" in done.out
    assert found["parked_at_consumers"] == [{"consumer": "billing", "topic": "orders", "followers": 1, "key": "7"}]
