"""A replay on the command line: its sums, its pace, what stops it, and how it goes on."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, func, select, update

from outboxkit import dead_letters, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters import Filter, State
from tests.unit.relay.cli.builders import audit_of, bury
from tests.unit.relay.cli.conftest import Outboxkit

LETTERS = tables.dead_letters


def _queued(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(tables.outbox_messages)).scalar_one()


def _replay(outboxkit: Outboxkit) -> dict[str, object]:
    (line,) = outboxkit("dlq", "replays", "--json").out.splitlines()
    found: dict[str, object] = json.loads(line)
    return found


def test_the_sums_are_told_and_that_nobody_publishes(outboxkit: Outboxkit, engine: Engine) -> None:
    letters = [bury(engine, key=b"%d" % number) for number in range(3)]
    with engine.begin() as connection:
        connection.execute(update(LETTERS).where(LETTERS.c.id == letters[0].id).values(generation=9))

    done = outboxkit("dlq", "replay", "--all", "--yes")

    assert done.code == 4
    assert "3 chosen = 2 queued + 1 refused + 0 gone" in done.err
    assert "queued; no relay is alive here" in done.err
    assert "9 times" in done.out


def test_where_a_relay_is_alive_there_is_nothing_to_add(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine)
    lease = {"id": uuid4(), "host": "h", "version": "1", "expires_at": database_now(timedelta(minutes=1))}
    with engine.begin() as connection:
        connection.execute(tables.outbox_relays.insert().values(**lease))

    assert outboxkit("dlq", "replay", "--all", "--yes").err == ""


def test_json_is_the_replay_and_then_a_line_for_each_letter(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)

    told, one = (json.loads(line) for line in outboxkit("dlq", "replay", "--all", "--yes", "--json").out.splitlines())

    assert (told["chosen"], told["queued"], told["refused"], told["gone"], told["state"]) == (1, 1, 0, 0, "done")
    assert one == {"id": str(letter.id), "number": 1, "outcome": "queued", "reason": ""}


def test_a_canary_that_nobody_handles_holds_the_others_back(outboxkit: Outboxkit, engine: Engine) -> None:
    for number in range(4):
        bury(engine, key=b"%d" % number)

    done = outboxkit("dlq", "replay", "--all", "--yes", "--canary", "1", "--patience", "1ms")

    assert done.code == 4
    assert "stopped: 1 letter of the canary took no effect in 0 s" in done.err
    assert "outboxkit dlq resume" in done.err
    assert _queued(engine) == 1
    found = _replay(outboxkit)
    assert (found["state"], found["queued"], found["waiting"]) == ("stopped", 1, 3)

    resumed = outboxkit("dlq", "resume", str(found["replay"])[:8], "--why", "it was handled")

    assert resumed.code == 0
    assert _queued(engine) == 4
    assert [action for action, _ in audit_of(engine)] == ["dlq.replay", "dlq.replay.stop", "dlq.replay.resume"]


def test_deaths_stop_a_replay(outboxkit: Outboxkit, engine: Engine) -> None:
    for number in range(4):
        bury(engine, key=b"%d" % number)
    outboxkit("dlq", "replay", "--all", "--yes", "--canary", "1", "--patience", "1ms")
    with engine.begin() as connection:  # the first one has died again
        (first,) = dead_letters.find(connection, Filter(state=State.REPLAYING))
        connection.execute(update(LETTERS).where(LETTERS.c.id == first.id).values(state=State.REPLAYED))
    child = bury(engine, key=b"9")
    with engine.begin() as connection:
        connection.execute(update(LETTERS).where(LETTERS.c.id == child.id).values(parent_id=first.id))

    done = outboxkit("dlq", "resume", str(_replay(outboxkit)["replay"]), "--rate", "5")

    assert done.code == 4
    assert "stopped: 1 of 1 that were closed have died again" in done.err
    assert _replay(outboxkit)["waiting"] == 2


def test_a_rate_is_kept(outboxkit: Outboxkit, engine: Engine) -> None:
    for number in range(20):
        bury(engine, key=b"%d" % number)

    started = time.monotonic()
    assert outboxkit("dlq", "replay", "--all", "--yes", "--rate", "50").code == 0

    assert time.monotonic() - started >= 0.38, "20 letters, the last of them 0.4 s after the first"


def test_a_replay_that_is_over_is_neither_stopped_nor_resumed(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine)
    outboxkit("dlq", "replay", "--all", "--yes")
    name = str(_replay(outboxkit)["replay"])

    assert outboxkit("dlq", "stop", name).code == 1
    resumed = outboxkit("dlq", "resume", name)
    assert (resumed.code, "is over: 1 of 1 were queued" in resumed.err) == (1, True)
    assert outboxkit("dlq", "replays", name).out.endswith("queued\n")


@pytest.mark.parametrize("name", ["abcd", "zzzz"])
def test_a_replay_that_does_not_exist_is_one_line(outboxkit: Outboxkit, engine: Engine, name: str) -> None:
    done = outboxkit("dlq", "resume", name)

    assert done.code in (1, 2)
    assert done.err.count("\n") == 1


def test_a_replay_that_nobody_closes_says_where_it_is(outboxkit: Outboxkit, engine: Engine) -> None:
    letter = bury(engine)
    outboxkit("dlq", "replay", "--all", "--yes")
    with engine.begin() as connection:
        long_ago = database_now(timedelta(minutes=-12))
        connection.execute(update(LETTERS).values(replaying_since=long_ago))

    assert "in the outbox: no relay is alive" in outboxkit("dlq", "list", "--state", "replaying").out
    with engine.begin() as connection:
        connection.execute(tables.outbox_messages.delete())

    shown = outboxkit("dlq", "show", str(letter.id)).out
    assert "for 12m" in shown
    assert "published, and billing has not handled it: no process of billing is known to run" in shown
    (line,) = outboxkit("dlq", "list", "--state", "replaying", "--json").out.splitlines()
    assert json.loads(line)["open_because"].startswith("published")


def test_the_letters_of_a_renamed_consumer_go_to_its_new_name(outboxkit: Outboxkit, engine: Engine) -> None:
    bury(engine, "billing")
    at = {"started_at": database_now(), "expires_at": database_now(timedelta(seconds=5))}
    with engine.begin() as connection:
        connection.execute(tables.inbox_consumers.insert().values(id=uuid4(), consumer="invoicing", host="h", **at))

    refused = outboxkit("dlq", "replay", "--all", "--yes")
    assert (refused.code, "seen lately: invoicing" in refused.out) == (1, True)

    assert outboxkit("dlq", "replay", "--all", "--yes", "--to", "invoicing").code == 0
    with engine.connect() as connection:
        assert b"invoicing" in connection.execute(select(tables.outbox_messages.c.headers)).scalar_one()
