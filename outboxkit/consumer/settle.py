"""Settling: carries the core's commands out, each in a transaction of its own, and reports how they ended.

This is the boundary around one message: whatever a delivery does to us ends in the core as handled, failed, stored or
lost, and the run goes on.
"""

from __future__ import annotations

import inspect
import logging
import time
from asyncio import wait_for
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from outboxkit import dead_letters, schema_store
from outboxkit._failpoints import failpoint
from outboxkit.consumer import crash_marker, replays, retries
from outboxkit.consumer.process import MessageTransaction, Result, Try, failure_of, subject_of
from outboxkit.consumer.protocol import MAX_DEATHS, Append, Attempt, Bury, Drop, Failed, Hold
from outboxkit.consumer.reading import Cause
from outboxkit.consumer.retries import FailedAttempt
from outboxkit.consumer.transactions import RetryOnDatabaseTrouble, Stopped, TransactionScope
from outboxkit.dead_letters import DeadLetter, Stage, topic_copy
from outboxkit.errors import OutboxKitError
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outboxkit.consumer.config import ConsumerConfig
    from outboxkit.consumer.core import Core
    from outboxkit.consumer.crash_marker import Owner
    from outboxkit.consumer.protocol import Command, Job, Store
    from outboxkit.message import Message
    from outboxkit.schema_store import Reader

__all__ = ["Settling"]

_log: Final = logging.getLogger(__name__)


