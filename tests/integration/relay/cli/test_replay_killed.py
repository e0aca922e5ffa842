"""A replay that is killed at any failpoint is resumed from its table; two operators may replay the same letters.

Short: 300 letters over 50 keys. In the full profile 5,000 over 500.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select

from outboxkit import dead_letters, migrations, tables
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import Stage
from outboxkit.dialects import open_engine
from outboxkit.headers import from_wire, wire_headers
from outboxkit.policy import Failure
from tests.conftest import PROFILE
from tests.consumer_fixture import order

LETTERS, KEYS = (5_000, 500) if PROFILE == "full" else (240, 40)
POINTS = ["planned", "written", "claimed", "decided", "advanced"]


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[Engine]:
    is_postgres = request.param == "postgresql"
    url = request.getfixturevalue("database_url") if is_postgres else f"sqlite:///{tmp_path}/app.db"
    engine = open_engine(url, patience=timedelta(seconds=60))
    with engine.begin() as connection:
        migrations.upgrade(connection)
    bury(engine)
    yield engine
    engine.dispose()


def bury(engine: Engine) -> None:
    """Letters in a shuffled order: their ids and their times say nothing about the original one."""
    sent = order(0)
    delivery = Delivery(topic="orders", key=b"0", headers=wire_headers(sent), payload=sent.payload, origin="o")
    values = {"consumer": "billing", "kind": "event", "failure": Failure.HANDLER, "stage": Stage.HANDLER}
    message = from_wire("orders", b"0", delivery.headers, sent.payload)
    one = dead_letters.of_delivery(delivery, message, error=KeyError(), attempts=1, **values)  # type: ignore[arg-type]
    with engine.begin() as connection:
        for at in range(LETTERS):
            number = at * 7 % LETTERS  # every number once
            payload, key = b'{"number": %d}' % number, b"%d" % (number % KEYS)
            letter = replace(one, id=uuid4(), message_id=str(uuid4()), payload=payload, key=key, source_position=number)
            dead_letters.bury(connection, letter)


def run(engine: Engine, *arguments: str, failpoints: str = "") -> subprocess.Popen[str]:
    url = engine.url.render_as_string(hide_password=False)
    environment = {**os.environ, "OUTBOXKIT_DATABASE_URL": url, "OUTBOXKIT_BROKER_URL": "memory://replay"}
    command = [sys.executable, "-m", "outboxkit_relay", "dlq", *arguments]
    return subprocess.Popen(
        command,
        env={**environment, "OUTBOXKIT_FAILPOINTS": failpoints},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen[str]) -> tuple[list[dict[str, object]], str]:
    out, err = process.communicate(timeout=300)
    return [json.loads(line) for line in out.splitlines()], err


def numbers_by_key(engine: Engine) -> dict[bytes, list[int]]:
    hot, found = tables.outbox_messages.c, dict[bytes, list[int]]()
    with engine.connect() as connection:
        for key, payload in connection.execute(select(hot.key, hot.payload).order_by(hot.position)):
            found.setdefault(bytes(key), []).append(json.loads(payload)["number"])
    return found


def everything_once_and_in_order(engine: Engine) -> bool:
    wanted = {b"%d" % key: list(range(key, LETTERS, KEYS)) for key in range(KEYS)}
    return numbers_by_key(engine) == wanted


def replays(engine: Engine) -> list[dict[str, object]]:
    return told(run(engine, "replays", "--json"))[0]


@pytest.mark.parametrize("point", POINTS)
def test_a_replay_killed_at_a_failpoint_is_resumed_and_loses_and_doubles_nothing(engine: Engine, point: str) -> None:
    options = ("--all", "--yes", "--rate", "1000000" if PROFILE == "full" else "500", "--json")
    killed = run(engine, "replay", *options, failpoints=f"replay.{point}=exit:{1 if point == 'planned' else 2}")
    told(killed)
    assert killed.returncode == 137

    (cut_off,) = replays(engine)
    assert cut_off["state"] == "ready"
    assert cut_off["queued"] == sum(map(len, numbers_by_key(engine).values()))
    assert cut_off["queued"] + cut_off["waiting"] == cut_off["chosen"] == LETTERS  # type: ignore[operator]
    resumed = run(engine, "resume", str(cut_off["replay"])[:8], "--json")
    told(resumed)

    assert resumed.returncode == 0
    assert everything_once_and_in_order(engine)
    (done,) = replays(engine)
    assert (done["state"], done["queued"], done["waiting"]) == ("done", LETTERS, 0)
    with engine.connect() as connection:
        audit = [row.action for row in connection.execute(select(tables.outbox_audit).order_by("id"))]
    assert audit == ["dlq.replay", "dlq.replay.resume"]


def test_two_operators_at_once_queue_each_letter_once_and_in_order(engine: Engine) -> None:
    both = [run(engine, "replay", "--all", "--yes", "--rate", "400", "--limit", "100000", "--json") for _ in range(2)]
    talk = [told(process) for process in both]

    assert {process.returncode for process in both} <= {0, 1, 4}, talk
    found = replays(engine)
    assert sum(one["queued"] for one in found) == LETTERS  # type: ignore[misc]
    for one in found:
        assert one["chosen"] == one["queued"] + one["refused"] + one["gone"]  # type: ignore[operator]
    hot = numbers_by_key(engine)
    assert sorted(number for numbers in hot.values() for number in numbers) == list(range(LETTERS))
    assert everything_once_and_in_order(engine)
