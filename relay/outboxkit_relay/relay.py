"""The relay daemon's shell: carries out what the core decides, on one database connection and one publisher.

Everything here is I/O: the decisions are in `outboxkit_relay.step`, the SQL in `outboxkit.outbox` and the dialects. The
thread that calls `Relay.run` is the dispatcher: it alone touches the state and the database. Acknowledgements arrive
from the publisher's own thread through a queue.

No broker call is made while a transaction is open.
"""

from __future__ import annotations

import logging
import queue
import random
import socket
import time
from collections import deque
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError

from outboxkit import dead_letters, outbox
from outboxkit.dialects import Reading
from outboxkit.errors import LeaseLost
from outboxkit.failpoints import failpoint
from outboxkit.policy import Followers, full_jitter
from outboxkit_relay import leases, quarantine
from outboxkit_relay.step import (
    Answered,
    Burial,
    Claim,
    Claimed,
    Command,
    Event,
    Fenced,
    Fetch,
    Fetched,
    GiveUp,
    Leave,
    Owned,
    Phase,
    Publish,
    Rejoin,
    Rules,
    Settle,
    Settled,
    State,
    Stop,
    Tick,
    step,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from sqlalchemy import Connection, Engine

    from outboxkit.brokers import Publisher, Receipts
    from outboxkit.message import Row

__all__ = ["Relay"]

_log: Final = logging.getLogger(__name__)

_PATIENCE_WITH_DATABASE: Final = full_jitter("200ms", cap="5s", attempts=1)
_WAITING_ROOM_EVERY: Final = timedelta(milliseconds=100)
_LONGEST_SLEEP: Final = 0.25  # seconds: a stop request is seen within this
_LEASE_MARGIN: Final = 0.8  # of what is left: clocks of two machines do not run at exactly one speed


class Relay:
    """One relay.

    Args:
        engine: of the database, made by `outboxkit.dialects.open_engine`.
        publisher: to the broker.
        rules: what the core goes by.
        lease: how long the others wait before they take over from a dead relay.
        drain: how long a stop waits for messages in flight.
        version: of this software, for people who look at ``outbox_relays``.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher,
        rules: Rules,
        *,
        lease: timedelta = timedelta(seconds=10),
        drain: timedelta = timedelta(seconds=20),
        version: str = "",
    ) -> None:
        self._engine = engine
        self._publisher = publisher
        self._rules = rules
        self._lease = lease
        self._drain = drain
        self._version = version
        self._id = uuid4()
        self._rng = random.Random()  # noqa: S311  jitter, not cryptography
        self._arrivals: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._clock: Callable[[], datetime] = _no_clock
        self._state = State(rules=rules)
        self._renew_at = self._look_at = 0.0
        self._perform: Final[dict[type, Callable[[Connection, Any], Iterator[Event]]]] = {
            Fetch: self._fetch,
            Claim: self._claim,
            Publish: self._publish,
            Settle: self._settle,
            GiveUp: self._give_up,
            Rejoin: self._join,
            Leave: self._leave,
        }

    @property
    def state(self) -> State:
        """What the core knows now."""
        return self._state

    def run(self, stop: threading.Event) -> None:
        """Publishes until `stop` is set, or with ``rules.once`` until nothing is left.

        A database that is away is waited for with full jitter; a broker that is away pauses its destinations.

        Transaction: opens its own, short ones.
        Guarantee: killed at any instruction, nothing is lost: what was not settled is published again, with the same
            id, in order per key.
        """
        failures = 0
        while self._state.phase is not Phase.LEFT:
            try:
                with self._engine.connect() as connection:
                    self._state = State(rules=self._rules, paused=self._state.paused, number=self._state.number)
                    self._dispatch(connection, deque([Rejoin()]), stop, failures)
            except (OperationalError, InterfaceError, InternalError) as error:
                failures += 1
                if stop.is_set() and failures > 1:
                    _log.warning("relay.left_unregistered", extra={"relay": str(self._id)})
                    return
                self._wait_for_database(error, failures, stop)
            else:
                failures = 0

    def _dispatch(self, connection: Connection, commands: deque[Command], stop: threading.Event, failures: int) -> None:
        if failures:
            _log.info("database.back", extra={"relay": str(self._id), "failures": failures})
        while self._state.phase is not Phase.LEFT or commands:
            while commands:
                for event in self._carry_out(connection, commands.popleft()):
                    self._advance(event, commands)
            if stop.is_set() and self._state.stop_at is None:
                self._advance(Stop(self._clock() + self._drain), commands)
            elif self._state.phase is not Phase.LEFT and not commands:
                self._advance(self._next_event(), commands)
                self._keep_lease(connection, commands)

    def _carry_out(self, connection: Connection, command: Command) -> list[Event]:
        try:
            return list(self._perform[type(command)](connection, command))
        except LeaseLost:
            _log.warning("lease.lost", extra={"relay": str(self._id), "command": type(command).__name__})
            return [Fenced()]

    def _advance(self, event: Event, commands: deque[Command]) -> None:
        before = self._state
        self._state, new = step(before, event, self._clock(), self._rng)
        _tell(before, self._state, self._id)
        commands.extend(new)

    def _next_event(self) -> Event:
        """The next acknowledgement, or a tick when it is time for something else."""
        pause = _LONGEST_SLEEP
        if self._state.phase is Phase.IDLE:
            pause = min(pause, max(0.0, (self._state.wake_at - self._clock()).total_seconds()))
        try:
            return self._arrivals.get(timeout=pause) if pause > 0 else self._arrivals.get_nowait()
        except queue.Empty:
            return Tick()

    # --- commands --------------------------------------------------------------------------------------------

    def _join(self, connection: Connection, _command: Rejoin) -> Iterator[Event]:
        self._id = uuid4()
        with connection.begin():
            host = socket.gethostname()
            at = leases.register(connection, self._id, host=host, version=self._version, lease=self._lease)
        # The relay's clock is the database's, carried on by a monotonic one: no step of the local clock can hurt.
        began = time.monotonic()
        self._clock = lambda: at + timedelta(seconds=time.monotonic() - began)
        self._renew_at = began + self._lease.total_seconds() / 3
        _log.info("relay.joined", extra={"relay": str(self._id)})
        yield self._balance(connection)

    def _fetch(self, connection: Connection, command: Fetch) -> Iterator[Event]:
        if time.monotonic() >= self._renew_at:
            # Between two pages nothing is in flight: shards may change hands.
            self._renew(connection)
            yield self._balance(connection)
            return
        reading = Reading(shards=command.shards, without=command.without, limit=command.limit)
        waiting = self._waiting_room(connection, reading)
        with _reading(connection):
            fresh = outbox.read(connection, reading)
        yield Fetched([*waiting, *fresh])

    def _waiting_room(self, connection: Connection, reading: Reading) -> list[Row]:
        if time.monotonic() < self._look_at:
            return []
        self._look_at = time.monotonic() + _WAITING_ROOM_EVERY.total_seconds()
        with connection.begin():
            outbox.fence(connection, self._id)
            outbox.enqueue_scheduled(connection, reading.shards, reading.limit)
            return outbox.due_rows(connection, reading)

    def _claim(self, connection: Connection, _command: Claim) -> Iterator[Event]:
        failpoint("claim.before_commit")
        asked = self._clock()
        left = outbox.claim(connection, self._id)
        failpoint("claim.after_commit")
        yield Claimed(asked + left * _LEASE_MARGIN)

    def _publish(self, _connection: Connection, command: Publish) -> Iterator[Event]:
        failpoint("publish.before_send")
        answer = self._publisher.publish(command.batch)
        failpoint("publish.after_send")

        def arrive(receipts: Future[Receipts]) -> None:
            failpoint("publish.after_ack")
            self._arrivals.put(Answered(command.number, receipts.result()))

        answer.add_done_callback(arrive)
        return iter(())

    def _settle(self, connection: Connection, command: Settle) -> Iterator[Event]:
        stopped = self._state.stopped
        with connection.begin():
            if command.needs_fence:
                outbox.fence(connection, self._id)
            outbox.remove(connection, self._id, command.evidence)
            self._set_troubled_aside(connection, command)
            if command.needs_fence:
                stopped = outbox.stopped_keys(connection, self._state.shards)
            failpoint("settle.before_commit")
        failpoint("settle.after_commit")
        yield Settled(stopped)

    def _set_troubled_aside(self, connection: Connection, command: Settle) -> None:
        outbox.set_aside(connection, command.aside)
        for held in command.held:
            outbox.hold(connection, held)
        for burial in command.buried:
            self._bury(connection, burial)
        outbox.go_on(connection, command.freed)

    def _bury(self, connection: Connection, burial: Burial) -> None:
        row = burial.row
        failpoint("dead.before_insert")
        dead_letters.bury(connection, dead_letters.of_row(row, burial.failure, burial.text, burial.attempts))
        failpoint("dead.after_insert")
        if burial.fate is Followers.PARK:
            outbox.park(connection, row, burial.followers)
        else:
            outbox.bury(connection, row)
            if row.key is not None:
                outbox.go_on(connection, [(row.topic, row.key)])

    def _give_up(self, _connection: Connection, _command: GiveUp) -> Iterator[Event]:
        _log.warning("publisher.reset", extra={"relay": str(self._id), "in_flight": len(self._state.flights)})
        self._publisher.reset()
        return iter(())

    def _leave(self, connection: Connection, _command: Leave) -> Iterator[Event]:
        with connection.begin():
            leases.leave(connection, self._id)
        _log.info("relay.left", extra={"relay": str(self._id)})
        return iter(())

    # --- lease -----------------------------------------------------------------------------------------------

    def _keep_lease(self, connection: Connection, commands: deque[Command]) -> None:
        """Renews while batches are in flight; between pages `_fetch` does."""
        if self._state.phase is Phase.PUBLISHING and time.monotonic() >= self._renew_at:
            try:
                self._renew(connection)
            except LeaseLost:
                self._advance(Fenced(), commands)

    def _renew(self, connection: Connection) -> None:
        failpoint("lease.renew")
        self._renew_at = time.monotonic() + self._lease.total_seconds() / 3
        with connection.begin():
            leases.renew(connection, self._id, self._lease)

    def _balance(self, connection: Connection) -> Owned:
        with connection.begin():
            shards = leases.balance(connection, self._id)
        # A statement after the take-over has committed: what the previous owner did is all visible.
        with connection.begin():
            outbox.fence(connection, self._id)
            quarantine.carry_out_requests(connection, shards)
            return Owned(shards, outbox.stopped_keys(connection, shards))

    def _wait_for_database(self, error: DBAPIError, failures: int, stop: threading.Event) -> None:
        delay = _PATIENCE_WITH_DATABASE.delay(failures, self._rng).total_seconds()
        if failures == 1:
            _log.warning(
                "database.away",
                extra={"relay": str(self._id), "error": type(error.orig or error).__name__},
            )
        # In flight is unknown now: the rows are read and sent again, so the old batches must not come later.
        self._publisher.reset()
        stop.wait(delay)


class _reading:  # noqa: N801  used as a statement: with _reading(connection): …
    """A transaction that only reads: on SQLite it does not take the writer's place."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execution_options(outboxkit_reading=True)
        self._transaction = self._connection.begin()

    def __exit__(self, *_: object) -> None:
        self._transaction.close()
        self._connection.execution_options(outboxkit_reading=False)


def _tell(before: State, after: State, relay: UUID) -> None:
    """One log line for each destination that changes its state."""
    for topic in after.paused.keys() - before.paused.keys():
        paused = after.paused[topic]
        _log.warning(
            "destination.paused",
            extra={"relay": str(relay), "topic": topic, "failure": paused.failure.value, "reason": paused.text},
        )
    for topic in before.paused.keys() - after.paused.keys():
        _log.info("destination.resumed", extra={"relay": str(relay), "topic": topic})


def _no_clock() -> datetime:
    raise LeaseLost("the relay has not joined yet")
