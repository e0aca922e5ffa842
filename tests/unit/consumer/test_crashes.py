"""A process may die anywhere: one effect per message, and a message that kills is found and buried."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from outboxkit import _failpoints, tables
from outboxkit.dead_letters.letter import Filter, find
from outboxkit.policy import Failure
from tests.consumer_child import COUNT, KILLED, run_child
from tests.consumer_fixture import ConsumerFixture

POINTS = [
    "recv",
    "attempt.recorded",
    "inbox.inserted",
    "handler.before",
    "handler.after",
    "commit.before",
    "commit.after",
    "ack.before",
    "ack.after",
]
EXITED = 137


@pytest.mark.parametrize("point", POINTS)
def test_a_death_at_any_point_leaves_one_effect_per_message(world: ConsumerFixture, point: str) -> None:
    assert run_child(world.url, armed=f"{point}=exit") == EXITED

    assert run_child(world.url) == 0

    assert sorted(world.effects()) == list(range(COUNT))
    assert world.count(tables.dead_letters) == 0
    assert world.count(tables.inbox_batches) == 0, "nobody is suspect any more"


def test_a_message_that_kills_the_process_is_buried_after_three_deaths_and_no_other(world: ConsumerFixture) -> None:
    deaths = 0
    while (status := run_child(world.url, killer=3)) != 0:
        assert status == KILLED
        deaths += 1

    assert deaths == 3
    with world.engine.connect() as connection:
        (letter,) = find(connection, Filter())
    assert (letter.message_id, letter.failure, letter.attempts) == ("m3", Failure.CRASH, 3)
    assert sorted(world.effects()) == [0, 1, 2, 4, 5]
    assert world.count(tables.inbox_batches) == 0


def test_a_death_between_waiting_and_acknowledging_keeps_the_order(world: ConsumerFixture) -> None:
    assert run_child(world.url, armed="handler.before=raise,retry.scheduled=exit") == EXITED

    assert run_child(world.url) == 0

    effects = world.effects()
    assert sorted(effects) == list(range(COUNT))
    assert all([n for n in effects if n % 3 == key] == [key, key + 3] for key in range(3))


@pytest.mark.parametrize("point", ["dlq.before", "dlq.after", "ack.before"])
def test_a_death_while_burying_leaves_one_letter(world: ConsumerFixture, point: str) -> None:
    assert run_child(world.url, poison=2, armed=f"{point}=exit") == EXITED

    assert run_child(world.url, poison=2) == 0

    with world.engine.connect() as connection:
        assert [letter.message_id for letter in find(connection, Filter())] == ["m2"]
    assert sorted(world.effects()) == [0, 1, 3, 4, 5]


def test_unknown_failpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"commit\.befor"):
        _failpoints.enable("commit.befor=exit")


def test_a_thread_does_not_leave_a_failpoint_at_which_the_process_stands_still() -> None:
    program = """
import threading
from outboxkit import _failpoints as failpoints

def count():
    for number in (1, 2, 3):
        failpoints.failpoint("recv")
        print(number, flush=True)

failpoints.enable("recv=stop:2")
thread = threading.Thread(target=count)
thread.start()
thread.join()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        try:
            _, status = os.waitpid(child.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            assert child.stdout is not None
            assert os.read(child.stdout.fileno(), 99) == b"1\n"  # the second hit has not returned
            child.send_signal(signal.SIGCONT)
            assert child.stdout.read() == b"2\n3\n"
            assert child.wait() == 0
        finally:
            child.kill()