class Settling:
    """Carries commands out for one run.

    Args:
        config: of the consumer.
        core: is told how each command ended.
        patience: runs the transactions.
        owner: whose markers the suspects get.
    """

    def __init__(self, config: ConsumerConfig, core: Core, patience: RetryOnDatabaseTrouble, owner: Owner) -> None:
        self._config, self._core, self._patience, self._owner = config, core, patience, owner
        self._transaction = MessageTransaction(
            consumer=config.name, timeout=config.timeout, resolve=config.resolve, schemas=config.schemas
        )
        self.readers: dict[str, Reader] = {}

    async def carry_out(self, command: Command) -> Sequence[Command]:
        """Carries a command out; returns what the core wants next.

        Raises:
            asyncio.CancelledError: the run ends; the core knows that nothing came of the attempt.
        """
        if isinstance(command, Attempt):
            return await self._attempt(command)
        try:
            await self._store(command)
        except Stopped:
            return []
        except Exception as error:  # noqa: BLE001  the boundary around one message: our own SQL about it
            return self._lost(command, error)
        return self._core.stored(command)

    # --- attempts ------------------------------------------------------------------------------------------------

    async def _attempt(self, attempt: Attempt) -> Sequence[Command]:
        settled = False
        try:
            async with self._marked(attempt):
                failed = await self._try(attempt.jobs, attempt.number)
            settled = True
        except Stopped:
            return self._core.abandoned(attempt)
        finally:
            if not settled:
                self._core.stop()
        return self._core.attempted(attempt, failed, datetime.now(UTC))

    async def _try(self, jobs: Sequence[Job], number: int) -> Failed | None:
        tried = Try(jobs[0], number)

        def attempt(given: TransactionScope) -> list[Result]:
            if len(jobs) == 1:
                return [self._transaction.attempt(given, tried)]
            return self._transaction.attempt_batch(given, tried, jobs)

        try:
            results = await self._patience.run(attempt, tried.gives_up)
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001  the boundary around the user's handler
            self._measure(tried)
            return failure_of(error, tried, self._config.policy.retry.poison_classes)
        failpoint("commit.after")
        self._measure(tried)
        self._config.counts.update(results)
        for job, result in zip(jobs, results, strict=True):
            message = subject_of(job).message
            if result is Result.HANDLED and message is not None:
                self._took_effect(message)
        return None

    def _measure(self, tried: Try) -> None:
        tally = self._config.tally
        if tried.began:
            tally.transaction.add(time.monotonic() - tried.began)
        if tried.in_handler:
            tally.handler.add(tried.in_handler)

    def _took_effect(self, message: Message) -> None:
        since = message.recorded_at or message.occurred_at
        if since is not None:
            self._config.tally.critical_time.add((datetime.now(UTC) - since).total_seconds())
        self._check_order(message)

    def _marked(self, attempt: Attempt) -> AbstractAsyncContextManager[None]:
        return _Marked(self._patience, self._owner, attempt) if attempt.alone else nullcontext()

    def _check_order(self, message: Message) -> None:
        check = self._config.order_check
        if check is not None and (later := check.handled(message)) is not None:
            self._config.counts["out of order"] += 1
            fields = {"message_id": message.id, "topic": message.topic, "sequence": message.sequence, "after": later}
            _log.warning("message.out_of_order", extra={"consumer": self._config.name, **fields})

    # --- storing what became of a job ----------------------------------------------------------------------------

    async def _store(self, command: Store) -> None:
        match command:
            case Hold():
                await self._hold(command)
            case Append():
                await self._append(command)
            case Bury():
                await self._bury(command)
            case Drop():
                await self._drop(command)

    async def _hold(self, hold: Hold) -> None:
        name, job = self._config.name, hold.job
        spent = FailedAttempt(hold.delay, hold.attempts, _words_of(hold.failed))
        waiting = subject_of(job).waiting

        def store(given: TransactionScope) -> None:
            if waiting is not None:
                retries.postpone(given.session, waiting, spent)
            else:
                retries.defer(given.session, name, job.delivery, spent)
                retries.append(given.session, name, [follower.delivery for follower in hold.followers])

        await self._patience.run(store)
        failpoint("retry.scheduled")
        self._config.counts["retried"] += 1
        self._say("message.waits", job, attempts=spent.attempts, error=spent.error, delay=spent.delay.total_seconds())

    async def _append(self, append: Append) -> None:
        name, lane = self._config.name, append.jobs[0].lane
        deliveries = [job.delivery for job in append.jobs]

        def store(given: TransactionScope) -> None:
            others = [one for one in deliveries if not replays.took_parked_place(given.session, name, one)]
            retries.append(given.session, name, others)

        await self._patience.run(store)
        if lane is not None:
            await self._patience.run(lambda given: retries.promote(given.session, name, lane))
        self._config.counts["followed"] += len(deliveries)

    async def _drop(self, drop: Drop) -> None:
        waiting = [found for job in drop.jobs if (found := subject_of(job).waiting) is not None]

        def store(given: TransactionScope) -> None:
            for one in waiting:
                retries.remove(given.session, self._config.name, one)

        await self._patience.run(store)

    def _lost(self, command: Store, error: Exception) -> Sequence[Command]:
        jobs = command.jobs
        words = dead_letters.words_of(error)
        if isinstance(command, Drop):
            _log.error("message.stays", extra={"consumer": self._config.name, "error": words})
            return []
        if isinstance(command, Bury) and command.reduced:
            # Not acknowledged: the broker still has it, and the next start tries again.
            self._config.counts["stuck"] += 1
            self._say("message.stuck", jobs[0], error=words)
        return self._core.lost(command, Failed(failure=Failure.INVALID, cause=Cause(Stage.ADMIT, error)))

    # --- dead letters --------------------------------------------------------------------------------------------

    async def _bury(self, command: Bury) -> None:
        letter = self._letter(command)
        failpoint("dlq.before")
        buried = await self._patience.run(lambda given: self._write_letter(given, command, letter))
        failpoint("dlq.after")
        if command.parks and command.job.lane is not None and buried is None:  # nobody parked the key
            lane = command.job.lane
            await self._patience.run(lambda given: retries.promote(given.session, self._config.name, lane))
        if buried is not None:
            self._config.counts.update(["buried", *["parked"] * command.parks])
            failure = command.failed.failure.value
            self._say("message.dead", command.job, attempts=command.attempts, failure=failure, error=letter.error)
            await self._run_hook(buried)

    def _write_letter(self, given: TransactionScope, command: Bury, letter: DeadLetter) -> DeadLetter | None:
        connection, name, job = given.session.connection(), self._config.name, command.job
        waiting = subject_of(job).waiting
        if waiting is not None and not retries.take(given.session, waiting, waits=True):
            return None
        if command.failed.failure is Failure.CRASH:
            crash_marker.clear(given.session, self._owner, [job.identity])
        writer = self._config.schemas.get(letter.writer_schema)
        if writer is not None:  # so that a replay can judge without a registry
            schema_store.remember_writer(connection, name, letter.type, (letter.writer_schema, writer))
        stored = dead_letters.bury(connection, letter)
        if stored is not None and command.parks:
            retries.park(given.session, name, job.delivery, stored.id, room_id=job.room_id)
        elif waiting is not None:
            retries.remove(given.session, name, waiting)
        retries.append(given.session, name, [follower.delivery for follower in command.followers])
        if stored is not None and self._config.copy_to is not None and not command.reduced:
            topic_copy.write(connection, stored, job.delivery, self._config.copy_to, writer=writer or "")
        return stored

    def _letter(self, command: Bury) -> DeadLetter:
        job, subject, cause = command.job, subject_of(command.job), _cause(command.failed)
        delivery = job.delivery
        if command.failed.failure is Failure.CRASH:
            cause = Cause(Stage.HANDLER, OutboxKitError(f"the process died {MAX_DEATHS} times while handling it"))
        letter = dead_letters.of_delivery(
            _keepable(delivery) if command.reduced else delivery,
            None if command.reduced else subject.message,
            consumer=self._config.name,
            kind=(Kind.COMMAND if delivery.topic in self._config.queues else Kind.EVENT).value,
            failure=command.failed.failure,
            stage=cause.stage,
            error=cause.error,
            attempts=command.attempts,
            keep_error_text=self._config.keep_error_text,
        )
        if command.reduced:
            words = "its id, its headers or its key cannot be stored as they are; what can be kept is here"
            return replace(letter, error=f"{words}: {letter.error}", first_failed_at=job.first_failed_at)
        return replace(self._with_schemas(letter, cause.stage), first_failed_at=job.first_failed_at)

    def _with_schemas(self, letter: DeadLetter, stage: Stage) -> DeadLetter:
        reader, text = self.readers.get(letter.type, ("", ""))
        schemas = self._config.schemas  # known if decoding came so far, maybe under a registry's id
        writer = schemas.get(letter.writer_schema, "")
        name = schema_store.fingerprint_of(writer) if writer else letter.writer_schema
        schemas.update({name: writer} if writer else {})
        problems = schema_store.problems(text, writer) if text and writer and stage is Stage.DECODE else None
        return replace(letter, writer_schema=name, reader_schema=reader, problems=problems)

    async def _run_hook(self, letter: DeadLetter) -> None:
        hook = self._config.dead_letter_hooks.get(letter.type)
        if hook is None:
            return
        try:
            result = hook(letter)
            if inspect.isawaitable(result):
                await wait_for(result, self._config.timeout.total_seconds())
        except Exception as error:  # noqa: BLE001  the user's function: the letter is stored, whatever it does
            about = {"letter": str(letter.id), "error": dead_letters.words_of(error)}
            _log.warning("consumer.dead_letter_hook_failed", extra=about)

    def _say(self, event: str, job: Job, **facts: object) -> None:
        message = subject_of(job).message
        about = {"consumer": self._config.name, "topic": job.delivery.topic, "origin": job.delivery.origin}
        _log.warning(event, extra=about | {"message_id": message.id if message else "", **facts})


