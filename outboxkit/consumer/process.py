"""One message, once, in one transaction: admit → decode → handler → finish → commit."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy.util import await_only

from outboxkit import context, dead_letters, dialects, inbox, schema_store
from outboxkit._failpoints import failpoint
from outboxkit.consumer import replays, retries
from outboxkit.consumer.handlers import Handler, MessageContext, Want, decode, named_by_frame
from outboxkit.consumer.protocol import Failed
from outboxkit.consumer.reading import Cause
from outboxkit.consumer.transactions import (
    ConnectionBroken,
    TransactionEnded,
    TransactionScope,
    trouble_of,
)
from outboxkit.context import tracing
from outboxkit.dead_letters import Stage
from outboxkit.dead_letters.cause import place_of
from outboxkit.dialects import DatabaseTrouble
from outboxkit.errors import InboxConflict, OutboxKitError, RegistryUnavailable, SchemaNotFound
from outboxkit.headers import LETTER, REPLAY_FOR
from outboxkit.inbox import Admitted
from outboxkit.policy import Failure
from outboxkit.signals import DeadLetterRequested, RetryRequested

if TYPE_CHECKING:
    from outboxkit.consumer.protocol import Job
    from outboxkit.consumer.reading import Subject
    from outboxkit.message import Message

__all__ = ["MessageTransaction", "Result", "Try", "failure_of", "subject_of"]


T = TypeVar("T")


class Result(StrEnum):
    """Result of a message that did not fail."""

    HANDLED = "handled"
    DUPLICATE = "duplicate"
    IGNORED = "ignored"  #: no handler here knows its type, or it is a replay for another consumer
    GONE = "gone"  #: another process took the waiting delivery
    EXPIRED = "expired"  #: its time was over


_MAX_BUSY: Final = 10  # a handler that is always in somebody's way has failed
_MAX_BROKEN: Final = 3  # a message whose handler breaks its connection so often has failed
_ENDED_BY_SERVER: Final = {
    "25P03": "the server ended the session: idle_in_transaction_session_timeout (25P03); the handler waited too long",
    "25P04": "the server ended the session: transaction_timeout (25P04); the handler took too long",
}


@dataclass(slots=True)
class Try:
    """One attempt, and how far it came."""

    job: Job
    number: int
    stage: Stage = Stage.READ
    is_foreign: bool = False  # trouble with a database of the handler's own says nothing about ours
    broken: int = 0  # how often the connection broke while the handler had it
    began: float = 0.0  # the latest transaction, by the machine's monotonic clock
    in_handler: float = 0.0  # seconds in handlers, of this transaction

    def gives_up(self, trouble: DatabaseTrouble, times: int) -> bool:
        """Whether trouble with the database is the handler's own.

        A connection that broke under the handler is an outage at first. But each further attempt begins with an answer
        of the database on a new connection, so when it breaks again and again, the message is what breaks it.
        """
        is_breaking = self.broken >= (_MAX_BROKEN if self.number == 1 else 1)
        return self.is_foreign or is_breaking or (trouble is DatabaseTrouble.BUSY and times > _MAX_BUSY)


class _OutOfTime(OutboxKitError):
    """The handler did not end in time."""


class _Left(OutboxKitError):
    """The handler was cancelled from inside, or tried to end the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageTransaction:
    """Rules by which a consumer handles a message.

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
        return self._void_if_broken(given, tried, lambda: self._attempt(given, tried))

    def attempt_batch(self, given: TransactionScope, tried: Try, jobs: Sequence[Job]) -> list[Result]:
        """Handles fresh messages together, in their order, unless that was done.

        Transaction: the caller's own, which it commits.
        Guarantee: as `attempt`, for all of them or for none.

        Raises:
            Exception: whatever went wrong with one of them: all must be handled singly.
        """
        return self._void_if_broken(given, tried, lambda: self._attempt_batch(given, tried, jobs))

    def _void_if_broken(self, given: TransactionScope, tried: Try, work: Callable[[], T]) -> T:
        """Whatever was raised, an attempt whose connection broke says nothing about the message."""
        connection = given.session.connection()
        tried.began, tried.in_handler = time.monotonic(), 0.0
        try:
            return work()
        except Exception as error:
            if connection.invalidated or dialects.sqlstate_of(error) in _ENDED_BY_SERVER:
                tried.broken += tried.stage in (Stage.HANDLER, Stage.COMMIT)
                raise ConnectionBroken from error
            raise

    def _attempt(self, given: TransactionScope, tried: Try) -> Result:
        subject = subject_of(tried.job)
        if subject.waiting is not None and not retries.take(given.session, subject.waiting):
            return Result.GONE
        message, handler = _message(tried.job), subject.handler
        if handler is None:
            handler = named_by_frame(message, subject.candidates, self._resolver(given))
            message = replace(message, type=handler.pattern if handler else "")
        if handler is None or self._is_for_another(given, message):
            if subject.waiting is not None:
                retries.remove(given.session, self.consumer, subject.waiting)
            return Result.IGNORED
        return self._once(given, tried, message, handler)

    def _is_for_another(self, given: TransactionScope, message: Message) -> bool:
        """True if it is the replay of another consumer's letter. A header alone says nothing: anybody may set it."""
        name = message.header(REPLAY_FOR)
        return name not in (None, self.consumer) and replays.is_replay(given.session.connection(), str(name), message)

    def _once(self, given: TransactionScope, tried: Try, message: Message, handler: Handler) -> Result:
        tried.stage = Stage.ADMIT
        admission = inbox.admit(given.session, self.consumer, message)
        if admission.kind is Admitted.CONFLICT:
            raise InboxConflict(f"the id {message.id!r} came again with other content")
        is_first = admission.kind is Admitted.FIRST
        outcome = self._call(given, tried, [message], handler) if is_first else None
        tried.stage = Stage.COMMIT
        if message.header(LETTER) is not None:
            dead_letters.mark_replayed(given.session.connection(), self.consumer, message)
        waiting = subject_of(tried.job).waiting
        if waiting is not None:
            retries.remove(given.session, self.consumer, waiting)
        if is_first:
            given.session.flush()  # so that nothing of the handler's comes after the last statement
            inbox.finish(given.session, self.consumer, message, outcome)
            failpoint("commit.before")
        return Result.HANDLED if is_first else Result.DUPLICATE

    def _attempt_batch(self, given: TransactionScope, tried: Try, jobs: Sequence[Job]) -> list[Result]:
        tried.stage = Stage.ADMIT
        admitted = inbox.admit_batch(given.session, self.consumer, [_message(job) for job in jobs])
        if admitted is None:
            raise OutboxKitError("one of the batch must be looked at alone")
        outcomes: list[tuple[Message, bytes | None]] = []
        for handler, together in _calls([job for job, is_first in zip(jobs, admitted, strict=True) if is_first]):
            tried.job = together[0]
            messages = [_message(job) for job in together]
            outcome = self._call(given, tried, messages, handler)
            outcomes += [(message, outcome) for message in messages]
        tried.stage = Stage.COMMIT
        given.session.flush()
        if outcomes:
            inbox.finish_batch(given.session, self.consumer, outcomes)
        failpoint("commit.before")
        return [Result.HANDLED if is_first else Result.DUPLICATE for is_first in admitted]

    def _call(self, given: TransactionScope, tried: Try, messages: Sequence[Message], handler: Handler) -> bytes | None:
        connection, message = given.session.connection(), messages[0]
        tried.stage = Stage.DECODE
        contract, resolve = handler.event_type, self._resolver(given)
        values = [one if contract is None else decode(one, contract, resolve) for one in messages]
        tried.stage = Stage.HANDLER
        about = self._context(tried, message)
        failpoint("handler.before")
        parameters = {
            Want.MESSAGE: values[0],
            Want.MESSAGES: values,
            Want.SESSION: given.session,
            Want.ASYNC_SESSION: given.asynchronous,
            Want.CONTEXT: about,
        }
        called = time.monotonic()
        try:
            with self._conversation(message, about), _in_handler(given):
                outcome = handler.call(parameters)
                if inspect.isawaitable(outcome):
                    outcome = await_only(_in_time(outcome, self.timeout))
        except SystemExit as error:
            raise _Left("the handler called sys.exit(): an exception says what is wrong") from error
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            raise _Left("the handler was cancelled from inside") from error
        except TransactionEnded as error:
            raise OutboxKitError(f"{error.message} ({place_of(error)})") from error
        except Exception as error:
            tried.is_foreign = trouble_of(error) is DatabaseTrouble.DOWN and not connection.invalidated
            raise
        finally:
            tried.in_handler += time.monotonic() - called
        if datetime.now(UTC) > about.deadline:
            raise _OutOfTime(f"the handler took longer than {self.timeout}")
        failpoint("handler.after")
        return outcome if isinstance(outcome, bytes) else None

    @contextmanager
    def _conversation(self, message: Message, about: MessageContext) -> Iterator[None]:
        """Lets what the handler does belong to its message: span, conversation and deadline."""
        since = message.recorded_at or message.occurred_at
        age = None if since is None else datetime.now(UTC) - since
        span = tracing.processing(message, consumer=self.consumer, attempt=about.attempt, age=age)
        with span, context.handling(message), context.bounded(about.deadline):
            yield

    def _context(self, tried: Try, message: Message) -> MessageContext:
        now, delivery = datetime.now(UTC), tried.job.delivery
        ends = now + self.timeout
        return MessageContext(
            id=message.id,
            type=message.type,
            topic=message.topic,
            key=message.key,
            headers=message.headers,
            attempt=tried.number,
            first_seen=tried.job.first_failed_at or now,
            deadline=min(ends, message.expires_at) if message.expires_at and message.expires_at > now else ends,
            correlation_id=message.correlation_id or message.id,
            partition=delivery.partition,
            offset=delivery.offset,
            timestamp=delivery.timestamp,
            routing_key=delivery.routing_key,
            reply_to=delivery.reply_to,
            content_encoding=delivery.content_encoding,
            redelivered=delivery.redelivered,
            is_tombstone=delivery.payload is None,
        )

    def _resolver(self, given: TransactionScope) -> Callable[[str], str]:
        def resolve(name: str) -> str:
            if name not in self.schemas:
                self.schemas[name] = schema_store.schema_text(given.session.connection(), name, self.resolve)
            return self.schemas[name]

        return resolve


