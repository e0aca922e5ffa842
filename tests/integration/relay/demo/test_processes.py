"""The demo's children: each an own process, of whose end people are told why."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from outboxkit_relay.demo import processes
from outboxkit_relay.demo.processes import Child, Failed, Processes

PROGRAMS = {
    "echo": """
import os, sys
print("up", os.environ["OUTBOXKIT_DATABASE_URL"], sys.argv[1], flush=True)
for line in sys.stdin:
    print(line.upper(), end="", flush=True)
""",
    "quitter": "import sys; sys.exit('the queue is gone')",
    "silent": "raise SystemExit(3)",
    "sleeper": "import signal; print('asleep', flush=True); signal.pause()",
}


@pytest.fixture
def children() -> Iterator[Processes]:
    with processes.started(database_url="sqlite:///x.db") as found:
        for name, program in PROGRAMS.items():
            (found.folder / f"demo_{name}.py").write_text(program)
        found.settings.pop("registry_url")
        yield found


def _asleep(children: Processes) -> Child:
    child = children.run("sleeper", "demo_sleeper")
    processes.until(lambda: child.log.read_text() == "asleep\n", children, "it sleeps")
    return child


def test_one_answers_with_its_settings_and_is_told_more(children: Processes) -> None:
    child = children.run("echo", "demo_echo", "loud", answers=True)

    assert child.read_line() == "up sqlite:///x.db loud"
    child.say("hello")
    assert child.read_line() == "HELLO"
    child.dismiss()
    assert child.process.exitcode == 0


def test_one_that_was_killed_is_not_quoted(children: Processes) -> None:
    child = children.run("payments", "demo_echo", "x", answers=True)
    child.read_line()
    child.log.write_text("all is well")

    assert child.kill() == -signal.SIGKILL
    assert child.last_words() == "killed by SIGKILL"
    with pytest.raises(Failed, match="payments ended: killed by SIGKILL"):
        children.watch()


@pytest.mark.parametrize(("name", "words"), [("quitter", "the queue is gone"), ("silent", "exit code 3")])
def test_one_that_gave_up_is_quoted(children: Processes, name: str, words: str) -> None:
    child = children.run(name, f"demo_{name}")

    child.process.join()

    assert child.last_words() == words


def test_one_that_stands_still_is_seen_and_ends_all_the_same(children: Processes) -> None:
    child = _asleep(children)
    assert not child.stands_still()

    child.send(signal.SIGSTOP)
    processes.until(child.stands_still, children, "it stands still")

    assert children.end(child) == -signal.SIGTERM


def test_one_ends_when_nobody_holds_its_input_any_more(children: Processes) -> None:
    child = _asleep(children)

    child.dismiss()

    assert child.process.exitcode == 1


def test_a_command_has_an_exit_code_and_output(children: Processes) -> None:
    done = children.command("status")

    assert done.code == 2
    assert "outboxkit init" in done.out
