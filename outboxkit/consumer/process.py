"""HandleOnce: one message, once, in one transaction: admit → decode → handler → finish → commit."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from outboxkit import context, dead_letters, inbox, schema_store
from outboxkit._failpoints import failpoint
from outboxkit.brokers import Delivery
from outboxkit.consumer import retries
from outboxkit.consumer.handlers import Handler, Handlers, MessageContext, Want, decode
from outboxkit.consumer.retries import WaitingDelivery
from outboxkit.consumer.transactions import TransactionScope, trouble_of
from outboxkit.dead_letters import Stage
from outboxkit.dialects import DatabaseTrouble
from outboxkit.errors import DecodeError, InboxConflict, OutboxKitError, RegistryUnavailable
from outboxkit.headers import LETTER, REPLAY_FOR, from_wire
from outboxkit.inbox import Admitted
from outboxkit.message import Message
from outboxkit.policy import Failure
from outboxkit.signals import DeadLetterRequested, RetryRequested

__all__ = ["Failed", "HandleOnce", "HandlerLookup", "Job", "Result", "Try", "failure_of", "job_of"]


class Result(StrEnum):
    """What became of a message that did not fail."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"  #: no handler here knows its type, or it is a replay for another consumer
    GONE = "gone"  #: another process took the waiting delivery


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One delivery to handle.

    Attributes:
        delivery: as the broker handed it out, now or before it waited.
        identity: its name in the marker.
        message: what its headers say; None when they cannot be read.
        unreadable: why not.
        handler: who handles it; None when nobody here does.
        waiting: its row in the waiting room.
    """

    delivery: Delivery
    identity: str
    message: Message | None
    unreadable: OutboxKitError | None = None
    handler: Handler | None = None
    waiting: WaitingDelivery | None = None


@dataclass(slots=True)
class Try:
    """One attempt, and how far it came."""

    job: Job
    number: int
    stage: Stage = Stage.READ
    is_foreign: bool = False  # trouble with a database of the handler's own says nothing about ours

    def gives_up(self, trouble: DatabaseTrouble, times: int) -> bool:
        """Whether trouble with the database is the handler's own."""
        return self.is_foreign or (trouble is DatabaseTrouble.BUSY and times > _MAX_BUSY)


@dataclass(frozen=True, slots=True)
class Failed:
    """Why an attempt failed; ``delay`` is what the handler asked for."""

    failure: Failure
    stage: Stage
    error: Exception
    delay: timedelta | None = None


class _OutOfTime(OutboxKitError):
    """The handler did not end in time."""


class _Cancelled(OutboxKitError):
    """The handler was cancelled from inside."""


