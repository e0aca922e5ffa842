"""The declaration of a saga: a class whose attributes are its steps, in order."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Final, Generic, TypeVar, cast

from sqlalchemy.orm import Session

from outboxkit.errors import ConfigurationError
from outboxkit.events import EventType, event_type
from outboxkit.policy import duration
from outboxkit.saga.core import Plan, Step

__all__ = ["Declared", "Saga", "StepDeclaration", "pause", "started_by", "step", "wait"]

S = TypeVar("S")
Command = type | Callable[[Any], object]  #: an event class, or a function of the state

_MAX_TRIES: Final = 100
_MAX_NAME: Final = 100  # characters, of names of sagas and steps


@dataclass(frozen=True, slots=True, kw_only=True)
class StartDeclaration:
    """The event that begins a saga."""

    event: type
    topic: str
    keep: tuple[str, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDeclaration:
    """One step, as `step`, `wait` or `pause` declare it; its attributes are their parameters."""

    name: str = ""
    send: Callable[[Any], object] | None = None
    to: str = ""
    done: type | None = None
    failed: type | None = None
    replies: str = ""
    compensate: Callable[[Any], object] | None = None
    compensated: type | None = None
    timeout: timedelta | None = None
    tries: int = 1
    keep: tuple[str, ...] = ()

    @property
    def plan(self) -> Step:
        """The facts that decisions need."""
        return Step(
            name=self.name,
            sends=self.send is not None,
            answered=self.done is not None,
            undoable=self.compensate is not None,
            undo_answered=self.compensated is not None,
            timeout=self.timeout,
            tries=self.tries,
        )


def started_by(event: type, *, topic: str, keep: Sequence[str] | None = None) -> Any:
    """Declares the event that begins a saga; the state is made of its fields of the same names.

    Args:
        event: an event class.
        topic: where it comes from.
        keep: fields to take into the state; every field of both when None. Override `Saga.begin` for more.
    """
    return StartDeclaration(event=event, topic=topic, keep=None if keep is None else tuple(keep))


def step(
    command: Command,
    *,
    to: str,
    done: type | None = None,
    failed: type | None = None,
    replies: str = "",
    compensate: Command | None = None,
    compensated: type | None = None,
    timeout: timedelta | str | None = None,
    tries: int = 1,
    keep: Sequence[str] = (),
) -> Any:
    """Declares a step: a command, its answers, and the command that undoes it.

    A step that got no answer in time may have taken effect: after the last try it is undone, too, so a participant must
    take the compensation of something that never happened. All commands of an instance to one destination keep their
    order.

    Args:
        command: makes the command of the state; an event class is made of the state's fields of the same names.
        to: the queue or topic of the participant.
        done: the event that says that the step took effect; None: the step is done when its command is committed.
        failed: the event that says that it did not, and never will.
        replies: the topic of these events.
        compensate: makes the command that undoes the step, likewise; None: nothing to undo.
        compensated: the event that says that it is undone; None: it is when its command is committed.
        timeout: longest wait for one answer; None waits for ever.
        tries: commands sent before a step without an answer is given up, 1 to 100; the command is the same each time.
        keep: fields of ``done`` to take into the state.

    Raises:
        ConfigurationError: parameters that contradict each other.
    """
    if tries not in range(1, _MAX_TRIES + 1):
        raise ConfigurationError(f"tries is a number from 1 to {_MAX_TRIES}, got {tries!r}")
    if (failed or keep) and done is None:
        raise ConfigurationError("a step with failed=… or keep=… needs done=…, the event that says that it took effect")
    if (done or compensated) and not replies:
        raise ConfigurationError("a step whose answers are awaited needs replies=…, their topic")
    if tries > 1 and timeout is None:
        raise ConfigurationError("a step with several tries needs timeout=…, the wait for each")
    return StepDeclaration(
        send=_maker(command),
        to=to,
        done=done,
        failed=failed,
        replies=replies,
        compensate=None if compensate is None else _maker(compensate),
        compensated=compensated,
        timeout=None if timeout is None else duration(timeout),
        tries=tries,
        keep=tuple(keep),
    )


def wait(
    done: type,
    *,
    replies: str,
    failed: type | None = None,
    timeout: timedelta | str | None = None,
    keep: Sequence[str] = (),
) -> Any:
    """Declares a wait for a signal, such as a person's approval: a step without a command.

    Args:
        done: the event to wait for.
        replies: its topic.
        failed: the event of a refusal.
        timeout: longest wait; then the saga is compensated. None waits for ever.
        keep: fields of ``done`` to take into the state.
    """
    limit = None if timeout is None else duration(timeout)
    return StepDeclaration(done=done, failed=failed, replies=replies, timeout=limit, keep=tuple(keep))


def pause(time: timedelta | str) -> Any:
    """Declares a pause between two steps."""
    return StepDeclaration(timeout=duration(time))


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """The parts of a saga's class.

    Attributes:
        name: of the saga.
        version: of its steps: an instance goes on with the version that began it.
        key: field of every event of it that names the instance.
        state: class of its state.
        start: the event that begins it.
        steps: in order.
    """

    name: str
    version: int
    key: str
    state: type
    start: StartDeclaration
    steps: tuple[StepDeclaration, ...]

    @property
    def plan(self) -> Plan:
        """The facts that decisions need."""
        return [one.plan for one in self.steps]

    @property
    def state_type(self) -> EventType:
        """The contract under which the state is stored."""
        return EventType(name=f"{self.name}.state", cls=self.state)

    def answers(self) -> dict[tuple[str, str], list[tuple[int, str]]]:
        """The answers that are awaited: (topic, event name) → (step, ``done``, ``failed`` or ``compensated``)."""
        found: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for at, one in enumerate(self.steps):
            for meaning in ("done", "failed", "compensated"):
                if (event := getattr(one, meaning)) is not None:
                    found.setdefault((one.replies, event_type(event).name), []).append((at, meaning))
        return found


class Saga(Generic[S]):
    """A business transaction over several services: steps, and what undoes them when one fails.

    Subclass it with the class of its state, and declare its steps as attributes::

        class Checkout(Saga[CheckoutState], name="checkout", key="order_id"):
            start = started_by(OrderPlaced, topic="orders")
            reserve = step(
                ReserveStock,
                to="inventory",
                done=StockReserved,
                failed=StockRejected,
                replies="stock",
                compensate=ReleaseStock,
                timeout="2m",
                tries=3,
            )
            charge = step(ChargeCard, to="payments", done=CardCharged, failed=CardDeclined, replies="payments")

    Args:
        name: stable name; stored with every instance.
        key: field that names the instance in the event that begins it and in every answer.
        version: of the steps, from 1. Instances go on with the version that began them: keep the old class registered
            until none is left.

    Raises:
        ConfigurationError: the declaration contradicts itself.
    """

    declared: ClassVar[Declared]

    def __init_subclass__(cls, *, name: str, key: str, version: int = 1) -> None:
        super().__init_subclass__()
        state = _state_of(cls)
        starts = [value for value in vars(cls).values() if isinstance(value, StartDeclaration)]
        steps = tuple(
            dataclasses.replace(value, name=attribute)
            for attribute, value in vars(cls).items()
            if isinstance(value, StepDeclaration)
        )
        if not name or len(name) > _MAX_NAME or version < 1:
            raise ConfigurationError(f"a saga needs a name of 1 to {_MAX_NAME} characters and a version from 1")
        if len(starts) != 1 or not steps:
            raise ConfigurationError(f"{cls.__qualname__} needs one `started_by(…)` and at least one `step(…)`")
        cls.declared = Declared(name=name, version=version, key=key, state=state, start=starts[0], steps=steps)
        _check_keys(cls.declared)

    def begin(self, event: object) -> S:
        """Makes the state of the event that begins the saga: of its fields of the same names, unless overridden."""
        declared = self.declared
        names = declared.start.keep or [field.name for field in dataclasses.fields(declared.state)]
        given = {name: getattr(event, name) for name in names if hasattr(event, name)}
        return cast("S", declared.state(**given))

    def on_completed(self, state: S, session: Session) -> None:
        """Called in the transaction of the last step; override it to publish or to write."""

    def on_compensated(self, state: S, session: Session) -> None:
        """Called in the transaction in which the last step is undone; override it to publish or to write."""


def _state_of(cls: type) -> type:
    for base in getattr(cls, "__orig_bases__", ()):
        if typing.get_origin(base) is Saga and (found := typing.get_args(base)) and dataclasses.is_dataclass(found[0]):
            return cast("type", found[0])
    raise ConfigurationError(f"{cls.__qualname__} needs a dataclass as its state: class {cls.__name__}(Saga[State], …)")


def _check_keys(declared: Declared) -> None:
    """Every event of a saga must name the instance, or its answer could never be told from another's."""
    if declared.key not in _fields(declared.state):
        raise ConfigurationError(f"{declared.state.__qualname__} has no field {declared.key!r}, the saga's key")
    events = [
        declared.start.event,
        *(e for one in declared.steps for e in (one.done, one.failed, one.compensated) if e),
    ]
    for event in events:
        event_type(event)
        known = _fields(event)
        if known and declared.key not in known:
            raise ConfigurationError(f"{event.__qualname__} has no field {declared.key!r}, which names the instance")


def _fields(cls: type) -> set[str]:
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(getattr(cls, "__struct_fields__", None) or getattr(cls, "model_fields", None) or ())


def _maker(command: Command) -> Callable[[Any], object]:
    """An event class is made of the state's fields of the same names; a function is called with the state."""
    if not isinstance(command, type):
        return command
    event_type(command)
    names = _fields(command)

    def make(state: Any) -> object:
        return command(**{name: getattr(state, name) for name in names if hasattr(state, name)})

    return make
