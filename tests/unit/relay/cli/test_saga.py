"""Sagas on the command line: looking and asking. What becomes of a request is a test of the saga."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import Engine, func, select

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.saga import store
from outboxkit.saga.core import Instance, Status
from tests.unit.relay.cli.conftest import Outboxkit

HISTORY = [
    ["2026-11-30T10:00:00.000+00:00", "started by order.placed"],
    ["2026-11-30T10:00:01.000+00:00", "evil \x1b[2J"],
]


@pytest.fixture(autouse=True)
def _sagas(engine: Engine) -> None:
    rows = {"1": Status.RUNNING, "2": Status.COMPLETED, "3": Status.STUCK}
    with engine.begin() as connection:
        for key, status in rows.items():
            values = store.values_of(Instance(status=status)) | {
                "saga": "checkout",
                "key": key,
                "version": 1,
                "step": "" if status is Status.COMPLETED else "reserve",
                "state": b'{"card": "CANARY"}',
                "history": HISTORY,
                "started_at": database_now(),
                "updated_at": database_now(),
                "correlation_id": "checkout-42",
            }
            assert store.add(connection, values)


def asked(engine: Engine) -> tuple[int, list[tuple[str, str, str]]]:
    audit = tables.outbox_audit.c
    with engine.connect() as connection:
        sent = connection.scalar(select(func.count()).select_from(tables.outbox_messages)) or 0
        return sent, [tuple(row) for row in connection.execute(select(audit.action, audit.target, audit.why))]


def test_instances_are_listed_without_their_state(outboxkit: Outboxkit) -> None:
    done = outboxkit("saga", "list", "checkout", "--status", "stuck")

    assert done.code == 0
    assert done.out.splitlines()[1].split()[:4] == ["checkout", "3", "stuck", "reserve"]
    assert outboxkit("saga", "list", "unknown").err == "no sagas\n"
    lines = [json.loads(line) for line in outboxkit("saga", "list", "--json").out.splitlines()]
    assert {line["key"]: line["status"] for line in lines} == {"1": "running", "2": "completed", "3": "stuck"}


def test_one_instance_shows_its_history_as_inert_text(outboxkit: Outboxkit) -> None:
    done = outboxkit("saga", "show", "checkout", "1")

    assert "10:00:00.000  started by order.placed" in done.out
    assert "evil \\x1b[2J" in done.out
    assert "CANARY" not in done.out + outboxkit("saga", "show", "checkout", "1", "--json").out
    missing = outboxkit("saga", "show", "checkout", "99")
    assert (missing.code, missing.err) == (1, "outboxkit: there is no instance 99 of the saga checkout\n")


def test_a_request_is_sent_and_audited_and_an_ended_instance_refused(outboxkit: Outboxkit, engine: Engine) -> None:
    done = outboxkit("saga", "compensate", "checkout", "1", "2", "--yes", "--why", "ticket 7")

    assert done.code == 4
    assert "checkout  1  asked to compensate" in done.out
    assert "checkout  2  refused: it has ended" in done.out
    assert asked(engine) == (1, [("saga.compensate", "checkout 1", "ticket 7")])


def test_a_stuck_instance_is_resumed_and_not_compensated_twice(outboxkit: Outboxkit, engine: Engine) -> None:
    assert outboxkit("saga", "compensate", "checkout", "3", "--yes").code == 1
    assert outboxkit("saga", "resume", "checkout", "3", "--yes").code == 0

    assert asked(engine)[1] == [("saga.resume", "checkout 3", "")]


def test_a_dry_run_changes_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    done = outboxkit("saga", "resume", "checkout", "1", "--dry-run", "--json")

    assert json.loads(done.out)["outcome"] == "would ask to resume"
    assert asked(engine) == (0, [])
