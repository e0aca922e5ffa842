"""Every saga ends completed or compensated, whatever its participants do and however late they answer."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from datetime import timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from outboxkit.saga import core
from outboxkit.saga.core import Do, Done, Ended, Failed, Happened, Instance, Status, Step, TimedOut, Undo, Undone, Wait

STEPS = st.builds(
    Step,
    name=st.just("step"),
    sends=st.just(True),
    answered=st.booleans(),
    undoable=st.booleans(),
    undo_answered=st.booleans(),
    timeout=st.sampled_from([None, timedelta(seconds=1)]),
    tries=st.integers(1, 3),
)
PAUSES = st.just(Step(name="pause", sends=False, answered=False, timeout=timedelta(seconds=1)))
PLANS = st.lists(st.one_of(STEPS, STEPS, PAUSES), min_size=1, max_size=5)


@dataclass
class World:
    """Participants that take commands in order, once for each operation, and answer in any order, late or twice."""

    plan: core.Plan
    rng: random.Random
    instance: Instance = field(default_factory=Instance)
    commands: deque[Do | Undo] = field(default_factory=deque)
    answers: list[Happened] = field(default_factory=list)
    effects: dict[int, str] = field(default_factory=dict)
    sent: Counter[tuple[str, int]] = field(default_factory=Counter)
    ended: list[Status] = field(default_factory=list)

    def do(self, found: tuple[Instance, tuple[core.Command, ...]] | None) -> None:
        if found is None:
            return
        self.instance, commands = found
        for command in commands:
            match command:
                case Do(step) | Undo(step):
                    self.commands.append(command)
                    self.sent[type(command).__name__, step] += 1
                case Wait(number, _):
                    self.answers.append(TimedOut(number))
                case Ended(status):
                    self.ended.append(status)

    def participate(self) -> None:
        command = self.commands.popleft()
        step = command.step
        if isinstance(command, Undo):
            self.effects[step] = "undone"
            answer: Happened = Undone(step)
            awaited = self.plan[step].undo_answered
        else:
            # One operation has one effect and one answer, however often its command comes.
            self.effects.setdefault(step, self.rng.choice(("made", "made", "refused")))
            answer = Failed(step) if self.effects[step] == "refused" else Done(step)
            if self.effects[step] == "refused" and not self.plan[step].answered:
                self.effects[step] = "made"  # nobody listens to a refusal, so there is none
            awaited = self.plan[step].answered
        if awaited:
            self.answers += [answer] * self.rng.choice((1, 1, 2))

    def run(self) -> None:
        self.do(core.begin(self.plan))
        for _ in range(10_000):
            if self.commands and (not self.answers or self.rng.random() < 0.5):
                self.participate()
            elif self.answers:
                self.do(core.advance(self.plan, self.instance, self.answers.pop(self.rng.randrange(len(self.answers)))))
            elif self.instance.status is Status.STUCK:
                self.do(core.advance(self.plan, self.instance, core.Resume()))
            else:
                return
        raise AssertionError("it does not end")


@given(PLANS, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_saga_ends_completed_or_compensated(plan: list[Step], seed: int) -> None:
    world = World(plan, random.Random(seed))

    world.run()

    assert world.instance.has_ended
    assert world.ended == [world.instance.status]
    made = {step for step, effect in world.effects.items() if effect == "made"}
    if world.instance.status is Status.COMPLETED:
        assert made == {step for step, one in enumerate(plan) if one.sends}
        assert not [what for what, _ in world.sent if what == "Undo"]
    else:
        assert not [step for step in made if plan[step].undoable]


@given(PLANS, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_what_is_undone_is_undone_once_and_in_reverse_order(plan: list[Step], seed: int) -> None:
    plan = [replace(step, undo_answered=False) for step in plan]
    world = World(plan, random.Random(seed))

    world.run()

    undone = [step for what, step in world.sent if what == "Undo"]
    assert undone == sorted(undone, reverse=True)
    assert all(world.sent["Undo", step] == 1 for step in undone)


def test_an_answer_to_an_earlier_wait_changes_nothing() -> None:
    plan = [Step(name="charge", timeout=timedelta(seconds=1), tries=2, undoable=True)]
    first, _ = core.begin(plan)
    second, again = core.advance(plan, first, TimedOut(first.number)) or (first, ())

    assert again == (Do(0), Wait(second.number, timedelta(seconds=1)))
    assert core.advance(plan, second, TimedOut(first.number)) is None
    given_up = core.advance(plan, second, TimedOut(second.number))
    assert given_up is not None
    assert given_up[1] == (Undo(0), Ended(Status.COMPENSATED))
    assert core.advance(plan, given_up[0], Done(0)) is None
