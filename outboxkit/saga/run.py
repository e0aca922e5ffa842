"""The shell of a saga: handlers of a consumer that load an instance, ask the core, and write what follows.

Row, commands and timers of one event are written in the handler's transaction, which also holds the inbox row: a crash
anywhere neither repeats nor forgets a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from outboxkit import context, tables
from outboxkit.capture.emit import send
from outboxkit.codecs import codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import ConfigurationError, DecodeError, SagaNotFound
from outboxkit.events import event, event_type
from outboxkit.message import Message, MessageLimits
from outboxkit.saga import core, store
from outboxkit.saga.core import Compensate, Do, Done, Ended, Failed, Happened, Instance, Resume, TimedOut, Undo, Undone
from outboxkit.saga.declare import Declared, Saga, StepDeclaration
from outboxkit.saga.store import SagaRow

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.consumer import Consumer

__all__ = ["compensate", "register", "resume"]

_log: Final = logging.getLogger(__name__)

_MAX_KEY: Final = MessageLimits().key  # bytes; it is the ordering key of the saga's commands, too
IDEMPOTENCY_KEY: Final = "idempotency-key"  #: header of every command: the same for each try of a step
_MEANINGS: Final[dict[str, Callable[[int], Happened]]] = {"done": Done, "failed": Failed, "compensated": Undone}


@event("outboxkit.saga.timer")
@dataclass(frozen=True, slots=True)
class SagaTimer:
    """The end of a wait; a scheduled message to the saga itself."""

    saga: str
    key: str
    number: int


@event("outboxkit.saga.request")
@dataclass(frozen=True, slots=True)
class SagaRequest:
    """An operator's wish: ``resume`` or ``compensate``."""

    saga: str
    key: str
    wish: str


_WISHES: Final[dict[str, Happened]] = {"resume": Resume(), "compensate": Compensate()}


def register(consumer: Consumer, *sagas: type[Saga[Any]]) -> None:
    """Lets a consumer run a saga: it handles the event that begins it, every answer, and its own timers.

    Args:
        consumer: of this saga alone; its sessions lead to the database of the saga's rows.
        sagas: the class, and those of earlier versions that still have instances.

    Raises:
        ConfigurationError: sagas of different names, or two of one version.
    """
    versions = {saga.declared.version: saga() for saga in sagas}
    if not sagas or len({saga.declared.name for saga in sagas}) > 1 or len(versions) < len(sagas):
        raise ConfigurationError("register takes one saga, in one class for each version of it")
    engine = _Engine(versions)
    newest = engine.newest.declared
    _on(consumer, newest.start.event, {"topic": newest.start.topic}, engine.begin)
    for topic, name, cls in sorted(engine.answers(), key=lambda found: found[:2]):
        if (topic, cls) != (newest.start.topic, newest.start.event):
            _on(consumer, cls, {"topic": topic}, engine.answer(topic, name))
    for own, handle in ((SagaTimer, engine.timer), (SagaRequest, engine.request)):
        _on(consumer, own, {"queue": timers_of(newest.name)}, handle)


def timers_of(saga: str) -> str:
    """The queue or topic of a saga's own timers."""
    return f"{saga}.timers"


def resume(connection: Connection | Session, saga: str, key: str, *, by: str, why: str = "") -> None:
    """Asks for the current command of an instance to be sent again; the saga's consumer does it.

    Transaction: joins the caller's; does not commit.
    Guarantee: the request goes through the outbox, in order with the saga's own timers of this instance.

    Writes: ``outbox_messages``, ``outbox_audit``.

    Args:
        connection: of the saga's database.
        saga: its name.
        key: of the instance.
        by: who asks, for the audit.
        why: the reason, for the audit.

    Raises:
        SagaNotFound: there is no such instance.
    """
    _ask(connection, SagaRequest(saga, key, "resume"), by=by, why=why)


def compensate(connection: Connection | Session, saga: str, key: str, *, by: str, why: str = "") -> None:
    """Asks for what was done to be undone; a saga that has ended, or is being undone, is left as it is.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `resume`.

    Writes: as `resume`.

    Args:
        connection: of the saga's database.
        saga: its name.
        key: of the instance.
        by: who asks, for the audit.
        why: the reason, for the audit.

    Raises:
        SagaNotFound: there is no such instance.
    """
    _ask(connection, SagaRequest(saga, key, "compensate"), by=by, why=why)


