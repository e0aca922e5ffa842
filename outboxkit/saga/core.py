"""The saga's decisions: an instance and what happened go in, the next instance and what to do come out. Pure.

::

            start            done of the last step
    (none) ───────▶ RUNNING ───────────────────────▶ COMPLETED
                       │ failed, or no answer in time
                       ▼
                  COMPENSATING ────────────────────▶ COMPENSATED
                       │ an undo has no answer in time ▲
                       ▼            resume             │
                     STUCK ────────────────────────────┘

Steps that are done are undone in reverse order. A step that got no answer may have taken effect, so it is undone, too;
a step that answered "failed" had none. Every wait has a number: an answer to an earlier wait changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum

__all__ = [
    "Compensate",
    "Do",
    "Done",
    "Ended",
    "Failed",
    "Happened",
    "Instance",
    "Plan",
    "Resume",
    "Status",
    "Step",
    "TimedOut",
    "Undo",
    "Undone",
    "Wait",
    "advance",
    "begin",
]


class Status(StrEnum):
    """The state of a saga's instance."""

    RUNNING = "running"
    COMPENSATING = "compensating"
    COMPLETED = "completed"
    COMPENSATED = "compensated"
    STUCK = "stuck"  #: an undo got no answer: an operator resumes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The facts about a step that decisions need.

    Attributes:
        name: unique in its saga.
        sends: a command goes out.
        answered: an answer is awaited; else the step is done when its command is committed, or its time is over.
        undoable: a command undoes it.
        undo_answered: an answer to that command is awaited.
        timeout: longest wait for an answer, and the whole wait of a step that is only a pause; None waits for ever.
        tries: commands sent before a step without an answer has failed.
    """

    name: str
    sends: bool = True
    answered: bool = True
    undoable: bool = False
    undo_answered: bool = False
    timeout: timedelta | None = None
    tries: int = 1


Plan = Sequence[Step]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """The progress of one saga.

    Attributes:
        status: its state.
        step: index of the current step while it runs.
        number: of the current wait; grows with each.
        tries: commands sent for the current step, or for the current undo.
        done: indexes of the steps that took effect, in order.
        undo: indexes of the steps that are still to be undone, the current one first.
    """

    status: Status = Status.RUNNING
    step: int = 0
    number: int = 0
    tries: int = 0
    done: tuple[int, ...] = ()
    undo: tuple[int, ...] = ()

    @property
    def has_ended(self) -> bool:
        """True when nothing more will happen by itself."""
        return self.status in (Status.COMPLETED, Status.COMPENSATED)


# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Done:
    """The answer of a step that took effect."""

    step: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer of a step that took no effect."""

    step: int


@dataclass(frozen=True, slots=True)
class Undone:
    """The answer of an undo."""

    step: int


@dataclass(frozen=True, slots=True)
class TimedOut:
    """The end of a wait without an answer."""

    number: int


@dataclass(frozen=True, slots=True)
class Resume:
    """An operator's wish to send the current command again."""


@dataclass(frozen=True, slots=True)
class Compensate:
    """An operator's wish to undo what was done."""


Happened = Done | Failed | Undone | TimedOut | Resume | Compensate

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Do:
    """Send a step's command."""

    step: int


@dataclass(frozen=True, slots=True)
class Undo:
    """Send the command that undoes a step."""

    step: int


@dataclass(frozen=True, slots=True)
class Wait:
    """Be woken after a time, under the number of this wait."""

    number: int
    time: timedelta


@dataclass(frozen=True, slots=True)
class Ended:
    """Tell the application that the saga has ended."""

    status: Status


Command = Do | Undo | Wait | Ended


def begin(plan: Plan) -> tuple[Instance, tuple[Command, ...]]:
    """Starts an instance with its first step."""
    return _enter(plan, Instance(), 0)


