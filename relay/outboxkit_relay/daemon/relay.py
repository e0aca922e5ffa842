"""The relay daemon's shell: carries out what the core decides.

Everything here is I/O: the decisions are in `outboxkit_relay.core.step`, the SQL in `outboxkit.outbox` and the
dialects. Three threads share the work: the dispatcher (the thread that calls `RelayDaemon.run`) alone touches the
state; the *reader* (`reader.py`) reads, confirms and keeps the lease; the *settler* (`settler.py`) commits what became
of messages. Each of the two has a database connection of its own. Acknowledgements arrive from the publisher's own
thread. All comes back to the dispatcher by one queue.

No broker call is made while a transaction is open.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, ProgrammingError

from outboxkit import dialects
from outboxkit._failpoints import failpoint
from outboxkit.context import tracing
from outboxkit.errors import ConfigurationError, LeaseLost
from outboxkit.policy import OutageLog, full_jitter
from outboxkit_relay import redaction
from outboxkit_relay.core import protocol
from outboxkit_relay.core.state import LONG_AGO, RelayConfig, State
from outboxkit_relay.core.step import step
from outboxkit_relay.daemon.db_thread import DatabaseThread
from outboxkit_relay.daemon.membership import Membership
from outboxkit_relay.daemon.publishers import Publishers
from outboxkit_relay.daemon.reader import Reader
from outboxkit_relay.daemon.settler import Settler
from outboxkit_relay.observe.sentences import sentence, to_text
from outboxkit_relay.observe.stats import RelayStats, Tally, unavailable
from outboxkit_relay.store import leases

if TYPE_CHECKING:
    from concurrent.futures import Future

    from sqlalchemy import Connection, Engine

    from outboxkit.brokers import Publisher, Receipts

__all__ = ["RelayDaemon"]

_log: Final = logging.getLogger(__name__)

_AWAY: Final = (OperationalError, InterfaceError, InternalError)
_DATABASE_BACKOFF: Final = full_jitter("200ms", cap="5s", attempts=1)
_INSUFFICIENT_PRIVILEGE: Final = "42501"
_LONGEST_SLEEP: Final = 0.25  # seconds: a stop request is seen within this
_SHOWN_EVERY: Final = 0.1  # seconds: statistics cost more than many an event
_REPORTED_EVERY: Final = 1.0  # seconds: and a statement of the database costs more than that


class RelayDaemon:
    """One relay.

    Args:
        engine: of the database, made by `outboxkit.dialects.open_engine`.
        publisher: to the broker, or the publishers to several ones.
        config: what the core goes by.
        direct: of the same database, for reading, when `engine` leads to a pooler: reads need a session of their own.
        drain: how long a stop waits for messages in flight.
        version: of this software, for people who look at ``outbox_relays``.
        routing: where it sends messages to, in words: a relay that sends them elsewhere is refused.
    """

    def __init__(
        self,
        engine: Engine,
        publisher: Publisher | Publishers,
        config: RelayConfig,
        *,
        direct: Engine | None = None,
        drain: timedelta = timedelta(seconds=20),
        version: str = "",
        routing: str = "",
    ) -> None:
        self._engine, self._direct = engine, direct or engine
        self._publishers = publisher if isinstance(publisher, Publishers) else Publishers.of(publisher)
        self._config = config
        self._drain = drain
        self._version, self._routing = version, routing
        self._member = Membership.none()
        self._rng = random.Random()  # noqa: S311  jitter, not cryptography
        self._outage = OutageLog(_DATABASE_BACKOFF)
        # Not a SimpleQueue: before Python 3.13 its `get` waits for ever when a signal's handler outlasts the time-out.
        self._arrivals: queue.Queue[protocol.Event | BaseException] = queue.Queue()
        self._state = State(config=config)
        self._tally = Tally()
        self._stats: RelayStats | None = None
        self._refused = ""  # why the database lets it in no more
        self._reported, self._reported_at = to_text(()), 0.0
        self._read_thread = DatabaseThread("outboxkit-reader", self._open_for_reading, self._arrivals.put)
        self._settle_thread = DatabaseThread("outboxkit-settler", engine.connect, self._arrivals.put)
        self._reader = Reader(engine, config)
        self._settler = Settler(self._settle_thread.take, lambda: self._state.lanes.shards)

    @property
    def state(self) -> State:
        """Knowledge of the core at this moment."""
        return self._state

    @property
    def stats(self) -> RelayStats | None:
        """The latest statistics of the dispatcher; None before its first turn. For any thread."""
        return self._stats

    def wake(self) -> None:
        """Lets it look at once: messages were committed. From any thread; returns at once."""
        self._arrivals.put(protocol.Woken())

    def run(self, stop: threading.Event) -> None:
        """Publishes until `stop` is set, or with ``config.once`` until nothing is left.

        A database that is away is waited for with full jitter; a broker that is away pauses its destinations.

        Transaction: opens its own, short ones.
        Guarantee: killed at any instruction, nothing is lost: what was not settled is published again, with the same
            id, in order per key.
        """
        while not self._state.left:
            try:
                with self._read_thread, self._settle_thread:
                    self._dispatch(stop)
            except _AWAY as error:
                if stop.is_set():
                    _log.warning("relay.left_unregistered", extra={"relay": str(self._member.id)})
                    return
                self._wait_for_database(error, stop)
            except BaseException as error:
                self._abandon()
                if isinstance(error, ProgrammingError):
                    raise _without_right(error) from error
                raise

    def _abandon(self) -> None:
        """Lets others take over at once from a relay that must end: nothing of it is at a broker any more.

        Its lease would make `outboxkit status` say that somebody is alive.
        """
        self._publishers.close()
        with suppress(DBAPIError), self._engine.begin() as connection:
            leases.leave(connection, self._member.id)

    # --- the dispatcher --------------------------------------------------------------------------------------

    def _dispatch(self, stop: threading.Event) -> None:
        self._state.start_again()
        self._join()
        while not self._state.left:
            if stop.is_set() and self._state.stop_at is None:
                _log.info("relay.stopping", extra={"relay": str(self._member.id), "in_flight": self._state.in_flight})
                self._advance(protocol.StopRelay(self._member.now() + self._drain))
            else:
                event = self._next_event()
                self._advance(event)
                if isinstance(event, protocol.Fetched) and (failures := self._outage.over()):
                    # Not before: joining alone proves little.
                    _log.info("database.back", extra={"relay": str(self._member.id), "failures": failures})

    def _advance(self, event: protocol.Event) -> None:
        before = _unavailable(self._state)
        now = self._member.now()
        self._tally.count(self._state, event, (time.monotonic(), now))
        _, commands = step(self._state, event, now, self._rng)
        _log_changes(self._state, before, self._member.id, now)
        for command in commands:
            self._carry_out(command)
        self._show()

    def _show(self, *, away: bool = False) -> None:
        """Hands out statistics."""
        now, ending = time.monotonic(), self._state.left or self._state.stop_at is not None
        if away or ending or self._stats is None or now - self._stats.at >= _SHOWN_EVERY:
            self._publishers.look()
            today = self._member.now() if self._state.joined else LONG_AGO
            self._stats = self._tally.stats(
                self._state, self._member.id, (now, today), away=away, refused=self._refused
            )
            if self._state.joined and not away and now - self._reported_at >= _REPORTED_EVERY:
                self._report(now)

    def _report(self, now: float) -> None:
        """Tells every machine what `stats` says of the destinations, when it has changed."""
        told = to_text(self._stats.unavailable) if self._stats else ""
        if told != self._reported:
            self._reported, self._reported_at = told, now
            self._read_thread.do(self._reader.report, told)

    def _carry_out(self, command: protocol.Command) -> None:
        if isinstance(command, protocol.Publish):
            self._publish(command)
        elif isinstance(command, protocol.Settle):
            self._settle_thread.do(self._settler.settle, command)
        elif isinstance(command, protocol.GiveUp):
            fields = {"broker": command.broker or "", "in_flight": self._state.in_flight}
            _log.warning("publisher.reset", extra={"relay": str(self._member.id), **fields})
            self._publishers.reset(command.broker)
        elif isinstance(command, protocol.Rejoin):
            self._join()
        elif isinstance(command, protocol.Leave):
            self._leave()
        else:
            self._read_thread.do(self._reader.carry_out, command)

    def _next_event(self) -> protocol.Event:
        """The next thing that happened, or a tick when it is time for something else."""
        next_at = min(self._state.wake_at, self._state.pace_at or self._state.wake_at)
        pause = min(_LONGEST_SLEEP, max(0.0, (next_at - self._member.now()).total_seconds()))
        try:
            event = self._arrivals.get(timeout=pause) if pause > 0 else self._arrivals.get_nowait()
        except queue.Empty:
            if pause > 0:
                return protocol.Tick()
            # It is time to read, but the reader is at work: its event comes.
            try:
                event = self._arrivals.get(timeout=_LONGEST_SLEEP if self._is_waiting else 0.001)
            except queue.Empty:
                return protocol.Tick()
        if isinstance(event, LeaseLost):
            _log.warning("lease.lost", extra={"relay": str(self._member.id), "reason": event.message})
            return protocol.Fenced()
        if isinstance(event, BaseException):
            raise event
        return event

    @property
    def _is_waiting(self) -> bool:
        return self._state.reading or self._state.busy

    def _publish(self, command: protocol.Publish) -> None:
        failpoint("publish.before_send")
        ended = tracing.sending(command.batch.destination, command.batch.rows)
        answer = self._publishers.publish(command.batch)
        failpoint("publish.after_send")

        def arrive(receipts: Future[Receipts]) -> None:
            failpoint("publish.after_ack")
            ended(next((refusal.failure.value for refusal in receipts.result().refusals), ""))
            self._arrivals.put(protocol.Answered(command.number, receipts.result()))

        answer.add_done_callback(arrive)

    # --- joining and leaving ---------------------------------------------------------------------------------

    def _join(self) -> None:
        """Enters under a new token, when neither thread is busy with what belonged to the old one."""
        self._finish_threads()
        while not self._arrivals.empty():
            self._arrivals.get_nowait()
        with self._engine.begin() as connection:
            member = Membership.register(
                connection, version=self._version, lease=self._config.lease, routing=self._routing
            )
            hidden = dialects.hidden(connection)
        self._member = self._reader.member = self._settler.member = member
        self._reported = to_text(())  # of the new row
        _log.info("relay.joined", extra={"relay": str(member.id)})
        if hidden:
            _log.warning("relay.rows_hidden", extra={"relay": str(member.id), "tables": hidden})
        self._read_thread.do(self._reader.carry_out, protocol.Rebalance(release=True))

    def _leave(self) -> None:
        self._finish_threads()
        with self._engine.begin() as connection:
            leases.leave(connection, self._member.id)
        _log.info("relay.left", extra={"relay": str(self._member.id)})

    def _finish_threads(self) -> None:
        self._read_thread.finish()
        self._settle_thread.finish()

    def _wait_for_database(self, error: DBAPIError, stop: threading.Event) -> None:
        delay = self._outage.failed(self._rng)
        refused = dialects.refusal(self._engine.url, error)
        if self._outage.has_just_begun:
            fields = {"relay": str(self._member.id), "error": redaction.cause(error.orig or error)}
            _log.warning("database.away", extra=fields)
        if refused and refused != self._refused:
            _log.error("database.login_refused", extra={"relay": str(self._member.id), "error": refused})
        self._refused = refused
        self._show(away=True)
        # What is in flight is unknown now and will be sent again: the old batches must not come after that.
        self._publishers.reset()
        stop.wait(delay.total_seconds())

    def _open_for_reading(self) -> Connection:
        return self._direct.connect().execution_options(isolation_level="AUTOCOMMIT")


def _without_right(error: ProgrammingError) -> Exception:
    """A login that may not do what a relay does is for people to mend."""
    if getattr(error.orig, "sqlstate", "") != _INSUFFICIENT_PRIVILEGE:
        return error
    said = str(error.orig).partition("\n")[0]
    return ConfigurationError(f"the relay's database login lacks a right: {said}; see `outboxkit db roles`")


def _unavailable(state: State) -> set[str]:
    return {topic for topic, found in state.destinations.items() if found.trouble is not None}


def _log_changes(state: State, before: set[str], relay: UUID, now: datetime) -> None:
    """Logs one line for each destination that changes its state."""
    after = _unavailable(state)
    for found in unavailable(state.destinations[topic] for topic in sorted(after - before)):
        fields = {"topic": found.topic, "failure": found.failure, "reason": found.reason}
        _log.warning("destination.paused", extra={"relay": str(relay), **fields, "sentence": sentence(found, now)})
    for topic in before - after:
        _log.info("destination.resumed", extra={"relay": str(relay), "topic": topic})