def subject_of(job: Job) -> Subject:
    """Returns what the shell knows of a job."""
    subject: Subject = job.subject  # type: ignore[assignment]  # made by `Reading.job`
    return subject


def _message(job: Job) -> Message:
    message = subject_of(job).message
    if message is None:
        raise OutboxKitError("an attempt needs a message")
    return message


def _calls(jobs: Sequence[Job]) -> Iterator[tuple[Handler, list[Job]]]:
    """The calls of a batch, in order: one for each message, or one for those in a row whose handler takes a list."""
    together: list[Job] = []
    for job, after in zip_longest(jobs, jobs[1:]):
        handler = subject_of(job).handler
        if handler is None:
            raise OutboxKitError("an attempt needs a handler")
        together.append(job)
        if not handler.takes_list or after is None or subject_of(after).handler is not handler:
            yield handler, together
            together = []


def failure_of(error: Exception, tried: Try, poison: tuple[type[BaseException], ...]) -> Failed:
    """Returns what an error in a message's own transaction means."""
    links, cause = list(_signals(error)), Cause(tried.stage, _cause_of(error))
    for link in links:
        if isinstance(link, RetryRequested):
            return Failed(failure=Failure.HANDLER, delay=link.delay, is_free=link.is_free, cause=cause)
        if isinstance(link, _OutOfTime):
            return Failed(failure=Failure.TIMEOUT, cause=cause)
        if tried.stage is Stage.ADMIT and isinstance(link, InboxConflict):
            return Failed(failure=Failure.CONFLICT, cause=cause)
        # Although both are a `SchemaError`: a registry comes back, and somebody may register the schema.
        is_outage = isinstance(link, RegistryUnavailable) or (isinstance(link, SchemaNotFound) and not link.final)
        if isinstance(link, (DeadLetterRequested, *poison)) and not is_outage:
            return Failed(failure=Failure.POISON, cause=Cause(tried.stage, link))
    return Failed(failure=Failure.HANDLER, cause=cause)