def advance(plan: Plan, instance: Instance, happened: Happened) -> tuple[Instance, tuple[Command, ...]] | None:
    """Decides what follows; None when it changes nothing: an answer came again, late, or out of turn."""
    match happened:
        case Done(step) if _awaits(instance, step) and plan[step].answered:
            return _enter(plan, replace(instance, done=(*instance.done, step)), step + 1)
        case Failed(step) if _awaits(instance, step) and plan[step].answered:
            return _compensate(plan, instance, instance.done)
        case Undone(step) if instance.undo[:1] == (step,) and instance.status in (Status.COMPENSATING, Status.STUCK):
            return _undo(plan, replace(instance, undo=instance.undo[1:]))
        case TimedOut(number) if number == instance.number:
            return _out_of_time(plan, instance)
        case Resume() if not instance.has_ended:
            return _again(plan, replace(instance, tries=0))
        case Compensate() if instance.status is Status.RUNNING:
            return _compensate(plan, instance, (*instance.done, instance.step))
    return None


def _awaits(instance: Instance, step: int) -> bool:
    return instance.status is Status.RUNNING and instance.step == step


def _enter(plan: Plan, instance: Instance, step: int) -> tuple[Instance, tuple[Command, ...]]:
    """Goes on to a step, and through those that await nothing."""
    commands: list[Command] = []
    while step < len(plan):
        at = plan[step]
        instance = replace(instance, step=step, number=instance.number + 1, tries=1)
        if at.sends:
            commands.append(Do(step))
        if at.answered or (not at.sends and at.timeout is not None):
            return instance, (*commands, *_wait(at, instance.number))
        instance = replace(instance, done=(*instance.done, step))
        step += 1
    ended = replace(instance, status=Status.COMPLETED, step=step, number=instance.number + 1)
    return ended, (*commands, Ended(Status.COMPLETED))


def _out_of_time(plan: Plan, instance: Instance) -> tuple[Instance, tuple[Command, ...]] | None:
    if instance.status is Status.COMPENSATING:
        if instance.tries < plan[instance.undo[0]].tries:
            return _again(plan, instance)
        return replace(instance, status=Status.STUCK, number=instance.number + 1), ()
    if instance.status is not Status.RUNNING:
        return None
    step = plan[instance.step]
    if not step.answered:  # a pause is over
        return _enter(plan, replace(instance, done=(*instance.done, instance.step)), instance.step + 1)
    if step.sends and instance.tries < step.tries:
        return _again(plan, instance)
    return _compensate(plan, instance, (*instance.done, instance.step))


def _again(plan: Plan, instance: Instance) -> tuple[Instance, tuple[Command, ...]]:
    """Sends the current command once more, under a new wait."""
    instance = replace(instance, number=instance.number + 1, tries=instance.tries + 1)
    if instance.status is Status.RUNNING:
        step = plan[instance.step]
        return instance, (*((Do(instance.step),) if step.sends else ()), *_wait(step, instance.number))
    instance = replace(instance, status=Status.COMPENSATING)
    return instance, (Undo(instance.undo[0]), *_wait(plan[instance.undo[0]], instance.number))


def _compensate(plan: Plan, instance: Instance, steps: tuple[int, ...]) -> tuple[Instance, tuple[Command, ...]]:
    undo = tuple(step for step in reversed(steps) if plan[step].undoable)
    return _undo(plan, replace(instance, status=Status.COMPENSATING, undo=undo))


def _undo(plan: Plan, instance: Instance) -> tuple[Instance, tuple[Command, ...]]:
    """Undoes the next step, and those behind it that await no answer."""
    commands: list[Command] = []
    instance = replace(instance, status=Status.COMPENSATING)
    while instance.undo:
        step = plan[instance.undo[0]]
        instance = replace(instance, number=instance.number + 1, tries=1)
        commands.append(Undo(instance.undo[0]))
        if step.undo_answered:
            return instance, (*commands, *_wait(step, instance.number))
        instance = replace(instance, undo=instance.undo[1:])
    ended = replace(instance, status=Status.COMPENSATED, number=instance.number + 1)
    return ended, (*commands, Ended(Status.COMPENSATED))


def _wait(step: Step, number: int) -> tuple[Command, ...]:
    return () if step.timeout is None else (Wait(number, step.timeout),)