def _ask(where: Connection | Session, request: SagaRequest, *, by: str, why: str) -> None:
    session = where if isinstance(where, Session) else Session(where)
    connection = session.connection()
    if store.get(connection, request.saga, request.key) is None:
        raise SagaNotFound(f"there is no instance {request.key} of the saga {request.saga}")
    send(session, request, to=timers_of(request.saga), key=request.key)
    session.flush()
    entry = {"who": by, "action": f"saga.{request.wish}", "target": f"{request.saga} {request.key}", "why": why}
    connection.execute(tables.outbox_audit.insert().values(**entry))


Handle = Callable[[Any, Session], None]


def _on(consumer: Consumer, cls: type, source: dict[str, str], handle: Handle) -> None:
    """Registers a handler that fits the consumer's sessions."""

    async def asynchronous(event: object, session: AsyncSession) -> None:
        await session.run_sync(lambda plain: handle(event, plain))

    def synchronous(event: object, session: Session) -> None:
        handle(event, session)

    chosen: Any = asynchronous if isinstance(consumer.config.sessions, async_sessionmaker) else synchronous
    chosen.__annotations__["event"] = cls
    consumer.on(cls, **source)(chosen)


class _Engine:
    """One saga in all its versions."""

    def __init__(self, versions: dict[int, Saga[Any]]) -> None:
        self._versions = versions
        self.newest = versions[max(versions)]

    def answers(self) -> set[tuple[str, str, type]]:
        """Every answer of every version: (topic, event name, class)."""
        found = set()
        for saga in self._versions.values():
            for one in saga.declared.steps:
                for cls in filter(None, (one.done, one.failed, one.compensated)):
                    found.add((one.replies, _name_of(cls), cls))
        return found

    def begin(self, event: Any, session: Session) -> None:
        """Starts an instance; one that exists already is left alone."""
        saga = self.newest
        declared, key, state = saga.declared, _key_of(saga.declared, event), saga.begin(event)
        instance, commands = core.begin(declared.plan)
        row = store.values_of(instance) | {
            "saga": declared.name,
            "key": key,
            "version": declared.version,
            "step": _step_name(declared, instance),
            "state": _stored(declared, state),
            "history": store.with_entry((), _now(), f"started by {_name_of(type(event))}", *_texts(declared, commands)),
            "due_at": store.due(_wait_of(commands)),
            "correlation_id": context.correlation_id(),
        }
        if not store.add(session.connection(), row):
            _log.info("saga.started_already", extra={"saga": declared.name})
            return
        _Instance(saga, key, session).carry_out(state, commands)

    def answer(self, topic: str, name: str) -> Handle:
        """Makes the handler of one event: what it means depends on the instance's version and step."""

        def handle(event: Any, session: Session) -> None:
            row, saga = self._locked(session, _key_of(self.newest.declared, event))
            meanings = saga.declared.answers().get((topic, name), [])
            happened = [_MEANINGS[meaning](step) for step, meaning in meanings]
            self._advance(session, row, saga, happened, text=name, event=event)

        return handle

    def timer(self, timer: SagaTimer, session: Session) -> None:
        """Ends a wait, if it is still the current one."""
        row, saga = self._locked(session, timer.key)
        if timer.number == row.instance.number:
            self._advance(session, row, saga, [TimedOut(timer.number)], text="out of time")

    def request(self, request: SagaRequest, session: Session) -> None:
        """Carries an operator's wish out."""
        row, saga = self._locked(session, request.key)
        self._advance(session, row, saga, [_WISHES[request.wish]], text=f"{request.wish}, by an operator")

    def _locked(self, session: Session, key: str) -> tuple[SagaRow, Saga[Any]]:
        name = self.newest.declared.name
        row = store.get(session.connection(), name, key, lock=True)
        if row is None:
            raise SagaNotFound(f"there is no instance {key} of the saga {name}: its beginning may still be on the way")
        if row.version not in self._versions:
            known = ", ".join(map(str, sorted(self._versions)))
            raise SagaNotFound(
                f"{name} {key} was begun by version {row.version} of the saga, and only {known} is registered: "
                "register the class of that version, too, until none of its instances is left"
            )
        return row, self._versions[row.version]

    def _advance(
        self,
        session: Session,
        row: SagaRow,
        saga: Saga[Any],
        happened: Sequence[Happened],
        *,
        text: str,
        event: object = None,
    ) -> None:
        declared, state = saga.declared, _restored(saga.declared, row.state)
        for one in happened:
            if (found := core.advance(declared.plan, row.instance, one)) is not None:
                instance, commands = found
                if isinstance(one, Done):
                    state = _kept(declared, one.step, state, event)
                break
        else:
            history = store.with_entry(row.history, _now(), f"{text}: changes nothing")
            store.change(session.connection(), row, row.instance, history=history)
            return
        store.change(
            session.connection(),
            row,
            instance,
            step=_step_name(declared, instance),
            state=_stored(declared, state),
            history=store.with_entry(row.history, _now(), text, *_texts(declared, commands)),
            due_at=store.due(_wait_of(commands)),
        )
        if instance.status is core.Status.STUCK:
            _log.error("saga.stuck", extra={"saga": declared.name, "step": _step_name(declared, instance)})
        _Instance(saga, row.key, session).carry_out(state, commands)