_MAX_BUSY: Final = 10  # a handler that is always in somebody's way has failed
_ENDED: Final = (
    "the handler must not commit: its effect commits together with the inbox row; use session.begin_nested()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandleOnce:
    """How a consumer handles a message.

    Attributes:
        consumer: its name.
        timeout: how long a handler may take.
        resolve: schema text for a fingerprint that ``outbox_schemas`` does not know.
        schemas: texts that were found, by fingerprint; a schema never changes.
    """

    consumer: str
    timeout: timedelta
    resolve: Callable[[str], str] | None
    schemas: dict[str, str]

    def attempt(self, given: TransactionScope, tried: Try) -> Result:
        """Handles one message, unless that was done.

        Transaction: the caller's own, which it commits.
        Guarantee: FIRST and the effect commit together; for a waiting delivery its row goes with them.

        Raises:
            Exception: whatever went wrong; `failure_of` says what it means.
        """
        job, session = tried.job, given.session
        if job.waiting is not None and not retries.take(session, job.waiting):
            return Result.GONE
        if job.unreadable is not None:
            raise job.unreadable
        result = Result.IGNORED
        if job.message is not None and job.handler is not None:
            result = self._once(given, tried, job.message, job.handler)
        elif job.waiting is not None:
            retries.remove(session, self.consumer, job.waiting)
        return result

    def _once(self, given: TransactionScope, tried: Try, message: Message, handler: Handler) -> Result:
        tried.stage = Stage.ADMIT
        admission = inbox.admit(given.session, self.consumer, message)
        if admission.kind is Admitted.CONFLICT:
            raise InboxConflict(f"the id {message.id!r} came again with other content")
        is_first = admission.kind is Admitted.FIRST
        outcome = self._call(given, tried, message, handler) if is_first else None
        tried.stage = Stage.COMMIT
        if message.header(LETTER) is not None:
            dead_letters.mark_replayed(given.session.connection(), self.consumer, message)
        if tried.job.waiting is not None:
            retries.remove(given.session, self.consumer, tried.job.waiting)
        if is_first:
            given.session.flush()  # so that nothing of the handler's comes after the last statement
            inbox.finish(given.session, self.consumer, message, outcome)
            failpoint("commit.before")
        return Result.HANDLED if is_first else Result.DUPLICATE

    def _call(self, given: TransactionScope, tried: Try, message: Message, handler: Handler) -> bytes | None:
        connection = given.session.connection()
        tried.stage = Stage.DECODE
        subject = message if handler.event_type is None else decode(message, handler.event_type, self._resolver(given))
        tried.stage = Stage.HANDLER
        about = self._context(tried, message)
        failpoint("handler.before")
        parameters = {
            Want.MESSAGE: subject,
            Want.SESSION: given.session,
            Want.ASYNC_SESSION: given.asynchronous,
            Want.CONTEXT: about,
        }
        try:
            with context.handling(message), _no_commit(given.session):
                outcome = handler.call(parameters)
                if inspect.isawaitable(outcome):
                    outcome = await_only(_in_time(outcome, self.timeout))
        except Exception as error:
            tried.is_foreign = trouble_of(error) is DatabaseTrouble.DOWN and not connection.invalidated
            raise
        if datetime.now(UTC) > about.deadline:
            raise _OutOfTime(f"the handler took longer than {self.timeout}")
        failpoint("handler.after")
        return outcome if isinstance(outcome, bytes) else None

    def _context(self, tried: Try, message: Message) -> MessageContext:
        now, waiting = datetime.now(UTC), tried.job.waiting
        return MessageContext(
            id=message.id,
            type=message.type,
            topic=message.topic,
            key=message.key,
            headers=message.headers,
            attempt=tried.number,
            first_seen=waiting.first_failed_at if waiting else now,
            deadline=now + self.timeout,
            correlation_id=message.correlation_id or message.id,
        )

    def _resolver(self, given: TransactionScope) -> Callable[[str], str]:
        def resolve(name: str) -> str:
            if name not in self.schemas:
                self.schemas[name] = schema_store.schema_text(given.session.connection(), name, self.resolve)
            return self.schemas[name]

        return resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerLookup:
    """Who handles what.

    Attributes:
        name: of the consumer.
        handlers: by topic and type.
        message_id: finds the id of a foreign message without one.
    """

    name: str
    handlers: Handlers
    message_id: Callable[[Message], str] | None


def job_of(delivery: Delivery, waiting: WaitingDelivery | None, consumer: HandlerLookup) -> Job:
    """What a consumer has to do with a delivery. Never raises: what cannot be read is told in the job."""
    identity = retries.identity(delivery)
    try:
        message = from_wire(delivery.topic, delivery.key, delivery.headers, delivery.payload or b"")
    except DecodeError as error:
        return Job(delivery=delivery, identity=identity, message=None, unreadable=error, waiting=waiting)
    is_ours = message.header(REPLAY_FOR) in (None, consumer.name)
    handler = consumer.handlers.find(delivery.topic, message.type) if is_ours else None
    if handler is None:
        return Job(delivery=delivery, identity=identity, message=message, waiting=waiting)
    found = message.id or (consumer.message_id(message) if consumer.message_id else "")
    fault = _fault_of(found, message.source)
    message = replace(message, id=found) if fault is None else replace(message, id="", source="")
    return Job(
        delivery=delivery, identity=identity, message=message, unreadable=fault, handler=handler, waiting=waiting
    )


def _fault_of(message_id: str, source: str) -> DecodeError | None:
    """Why an inbox cannot keep this identity."""
    if not message_id:
        return DecodeError("the message has no id: nothing tells it from its copies; give the Consumer message_id=…")
    if "\0" in message_id + source:
        return DecodeError("the id or the source holds a NUL character, which no database can store")
    return None


def failure_of(error: Exception, stage: Stage, poison: tuple[type[BaseException], ...]) -> Failed:
    """What an error in a message's own transaction means."""
    if isinstance(error, RetryRequested):
        return Failed(Failure.HANDLER, stage, error, error.delay)
    if isinstance(error, _OutOfTime):
        return Failed(Failure.TIMEOUT, stage, error)
    if stage is Stage.ADMIT and isinstance(error, InboxConflict):
        return Failed(Failure.CONFLICT, stage, error)
    is_poison = stage is Stage.READ or isinstance(error, (DeadLetterRequested, *poison))
    is_poison &= not isinstance(error, RegistryUnavailable)  # an outage, although it is a `SchemaError`
    return Failed(Failure.POISON if is_poison else Failure.HANDLER, stage, error)


async def _in_time(work: Awaitable[Any], timeout: timedelta) -> Any:
    try:
        async with asyncio.timeout(timeout.total_seconds()) as scope:
            return await work
    except TimeoutError as error:
        if scope.expired():
            raise _OutOfTime(f"the handler did not end within {timeout}") from error
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _Cancelled from error


@contextlib.contextmanager
def _no_commit(session: Session) -> Iterator[None]:
    event.listen(session, "before_commit", _refuse)
    try:
        yield
    finally:
        event.remove(session, "before_commit", _refuse)


def _refuse(session: Session) -> None:
    if session.get_nested_transaction() is None:
        raise OutboxKitError(_ENDED)
