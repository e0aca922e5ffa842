"""One run of a consumer: takes deliveries in, carries out what the core decides, and leaves in order.

    receive ──► open (crash marker, suspects, keys that wait) ──► core ──► one task per command ──► acknowledge

Deliveries flow: more are taken in while others are handled, up to the bounds of ``prefetch``. Nothing is acknowledged
before the database has committed what became of it. A stop begins nothing more, waits for what is under way
(``drain``), gives the rest back to the broker and takes the crash marker away: it is never a death.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from outboxkit import outbox, schema_store
from outboxkit._failpoints import failpoint
from outboxkit.consumer import crash_marker, retries
from outboxkit.consumer.core import Core
from outboxkit.consumer.crash_marker import Owner
from outboxkit.consumer.observe.stats import Phase
from outboxkit.consumer.process import subject_of
from outboxkit.consumer.protocol import Seen, Standing
from outboxkit.consumer.settle import Settling
from outboxkit.consumer.transactions import (
    RetryOnDatabaseTrouble,
    Stopped,
    Transactions,
    TransactionScope,
    backoff_delay,
)
from outboxkit.dialects import DatabaseTrouble, commits_by_itself
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.rows import Dependency

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from outboxkit.brokers import Delivery, Subscriber
    from outboxkit.consumer.config import ConsumerConfig
    from outboxkit.consumer.protocol import Command, Job
    from outboxkit.consumer.retries import WaitingDelivery
    from outboxkit.schema_store import Reader

__all__ = ["Run"]

_log: Final = logging.getLogger(__name__)

IDLE: Final = timedelta(milliseconds=200)  #: how long to wait for deliveries before looking at stop and due retries
LEASE: Final = timedelta(seconds=5)  #: of the marker; below every broker's session time-out
_AWAY: Final = 5  # a broker that is away is asked about once a second
_LEAVE: Final = timedelta(seconds=5)  # for taking the marker away and telling the broker
_TYPE_LENGTH: Final = 200
_BEAT: Final = 1.0  # seconds between two looks at how the run stands
_COUNT_EVERY: Final = timedelta(seconds=5)  # the waiting room is counted no more often


class Run:
    """One run.

    Args:
        config: of the consumer.
        subscriber: where deliveries come from; closed at the end.
        stop: set when the run is to end.
        idle: how long to wait for deliveries before looking at due retries.
    """

    def __init__(
        self, config: ConsumerConfig, subscriber: Subscriber, stop: asyncio.Event, idle: timedelta | None = None
    ) -> None:
        self._config, self._subscriber, self._stop = config, subscriber, stop
        self._idle = IDLE if idle is None else idle
        self._rng = random.Random()  # noqa: S311  jitter needs no secrecy
        self._transactions = Transactions(config.sessions, config.policy.concurrency + 2)
        self._ending = asyncio.Event()  # nobody waits for the database any longer
        self._patience = RetryOnDatabaseTrouble(self._transactions, config.name, self._ending, config.tally)
        self._owner = Owner(config.name, LEASE, [uuid4()])
        self._core = Core(config.policy, self._rng)
        self._settling = Settling(config, self._core, self._patience, self._owner)
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._tally = config.tally
        self._largest = 1
        self._next_look = self._next_count = 0.0
        self._failed: BaseException | None = None

    async def work(self) -> None:
        """Runs until stopped.

        Raises:
            ConfigurationError: the tables are missing, the connection commits by itself, or the consumer was renamed.
        """
        drain = timedelta(0)  # who is cancelled, or fails, does not wait
        self._tally.began()
        companions = [asyncio.create_task(self._obey_stop()), asyncio.create_task(self._beat())]
        try:
            await self._start()
            companions.append(asyncio.create_task(self._renew()))
            companions[-1].add_done_callback(self._ended)
            await self._take_in()
            drain = self._config.drain
        except Stopped:
            return
        finally:
            self._tally.phase = Phase.STOPPING
            await _finished(asyncio.create_task(self._leave(drain, companions)))
            self._tally.phase = Phase.IDLE
        if self._failed is not None:
            raise self._failed

    # --- taking in -----------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        name, handlers = self._config.name, self._config.handlers

        def enter(given: TransactionScope) -> None:
            connection = given.session.connection()
            if commits_by_itself(connection):
                raise ConfigurationError(
                    f"{name}: the engine is in AUTOCOMMIT mode, where a failed handler takes nothing back and its "
                    "message counts as handled; use an engine with a transactional isolation level"
                )
            outbox.shards_of(connection)
            crash_marker.began(given.session, self._owner, self._cut_off_text())

        def start(given: TransactionScope) -> dict[str, Reader]:
            crash_marker.suspects(given.session, self._owner, starting=True)
            retries.sweep(given.session, name)
            return schema_store.record(given.session.connection(), name, handlers.contracts)

        await self._patience.run(enter)
        self._settling.readers = await self._patience.run(start)
        self._tally.phase, self._tally.heard = Phase.RUNNING, time.monotonic()
        _log.info("consumer.started", extra={"consumer": name, "topics": self._config.topics})

    async def _take_in(self) -> None:
        while not self._stop.is_set() and self._failed is None:
            await self._acknowledge()
            room = self._room()
            if not room:
                await self._something_changed()
                continue
            waiting = await self._due(room)
            deliveries = await self._receive(room, timedelta(0) if waiting else self._idle)
            if (waiting or deliveries) and not self._stop.is_set():
                failpoint("recv")
                await self._admit([*self._read(waiting), *self._read(deliveries)])

    def _room(self) -> int:
        """Number of deliveries to take in now. Half of the bound must be free: each opening is a transaction."""
        config, core = self._config, self._core
        if core.in_hand > config.prefetch // 2 or (core.in_hand and core.bytes_in_hand >= config.prefetch_bytes):
            return 0
        by_bytes = (config.prefetch_bytes - core.bytes_in_hand) // self._largest
        return max(1, min(config.prefetch - core.in_hand, by_bytes))

    async def _something_changed(self) -> None:
        self._changed.clear()
        try:
            await asyncio.wait_for(self._changed.wait(), self._idle.total_seconds())
        except TimeoutError:
            return

    async def _due(self, limit: int) -> list[WaitingDelivery]:
        """Waiting deliveries whose instant has come; the database is asked now and then."""
        now = asyncio.get_running_loop().time()
        if now < self._next_look:
            return []
        found = await self._patience.run(
            lambda given: retries.due(given.session, self._config.name, limit, self._core.waiting_in_hand)
        )
        if len(found) < limit:
            self._next_look = now + self._idle.total_seconds()
        return found

    async def _receive(self, limit: int, timeout: timedelta) -> Sequence[Delivery]:
        try:
            deliveries = await self._subscriber.receive(limit, timeout)
        except TransientBrokerError as error:
            self._cut_off(error)
            await self._patience.wait(backoff_delay(DatabaseTrouble.DOWN, _AWAY, self._rng))
            return ()
        self._tally.received += len(deliveries)
        self._is_connected()
        return deliveries

    def _is_connected(self) -> None:
        """Notes that the broker answers; at the start that is not enough, it must have given us something to read."""
        cut_off = self._tally.cut_offs.get(Dependency.BROKER)
        if cut_off is None or (cut_off.is_new and self._subscriber.assignment.sources is None):
            return
        if self._tally.found(Dependency.BROKER):
            _log.info("consumer.broker_back", extra={"consumer": self._config.name})

    def _read(self, found: Iterable[Delivery | WaitingDelivery]) -> list[Job]:
        now, jobs = datetime.now(UTC), []
        for one in found:
            waiting = one if isinstance(one, retries.WaitingDelivery) else None
            delivery = waiting.delivery if waiting else one
            jobs.append(self._config.reading.job(delivery, waiting, now))  # type: ignore[arg-type]
            self._largest = max(self._largest, jobs[-1].size)
            if jobs[-1].standing in (Standing.IGNORED, Standing.EXPIRED):
                self._not_wanted(jobs[-1])
        return jobs

    def _not_wanted(self, job: Job) -> None:
        """Counts what is not for this consumer, and says so once for each topic and type."""
        self._config.counts[job.standing.value] += 1
        message = subject_of(job).message
        type_name = message.type if message else ""
        if job.standing is Standing.IGNORED and self._tally.ignore(job.delivery.topic, type_name):
            about = {"consumer": self._config.name, "topic": job.delivery.topic, "type": type_name[:_TYPE_LENGTH]}
            _log.info("consumer.type_ignored", extra=about)

    async def _admit(self, jobs: list[Job]) -> None:
        self._core.open()
        wanted = [job for job in jobs if job.standing in (Standing.WANTED, Standing.UNREADABLE)]
        seen = await self._patience.run(lambda given: self._open(given, wanted)) if wanted else Seen(suspects={})
        failpoint("attempt.recorded")
        self._spawn(self._core.admit(jobs, seen))

    def _open(self, given: TransactionScope, jobs: Sequence[Job]) -> Seen:
        session, owner = given.session, self._owner
        suspects = crash_marker.suspects(session, owner)
        names = [job.identity for job in jobs]
        if again := [job.identity for job in jobs if job.delivery.redelivered]:
            # The process that had them may have died within its lease.
            suspects = dict.fromkeys(crash_marker.named_elsewhere(session, owner, again), 0) | suspects
        if not suspects.keys() & set(names):
            crash_marker.mark(session, owner, owner.ids[0], [*self._core.named(), *names])
        lanes = {job.lane for job in jobs if job.lane is not None and job.room_id is None}
        return Seen(suspects=suspects, waiting=retries.keys_waiting(session, self._config.name, lanes))

    # --- carrying out --------------------------------------------------------------------------------------------

    def _spawn(self, commands: Iterable[Command]) -> None:
        for command in commands:
            task = asyncio.create_task(self._carry_out(command))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _carry_out(self, command: Command) -> None:
        self._spawn(await self._settling.carry_out(command))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, Stopped):
            self._failed = self._failed or error

    async def _acknowledge(self) -> None:
        """Tells the broker; one that is away hands them out again, and the inbox knows them."""
        if not self._core.settled:
            return
        settled, self._core.settled = self._core.settled, []
        failpoint("ack.before")
        try:
            await self._subscriber.acknowledge(settled)
        except TransientBrokerError as error:
            self._cut_off(error)
        failpoint("ack.after")

    def _cut_off(self, error: TransientBrokerError) -> None:
        if self._tally.lost(Dependency.BROKER, error.message):
            _log.warning("consumer.broker_away", extra={"consumer": self._config.name, "error": error.message})

    def _cut_off_text(self) -> str | None:
        return None if self._tally.cut_off is None else self._tally.cut_off.to_text()

    async def _beat(self) -> None:
        """Says for probes that the event loop turns, and how the run stands."""
        tally = self._tally
        while True:
            tally.turned, tally.assignment = time.monotonic(), self._subscriber.assignment
            tally.in_hand, tally.busy = self._core.in_hand, self._core.under_way
            await asyncio.sleep(_BEAT)

    async def _renew(self) -> None:
        """Says that the run is alive, keeps its markers, and takes the common one away when nothing is in hand."""
        while True:
            await asyncio.sleep(LEASE.total_seconds() / 3)
            await self._patience.run(self._say_alive)
            self._tally.heard = time.monotonic()

    def _say_alive(self, given: TransactionScope) -> None:
        in_hand, lag = self._core.in_hand, self._subscriber.assignment.lag
        crash_marker.is_alive(given.session, self._owner, in_hand=in_hand, lag=lag, trouble=self._cut_off_text())
        if (now := time.monotonic()) >= self._next_count:
            self._next_count = now + _COUNT_EVERY.total_seconds()
            self._tally.backlog = retries.backlog(given.session.connection(), self._config.name)
        if in_hand:
            crash_marker.renew(given.session, self._owner)
        else:
            crash_marker.unmark(given.session, self._owner.ids[:1])

    # --- leaving -------------------------------------------------------------------------------------------------

    async def _obey_stop(self) -> None:
        """Sees to it that no message begins after a stop, whatever the run waits for."""
        await self._stop.wait()
        self._core.stop()
        self._ending.set()

    async def _leave(self, drain: timedelta, companions: Sequence[asyncio.Task[None]]) -> None:
        """Ends in order: nothing of it may raise, and all of it is tried."""
        self._core.stop()
        if self._tasks and drain:
            await self._drained(drain)
        self._ending.set()
        last = (*self._tasks, *companions)
        for task in last:
            task.cancel()
        await asyncio.gather(*last, return_exceptions=True)
        await self._try(self._acknowledge())
        if unsettled := self._core.unsettled():
            _log.info("consumer.released", extra={"consumer": self._config.name, "messages": len(unsettled)})
            await self._try(self._subscriber.release(unsettled))
        await self._try(self._patience.run(lambda given: crash_marker.ended(given.session, self._owner)))
        await self._subscriber.close()
        self._transactions.close()

    async def _drained(self, drain: timedelta) -> None:
        """Waits for what is under way, and for what follows from it."""
        deadline = asyncio.get_running_loop().time() + drain.total_seconds()
        while self._tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
            await asyncio.wait(self._tasks, timeout=left)
        if self._tasks:
            _log.warning("consumer.drain_over", extra={"consumer": self._config.name, "under_way": len(self._tasks)})

    async def _try(self, work: Any) -> None:
        """Does what is good to do at the end; what fails will be found at the next start."""
        try:
            await asyncio.wait_for(work, _LEAVE.total_seconds())
        except Exception as error:  # noqa: BLE001  whatever it is, the rest of the leaving must be tried
            about = {"consumer": self._config.name, "error": type(error).__name__}
            _log.warning("consumer.left_undone", extra=about)


async def _finished(task: asyncio.Task[None]) -> None:
    """Waits for a task to its end, also when the waiting is cancelled again and again."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    await task
    if cancelled is not None:
        raise cancelled