@dataclass(frozen=True, slots=True)
class _Instance:
    """One instance inside the transaction of what happened to it."""

    saga: Saga[Any]
    key: str
    session: Session

    def carry_out(self, state: Any, commands: Sequence[core.Command]) -> None:
        """Writes what follows: commands, timers, and the application's own end."""
        declared = self.saga.declared
        for command in commands:
            match command:
                case Do(at) if (make := declared.steps[at].send) is not None:
                    self._send(make(state), declared.steps[at])
                case Undo(at) if (make := declared.steps[at].compensate) is not None:
                    self._send(make(state), declared.steps[at], "/undo")
                case core.Wait(number, time):
                    timer = SagaTimer(declared.name, self.key, number)
                    send(self.session, timer, to=timers_of(declared.name), key=self.key, delay=time)
                case Ended(status):
                    is_complete = status is core.Status.COMPLETED
                    (self.saga.on_completed if is_complete else self.saga.on_compensated)(state, self.session)
                    _log.info("saga.ended", extra={"saga": declared.name, "status": status.value})

    def _send(self, command: object, step: StepDeclaration, what: str = "") -> None:
        operation = f"{self.saga.declared.name}/{self.key}/{step.name}{what}"
        send(self.session, command, to=step.to, key=self.key, headers={IDEMPOTENCY_KEY: operation})


def _name_of(cls: type) -> str:
    """The name of an event class on the wire."""
    return event_type(cls).name


def _key_of(declared: Declared, event: Any) -> str:
    found = str(event.get(declared.key) if isinstance(event, dict) else getattr(event, declared.key))
    if (size := len(found.encode())) > _MAX_KEY:
        what = f"{declared.key}, which names an instance of {declared.name}"
        raise DecodeError(f"{what}, has {size:,} bytes, at most {_MAX_KEY:,} are kept")
    return found


def _kept(declared: Declared, step: int, state: Any, event: object) -> Any:
    kept = {name: getattr(event, name) for name in declared.steps[step].keep}
    return replace(state, **kept) if kept else state


def _stored(declared: Declared, state: Any) -> bytes:
    return codec_named("json").encode(state, declared.state_type).payload


def _restored(declared: Declared, stored: bytes) -> Any:
    message = Message(id="", type=declared.state_type.name, topic="", payload=stored)
    plain = codec_named("json").decode(message, declared.state_type, lambda name: name)
    return from_plain(declared.state, plain)


def _step_name(declared: Declared, instance: Instance) -> str:
    if instance.has_ended:
        return ""
    return declared.steps[instance.undo[0] if instance.undo else instance.step].name


def _texts(declared: Declared, commands: Sequence[core.Command]) -> list[str]:
    """The history's words for what is done."""
    words: list[str] = []
    for command in commands:
        match command:
            case Do(at):
                words.append(f"{declared.steps[at].name}: sent to {declared.steps[at].to}")
            case Undo(at):
                words.append(f"{declared.steps[at].name}: undo sent to {declared.steps[at].to}")
            case Ended(status):
                words.append(status.value)
    return words


def _wait_of(commands: Sequence[core.Command]) -> timedelta | None:
    return next((command.time for command in commands if isinstance(command, core.Wait)), None)


def _now() -> datetime:
    return datetime.now(UTC)
