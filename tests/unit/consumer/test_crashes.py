"""A process may die anywhere: one effect per message, and a message that kills is found and buried."""

from __future__ import annotations

import subprocess
import sys

import pytest

from outboxkit import failpoints, tables
from outboxkit.dead_letters import Filter, find
from outboxkit.policy import Failure
from tests.consuming import World

COUNT = 6
NONE = "-1"


def run_child(world: World, *, killer: str = NONE, armed: str = "") -> int:
    command = [sys.executable, "-m", "tests.consuming_child", world.url_of_child, str(COUNT), killer, armed]
    return subprocess.run(command, check=False, timeout=60).returncode


@pytest.mark.parametrize(
    "point",
    [
        "recv", "attempt.recorded", "inbox.inserted", "handler.before", "handler.after", "commit.before", "commit.after",
        "ack.before", "ack.after",
    ],
)
def test_a_death_at_any_point_leaves_one_effect_per_message(world: World, point: str) -> None:
    assert run_child(world, armed=f"{point}=exit") == 137

    assert run_child(world) == 0

    assert sorted(world.effects()) == list(range(COUNT))
    assert world.count(tables.dead_letters) == 0
    assert world.count(tables.inbox_batches) == 0, "nobody is suspect any more"


def test_a_message_that_kills_the_process_is_buried_after_three_deaths_and_no_other(world: World) -> None:
    deaths = 0
    while (status := run_child(world, killer="3")) != 0:
        assert status == 139
        deaths += 1

    assert deaths == 3
    with world.engine.connect() as connection:
        (letter,) = find(connection, Filter())
    assert (letter.message_id, letter.failure, letter.attempts) == ("m3", Failure.CRASH, 3)
    assert sorted(world.effects()) == [0, 1, 2, 4, 5]
    assert world.count(tables.inbox_batches) == 0


def test_a_death_between_waiting_and_acknowledging_keeps_the_order(world: World) -> None:
    assert run_child(world, armed="handler.before=raise,retry.scheduled=exit") == 137

    assert run_child(world) == 0

    effects = world.effects()
    assert sorted(effects) == list(range(COUNT))
    assert all([n for n in effects if n % 3 == key] == [key, key + 3] for key in range(3))


def test_a_death_while_burying_keeps_one_letter(world: World) -> None:
    for point in ("dlq.before", "dlq.after"):
        run_child(world, killer=NONE, armed=f"handler.before=raise:1,{point}=exit")

    assert run_child(world) == 0

    assert sorted(world.effects()) == list(range(COUNT))


def test_unknown_failpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"commit\.befor"):
        failpoints.enable("commit.befor=exit")