def _signals(error: BaseException) -> list[BaseException]:
    """An error, or the members of a group: a task group wraps what its tasks raise."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [link for member in error.exceptions for link in _signals(member)]


def _cause_of(error: BaseException) -> BaseException:
    """The error to tell of: in a group the first member, and words of ours where the server ended the session."""
    if isinstance(error, ConnectionBroken):
        words = _ENDED_BY_SERVER.get(dialects.sqlstate_of(error), "")
        text = words or f"the connection to the database broke {_MAX_BROKEN} times while this message was handled"
        told = OutboxKitError(text)
        told.__cause__ = error.__cause__
        return told
    return _signals(error)[0]


class _in_handler:  # noqa: N801  reads as a statement: with _in_handler(given)
    """Guards the session's transaction while the handler has it."""

    __slots__ = ("_session",)

    def __init__(self, given: TransactionScope) -> None:
        self._session: Any = given.session

    def __enter__(self) -> None:
        self._session.in_handler = True

    def __exit__(self, *_: object) -> None:
        self._session.in_handler = False


async def _in_time(work: Awaitable[Any], timeout: timedelta) -> Any:
    try:
        async with asyncio.timeout(timeout.total_seconds()) as scope:
            return await work
    except TimeoutError as error:
        if scope.expired():
            raise _OutOfTime(f"the handler did not end within {timeout}") from error
        raise


def _is_cancelled() -> bool:
    """Whether somebody cancels the attempt; a thread cannot be."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop here
        return False
    return task is not None and task.cancelling() > 0
