"""A relay process around the production core: `outboxkit_relay.daemon.relay` without threads, one transaction at
a time.

Reader and settler are queues of generators; wherever one yields, anything else may happen.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Generator
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from outboxkit.errors import LeaseLost
from outboxkit.policy import Followers
from outboxkit.rows import NOTHING_PAUSED, Page, Row
from outboxkit_relay.core.protocol import (
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
)
from outboxkit_relay.core.state import RelayConfig, State
from outboxkit_relay.core.step import step
from tests.property.relay.broker import Broker, Client
from tests.property.relay.database import Database, Gone

__all__ = ["Process", "Work"]

Work = Generator[None, None, list[Event]]
_LEASE_MARGIN = 0.8
_MERGED = 4


class Line:
    """One worker: its tasks, and the one under way; broken after a failure until `finish`."""

    def __init__(self) -> None:
        self.tasks: deque[Command] = deque()
        self.work: Work | None = None
        self.broken = False

    @property
    def is_idle(self) -> bool:
        return self.work is None and (self.broken or not self.tasks)

    def finish(self) -> None:
        self.tasks.clear()
        self.work, self.broken = None, False


class Process:
    """One relay.

    Attributes:
        arrivals: what the dispatcher finds in its queue.
        restarts_at: it waits for the database until then; None while it runs.
        told: the pauses that it knows of.
        sent: by topic, since when and how many messages.
        holding: its session holds the lock on its lease.
        waits: for a lock that another session holds.
        found_by_rescan: rows that only the watchdog has found: none, ever.
    """

    def __init__(self, database: Database, broker: Broker, config: RelayConfig, rng: random.Random) -> None:
        self.database, self.config, self.rng = database, config, rng
        self.state = self.new_state()
        self.arrivals: deque[Event | Gone] = deque()
        self.client = Client(broker, self.arrivals.append)
        self.reader, self.settler = Line(), Line()
        self.id = UUID(int=0)
        self.epoch = database.epoch
        self.told = NOTHING_PAUSED
        self.sent: dict[str, tuple[datetime, int]] = {}
        self.to_do: Command | None = Rejoin()
        self.restarts_at = database.now
        self.holding = self.waits = False
        self.stopping = False
        self.over = False
        self.by_reader: dict[type, Callable[[Any], Work]] = {
            Fetch: self.fetch,
            ConfirmLease: self.claim,
            Rescan: self.watch,
            Rebalance: self.balance,
        }

    # --- what a wrong relay may do differently ------------------------------------------------------------------------

    def new_state(self) -> State:
        return State(config=self.config)

    def step(self, event: Event) -> list[Command]:
        return step(self.state, event, self.database.now, self.rng)[1]

    def gone(self) -> None:
        """The database is away: everything is forgotten."""
        self.client.reset()
        self.state.start_again()
        self.reader.finish()
        self.settler.finish()
        self.to_do = Rejoin()
        self.restarts_at = self.database.now + timedelta(milliseconds=self.rng.randint(0, 300))

    # --- the dispatcher ---------------------------------------------------------------------------------------------

    def dispatch(self) -> bool:
        """One round of the dispatcher; whether it did more than look at the clock."""
        if self.over or self.database.now < self.restarts_at:
            return False
        if self.to_do is not None:
            return self._enter_or_leave(self.to_do)
        if self.stopping and self.state.stop_at is None:
            return self._advance(StopRelay(self.database.now + timedelta(seconds=20)))
        if not self.arrivals:
            return self._advance(Tick())
        event = self.arrivals.popleft()
        if isinstance(event, Owned):
            self.told = event.paused
        if isinstance(event, Gone):
            self.gone()
        else:
            self._advance(event)
        return True

    def _advance(self, event: Event) -> bool:
        commands = self.step(event)
        self._check_bytes()
        for command in commands:
            self._carry_out(command)
        return bool(commands)

    def _carry_out(self, command: Command) -> None:
        if isinstance(command, Publish):
            self._publish(command)
        elif isinstance(command, Settle):
            self.settler.tasks.append(command)
        elif isinstance(command, GiveUp):
            self.client.reset()
        elif isinstance(command, Rejoin | Leave):
            self.to_do = command
        else:
            self.reader.tasks.append(command)

    def _publish(self, command: Publish) -> None:
        rows, told = command.batch.rows, self.told
        if paused := [row.id.int for row in rows if told.covers(row) or row.topic in told.destinations]:
            self.database.wrongs.append(f"paused, and handed over: {paused}")
        self._check_limits(command.batch.destination, len(rows))
        self.client.publish(command.number, command.batch)

    def _check_limits(self, topic: str, rows: int) -> None:
        limits = self.config.limits
        here = [len(batch.rows) for batch in self.client.pending.values() if batch.rows[0].topic == topic]
        if limits.in_flight is not None and sum(here) + rows > limits.in_flight:
            self.database.wrongs.append(f"{sum(here) + rows} in flight, allowed are {limits.in_flight}")
        if limits.rate is not None:
            since, sent = self.sent.get(topic, (self.database.now, 0))
            self.sent[topic] = since, sent + rows
            most = max(1, limits.rate * 0.1) + limits.rate * (self.database.now - since).total_seconds()
            if sent + rows > most + 0.001:
                self.database.wrongs.append(f"{sent + rows} sent, the rate allows {most}")

    def _check_bytes(self) -> None:
        """What is queued and in flight is bounded, and counted rightly."""
        state = self.state
        rows = [
            row for one in state.destinations.values() for row in (*one.queue, *itertools.chain(*one.behind.values()))
        ]
        rows += [row for batch in state.batches() for row in batch.rows]
        size = sum(len(row.payload) for row in rows if row.waiting_id is None)
        most = self.config.max_bytes + self.config.page_bytes + len(b"large!")
        if size > most or size > state.large_bytes or state.large_bytes != sum(state.large.values()):
            self.database.wrongs.append(f"{size} bytes in hand, {state.large_bytes} counted, {most} allowed")

    def _enter_or_leave(self, what: Command) -> bool:
        if not (self.reader.is_idle and self.settler.is_idle):
            return False
        self.reader.finish()
        self.settler.finish()
        self.arrivals.clear()
        self.to_do = None
        self.epoch = self.database.epoch
        xid = self.database.begin()
        if isinstance(what, Leave):
            self.database.leave(self.id)
            self.over = True
        else:
            self.id = UUID(int=self.rng.getrandbits(64))
            self.sent.clear()
            self.database.put(self.database.leases, self.id, self.database.now + self.config.lease)
            self.reader.tasks.append(Rebalance(release=True))
        self.database.commit(xid, flush=True)
        return True

    # --- workers ------------------------------------------------------------------------------------------------------

    def read(self) -> bool:
        return self._work(self.reader, lambda command: self.by_reader[type(command)](command))

    def settle(self) -> bool:
        return self._work(self.settler, self.settle_all)

    def _work(self, line: Line, begin: Callable[[Any], Work]) -> bool:
        if self.over or (line.work is None and (line.broken or not line.tasks)):
            return False
        try:
            self._check_session()
            if line.work is None:
                line.work = begin(line.tasks.popleft())
            next(line.work)
        except StopIteration as end:
            line.work = None
            self.arrivals.extend(end.value)
        except LeaseLost:
            line.work, line.broken = None, True
            self.arrivals.append(Fenced())
        except Gone as gone:
            line.work, line.broken, self.holding = None, True, False
            self.arrivals.append(gone)
        return True

    def _check_session(self) -> None:
        if self.epoch != self.database.epoch:
            raise Gone

    def fetch(self, command: Fetch) -> Work:
        due: list[Row] = []
        if command.look:
            self.database.look(self.id)
            shards, limit = command.reading.shards, command.reading.limit
            xid = self.database.begin()
            self.database.enqueue_scheduled(xid, shards, limit)
            self.database.commit(xid, flush=True)
            due = self.database.due_rows(shards, command.without, limit, command.paused)
            yield
        page = self.page(command)
        until = None
        if page.rows or due:
            yield
            until = self.safe_until()
            yield
        return [Fetched(command.lane, page, due, until)]

    def page(self, command: Fetch) -> Page:
        return self.database.read(command.reading)

    def watch(self, command: Rescan) -> Work:
        rows = self.database.read(command.reading).rows
        yield
        return [RescanResult(rows, self.safe_until() if rows else None)]

    def claim(self, _command: ConfirmLease) -> Work:
        until = self.safe_until()
        yield
        return [LeaseConfirmed(until)]

    def safe_until(self) -> Any:
        return self.database.now + self.database.confirm_lease(self.id) * _LEASE_MARGIN

    def balance(self, command: Rebalance) -> Work:
        database = self.database
        while self.waits or database.must_wait(self.id):
            self.waits = database.must_wait(self.id)
            yield
        xid = database.begin()
        try:
            shards, surplus = database.renew_and_balance(self.id, self.config.lease, release=command.release)
        except LeaseLost:
            database.abort(xid)
            raise
        database.commit(xid, flush=True)
        yield
        database.look(self.id)
        xid = database.begin()
        database.carry_out_requests(shards)
        database.commit(xid, flush=True)
        stopped, paused = database.stopped_keys(shards), database.paused
        yield
        return [Owned(shards, surplus, stopped, paused)]

    def settle_all(self, first: Settle) -> Work:
        together = [first, *self._behind(first)]
        if first.needs_fence:
            self.fence()
            yield
        database, stopped = self.database, None
        xid = database.begin()
        for evidence in (evidence for settlement in together for evidence in settlement.evidence):
            database.remove(evidence.rows)
            if evidence.outcome == "expired":
                for row in evidence.rows:
                    database.put(database.expired, row.id.int, value=True)
        if first.needs_fence:
            self.set_troubled_aside(first)
            stopped = database.stopped_keys(self.state.lanes.shards)
        database.commit(xid, flush=True)
        self.unlock()
        yield
        return [Settled(settlement, stopped) for settlement in together]

    def _behind(self, first: Settle) -> list[Settle]:
        """Settlements that wait behind one and need no fence either: they are committed with it."""
        together: list[Settle] = []
        tasks = self.settler.tasks
        while not first.needs_fence and tasks and len(together) < _MERGED - 1:
            command = tasks[0]
            if not isinstance(command, Settle) or command.needs_fence:
                break
            together.append(command)
            tasks.popleft()
        return together

    def fence(self) -> None:
        self.database.fence(self.id)
        self.holding = True

    def unlock(self) -> None:
        if self.holding:
            self.database.unlock(self.id)
            self.holding = False

    def set_troubled_aside(self, settlement: Settle) -> None:
        database = self.database
        heads = [*(failed.row for failed in settlement.failed), *(burial.row for burial in settlement.buried)]
        database.check_owner(self.id, (*settlement.to_waiting, *heads))
        database.append_followers(settlement.to_waiting)
        for failed in settlement.failed:
            database.stop_key(failed.row, failed.attempts, failed.delay, failed.followers)
        for burial in settlement.buried:
            if burial.fate is Followers.PARK:
                database.park(burial.row, burial.followers)
            else:
                database.bury(burial.row)
                if burial.row.key is not None:
                    database.resume_key([(burial.row.topic, burial.row.key)])
        database.resume_key(settlement.freed)

    def die(self) -> None:
        """SIGKILL: its sessions end, what it sent may still arrive."""
        self.over = True
        self.client._abandon()
        if self.holding:
            self.unlock()
