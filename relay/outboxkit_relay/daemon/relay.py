"""The relay daemon's shell: carries out what the core decides.

Everything here is I/O: the decisions are in `outboxkit_relay.core.step`, the SQL in `outboxkit.outbox` and the
dialects.
Three threads share the work, each with a database connection of its own: the dispatcher (the thread that calls
`Relay.run`) alone touches the state; the *reader* reads, claims and keeps the lease; the *settler* commits what became
of messages. Acknowledgements arrive from the publisher's own thread. All comes back to the dispatcher by one queue.

No broker call is made while a transaction is open.
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError

from outboxkit import dead_letters, dialects, outbox
from outboxkit._failpoints import failpoint
from outboxkit.errors import LeaseLost
from outboxkit.outbox import pauses
from outboxkit.policy import Followers, full_jitter
from outboxkit_relay import logs
from outboxkit_relay.core.protocol import (
    Answered,
    Burial,
    Command,
    ConfirmLease,
    Event,
    Fenced,
    Fetch,
    Fetched,
    GiveUp,
    LeaseConfirmed,
    Leave,
    Owned,
    Publish,
    Rebalance,
    Rejoin,
    Rescan,
    RescanResult,
    Settle,
    Settled,
    StopRelay,
    Tick,
    Woken,
)
from outboxkit_relay.core.state import LONG_AGO, RelayConfig, State
from outboxkit_relay.core.step import step
from outboxkit_relay.daemon.db_thread import Worker
from outboxkit_relay.observe.stats import RelayStats, Tally
from outboxkit_relay.store import due, leases, operator_requests, stopped_keys

if TYPE_CHECKING:
    from concurrent.futures import Future

    from sqlalchemy import Connection, Engine

    from outboxkit.brokers import Publisher, Receipts
    from outboxkit.rows import Row

__all__ = ["Relay"]

_log: Final = logging.getLogger(__name__)

_AWAY: Final = (OperationalError, InterfaceError, InternalError)
_PATIENCE_WITH_DATABASE: Final = full_jitter("200ms", cap="5s", attempts=1)
_LONGEST_SLEEP: Final = 0.25  # seconds: a stop request is seen within this
_LEASE_MARGIN: Final = 0.8  # of what is left: clocks of two machines do not run at exactly one speed
_SHOWN_EVERY: Final = 0.1  # seconds: a snapshot costs more than many an event
_MERGED: Final = 4  # settlements in one transaction, at most


class Relay:
    """One relay.

    Args:
        engine: of the database, made by `outboxkit.dialects.open_engine`.
        publisher: to the broker.
        rules: what the core goes by.
        direct: of the same database, for reading, when `engine` leads to a pooler: reads need a session of their own.
        drain: how long a stop waits for messages in flight.
        version: of this software, for people who look at ``outbox_relays``.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        rules: RelayConfig,
        *,
        direct: Engine | None = None,
        drain: timedelta = timedelta(seconds=20),
        version: str = "",
    ) -> None:
        self._engine, self._direct = engine, direct or engine
        self._publisher = publisher
        self._rules = rules
        self._drain = drain
        self._version = version
        self._id = uuid4()
        self._rng = random.Random()  # noqa: S311  jitter, not cryptography
        self._failures = 0  # of the database, in a row
        # Not a SimpleQueue: before Python 3.13 its `get` waits for ever when a signal's handler outlasts the time-out.
        self._arrivals: queue.Queue[Event | BaseException] = queue.Queue()
        self._clock: Callable[[], datetime] = _no_clock
        self._state = State(rules=rules)
        self._tally = Tally()
        self._snapshot: RelayStats | None = None
        self._reader = Worker("outboxkit-reader", self._open_for_reading, self._arrivals.put)
        self._settler = Worker("outboxkit-settler", engine.connect, self._arrivals.put)
        self._by_reader: Final[dict[type, Callable[[Connection, Any], Event]]] = {
            Fetch: self._fetch,
            ConfirmLease: self._claim,
            Rescan: self._watch,
            Rebalance: self._balance,
        }

    @property
    def state(self) -> State:
        """What the core knows now."""
        return self._state

    @property
    def snapshot(self) -> RelayStats | None:
        """What the dispatcher has told last; None before its first turn. For any thread."""
        return self._snapshot

    def wake(self) -> None:
        """Lets it look at once: somebody has committed messages. From any thread; returns at once."""
        self._arrivals.put(Woken())

    def run(self, stop: threading.Event) -> None:
        """Publishes until `stop` is set, or with ``rules.once`` until nothing is left.

        A database that is away is waited for with full jitter; a broker that is away pauses its destinations.

        Transaction: opens its own, short ones.
        Guarantee: killed at any instruction, nothing is lost: what was not settled is published again, with the same
            id, in order per key.
        """
        while not self._state.left:
            try:
                with self._reader, self._settler:
                    self._dispatch(stop)
            except _AWAY as error:
                self._failures += 1
                if stop.is_set():
                    _log.warning("relay.left_unregistered", extra={"relay": str(self._id)})
                    return
                self._wait_for_database(error, stop)

    # --- the dispatcher --------------------------------------------------------------------------------------

    def _dispatch(self, stop: threading.Event) -> None:
        self._state.start_again()
        self._join()
        while not self._state.left:
            if stop.is_set() and self._state.stop_at is None:
                _log.info("relay.stopping", extra={"relay": str(self._id), "in_flight": self._state.in_flight})
                self._advance(StopRelay(self._clock() + self._drain))
            else:
                event = self._next_event()
                self._advance(event)
                if self._failures and isinstance(event, Fetched):  # joining alone proves little
                    _log.info("database.back", extra={"relay": str(self._id), "failures": self._failures})
                    self._failures = 0

    def _advance(self, event: Event) -> None:
        before = _troubles(self._state)
        now = self._clock()
        self._tally.count(self._state, event, (time.monotonic(), now))
        _, commands = step(self._state, event, now, self._rng)
        _tell(before, _troubles(self._state), self._id)
        for command in commands:
            self._carry_out(command)
        self._show()

    def _show(self, *, away: bool = False) -> None:
        """Hands out what others may know."""
        now, ending = time.monotonic(), self._state.left or self._state.stop_at is not None
        if away or ending or self._snapshot is None or now - self._snapshot.at >= _SHOWN_EVERY:
            today = self._clock() if self._state.joined else LONG_AGO
            self._snapshot = self._tally.snapshot(self._state, self._id, (now, today), away=away)

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Publish):
            self._publish(command)
        elif isinstance(command, Settle):
            self._settler.do(self._settle_all, command)
        elif isinstance(command, GiveUp):
            _log.warning("publisher.reset", extra={"relay": str(self._id), "in_flight": self._state.in_flight})
            self._publisher.reset()
        elif isinstance(command, Rejoin):
            self._join()
        elif isinstance(command, Leave):
            self._leave()
        else:
            self._reader.do(self._by_reader[type(command)], command)

    def _next_event(self) -> Event:
        """The next thing that happened, or a tick when it is time for something else."""
        next_at = min(self._state.wake_at, self._state.pace_at or self._state.wake_at)
        pause = min(_LONGEST_SLEEP, max(0.0, (next_at - self._clock()).total_seconds()))
        try:
            event = self._arrivals.get(timeout=pause) if pause > 0 else self._arrivals.get_nowait()
        except queue.Empty:
            if pause > 0:
                return Tick()
            # It is time to read, but the reader is at work: its event comes.
            try:
                event = self._arrivals.get(timeout=_LONGEST_SLEEP if self._is_waiting else 0.001)
            except queue.Empty:
                return Tick()
        if isinstance(event, LeaseLost):
            _log.warning("lease.lost", extra={"relay": str(self._id), "reason": event.message})
            return Fenced()
        if isinstance(event, BaseException):
            raise event
        return event

    @property
    def _is_waiting(self) -> bool:
        return self._state.reading or self._state.busy

    def _publish(self, command: Publish) -> None:
        failpoint("publish.before_send")
        answer = self._publisher.publish(command.batch)
        failpoint("publish.after_send")

        def arrive(receipts: Future[Receipts]) -> None:
            failpoint("publish.after_ack")
            self._arrivals.put(Answered(command.number, receipts.result()))

        answer.add_done_callback(arrive)

    # --- joining and leaving ---------------------------------------------------------------------------------

    def _join(self) -> None:
        """Enters under a new token, when neither worker is busy with what belonged to the old one."""
        self._reader.finish()
        self._settler.finish()
        while not self._arrivals.empty():
            self._arrivals.get_nowait()
        self._id = uuid4()
        with self._engine.begin() as connection:
            host = socket.gethostname()
            at = leases.register(connection, self._id, host=host, version=self._version, lease=self._rules.lease)
            hidden = dialects.hidden(connection)
        # The relay's clock is the database's, carried on by a monotonic one: no step of the local clock can hurt.
        began = time.monotonic()
        self._clock = lambda: at + timedelta(seconds=time.monotonic() - began)
        _log.info("relay.joined", extra={"relay": str(self._id)})
        if hidden:
            _log.warning("relay.rows_hidden", extra={"relay": str(self._id), "tables": hidden})
        self._reader.do(self._by_reader[Rebalance], Rebalance(release=True))

    def _leave(self) -> None:
        self._reader.finish()
        self._settler.finish()
        with self._engine.begin() as connection:
            leases.leave(connection, self._id)
        _log.info("relay.left", extra={"relay": str(self._id)})

    def _wait_for_database(self, error: DBAPIError, stop: threading.Event) -> None:
        delay = _PATIENCE_WITH_DATABASE.delay(self._failures, self._rng).total_seconds()
        if self._failures == 1:
            _log.warning("database.away", extra={"relay": str(self._id), "error": logs.cause(error.orig or error)})
        self._show(away=True)
        # What is in flight is unknown now and will be sent again: the old batches must not come after that.
        self._publisher.reset()
        stop.wait(delay)

    # --- the reader ------------------------------------------------------------------------------------------

    def _open_for_reading(self) -> Connection:
        # Autocommit: a read is one statement with a snapshot of its own.
        return self._direct.connect().execution_options(isolation_level="AUTOCOMMIT")

    def _fetch(self, connection: Connection, command: Fetch) -> Fetched:
        waited = self._waiting_room(command) if command.look and due.is_due(connection) else []
        page = outbox.read(connection, command.reading)
        return Fetched(command.lane, page, waited, self._claimed(connection, page.rows or waited))

    def _watch(self, connection: Connection, command: Rescan) -> RescanResult:
        rows = outbox.read(connection, command.reading).rows
        return RescanResult(rows, self._claimed(connection, rows))

    def _claim(self, connection: Connection, _command: ConfirmLease) -> LeaseConfirmed:
        return LeaseConfirmed(self._safe_until(connection))

    def _claimed(self, connection: Connection, rows: list[Row]) -> datetime | None:
        return self._safe_until(connection) if rows else None

    def _safe_until(self, connection: Connection) -> datetime:
        asked = self._clock()
        failpoint("claim.before_commit")
        left = outbox.claim(connection, self._id)
        failpoint("claim.after_commit")
        return asked + left * _LEASE_MARGIN

    def _waiting_room(self, command: Fetch) -> list[Row]:
        reading = command.reading
        with self._engine.begin() as connection:
            outbox.fence(connection, self._id)
            due.enqueue_scheduled(connection, reading.shards, reading.limit)
            return due.due_rows(
                connection,
                reading.shards,
                without=command.without,
                limit=reading.limit,
                holds=command.holds,
                max_bytes=reading.max_bytes,
            )

    def _balance(self, _connection: Connection, command: Rebalance) -> Owned:
        failpoint("lease.renew")
        with self._engine.begin() as connection:
            leases.renew(connection, self._id, self._rules.lease)
            shards, surplus = leases.balance(connection, self._id, release=command.release)
        # Statements after the take-over has committed: what the previous owner did is all visible.
        with self._engine.begin() as connection:
            outbox.fence(connection, self._id)
            operator_requests.carry_out_requests(connection, shards)
            stopped, holds = stopped_keys.stopped_keys(connection, shards), pauses.holds(connection)
            more = self._rules.once and leases.is_anything_left(connection, shards, holds)
            return Owned(shards, surplus, stopped, holds, more=more)

    # --- the settler -----------------------------------------------------------------------------------------

    def _settle_all(self, connection: Connection, first: Settle) -> list[Event]:
        """Commits a settlement, and with it those that wait behind it and need no fence either."""
        together = [first]
        if not first.needs_fence:
            together += self._settler.take(_MERGED - 1, lambda other: not other.needs_fence)
        stopped = None
        with connection.begin():
            if first.needs_fence:
                outbox.fence(connection, self._id)
            outbox.remove(
                connection, self._id, [evidence for settlement in together for evidence in settlement.evidence]
            )
            if first.needs_fence:
                self._set_troubled_aside(connection, first)
                stopped = stopped_keys.stopped_keys(connection, self._state.lanes.shards)
            failpoint("settle.before_commit")
        failpoint("settle.after_commit")
        return [Settled(settlement, stopped) for settlement in together]

    def _set_troubled_aside(self, connection: Connection, settlement: Settle) -> None:
        stopped_keys.append_followers(connection, settlement.aside)
        for held in settlement.held:
            stopped_keys.hold(connection, held)
        for burial in settlement.buried:
            self._bury(connection, burial)
        stopped_keys.resume_key(connection, settlement.freed)

    def _bury(self, connection: Connection, burial: Burial) -> None:
        row = burial.row
        failpoint("dead.before_insert")
        dead_letters.bury(connection, dead_letters.of_row(row, burial.failure, burial.text, burial.attempts))
        failpoint("dead.after_insert")
        if burial.fate is Followers.PARK:
            stopped_keys.park(connection, row, burial.followers)
        else:
            stopped_keys.bury(connection, row)
            if row.key is not None:
                stopped_keys.resume_key(connection, [(row.topic, row.key)])


def _troubles(state: State) -> dict[str, Any]:
    return {topic: found.trouble for topic, found in state.destinations.items() if found.trouble is not None}


def _tell(before: dict[str, Any], after: dict[str, Any], relay: UUID) -> None:
    """One log line for each destination that changes its state."""
    for topic in after.keys() - before.keys():
        trouble = after[topic]
        fields = {"topic": topic, "failure": trouble.failure.value, "reason": trouble.text}
        _log.warning("destination.paused", extra={"relay": str(relay), **fields})
    for topic in before.keys() - after.keys():
        _log.info("destination.resumed", extra={"relay": str(relay), "topic": topic})


def _no_clock() -> datetime:
    raise LeaseLost("the relay has not joined yet")