class _Marked:
    """Keeps a suspect under a crash marker of its own while it is handled."""

    def __init__(self, patience: RetryOnDatabaseTrouble, owner: Owner, attempt: Attempt) -> None:
        self._patience, self._owner, self._attempt = patience, owner, attempt
        self._id = uuid4()

    async def __aenter__(self) -> None:
        names = [job.identity for job in self._attempt.jobs]
        self._owner.ids.append(self._id)
        await self._patience.run(lambda given: crash_marker.mark(given.session, self._owner, self._id, names))

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            return  # a run that ends takes all its markers away
        names = [job.identity for job in self._attempt.jobs]

        def unmark(given: TransactionScope) -> None:
            crash_marker.unmark(given.session, [self._id])
            crash_marker.clear(given.session, self._owner, names)

        await self._patience.run(unmark)
        self._owner.ids.remove(self._id)


def _keepable(delivery: Any) -> Any:
    """A delivery without what a database may refuse: of each header what can be encoded, of the key a bounded part."""
    headers = [(_clean(name), value or b"") for name, value in delivery.headers]
    origin = _clean(delivery.origin)
    return replace(delivery, topic=_clean(delivery.topic), headers=tuple(headers), origin=origin)


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\ufffd")[:1000]


def _cause(failed: Failed) -> Cause:
    cause: Cause = failed.cause or Cause(Stage.HANDLER, OutboxKitError("it failed"))  # type: ignore[assignment]
    return cause


def _words_of(failed: Failed) -> str:
    return dead_letters.words_of(_cause(failed).error)
