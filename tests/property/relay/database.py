"""A database as the relay sees it: PostgreSQL's snapshots, commits that are visible before they are durable, leases.

Transactions of relays are applied at once, when they commit; where something may come between, the caller yields.
Everything is kept in dictionaries, and each commit leaves what undoes it: a crash undoes what no flush has reached.
"""

from __future__ import annotations

import functools
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from outboxkit.errors import LeaseLost
from outboxkit.rows import NOTHING_PAUSED, Page, Part, PauseSet, Reading, Row

__all__ = ["SHARDS", "Database", "Gone", "Stop", "Waiting", "shard_of"]

SHARDS = 4
Key = tuple[str, bytes]


class Gone(Exception):
    """The server has crashed: this session is over."""


@dataclass(frozen=True, slots=True)
class Stored:
    row: Row
    xid: int
    shard: int
    due_at: datetime | None = None  # it is scheduled: not in the hot table before


@dataclass(frozen=True, slots=True)
class Waiting:
    row: Row  # with its attempts and waiting_id
    shard: int
    reason: str
    due_at: datetime | None


@dataclass(frozen=True, slots=True)
class Stop:
    position: int
    reason: str
    due_at: datetime | None
    request: str | None = None


@dataclass(slots=True)
class Record:
    """A commit in the log: what undoes it, and how far xids and positions had come."""

    undo: list[tuple[dict[Any, Any], Any, Any]]
    xid: int
    position: int


def shard_of(topic: str, key: bytes | None, number: int) -> int:
    return zlib.crc32(topic.encode() + (b"%d" % number if key is None else key)) % SHARDS


@functools.lru_cache(maxsize=4096)
def _parsed(snapshot: str) -> tuple[int, frozenset[int]]:
    _, xmax, running = snapshot.split(":")
    return int(xmax), frozenset(int(xid) for xid in running.split(",") if xid)


def unseen(snapshot: str, xid: int) -> bool:
    """What `outboxkit.dialects.postgresql` asks of the index."""
    xmax, running = _parsed(snapshot)
    return xid >= xmax or xid in running


_NOTHING: Any = object()


@dataclass(slots=True)
class Database:
    """The tables, and what a server knows besides.

    Attributes:
        truth: numbers of committed messages, with their position: what the checks go by.
        sharing: relays whose lease is locked by an open fenced transaction.
        epoch: how often it has crashed.
        wrongs: what should never happen and did (I10).
    """

    now: datetime
    hot: dict[int, Stored] = field(default_factory=dict)
    waiting: dict[int, Waiting] = field(default_factory=dict)
    stopped: dict[Key, Stop] = field(default_factory=dict)
    leases: dict[UUID, datetime] = field(default_factory=dict)
    owners: dict[int, UUID | None] = field(default_factory=lambda: dict.fromkeys(range(SHARDS)))
    letters: dict[int, Row] = field(default_factory=dict)
    scheduled: dict[int, Stored] = field(default_factory=dict)
    control: dict[str, PauseSet] = field(default_factory=dict)
    expired: dict[int, bool] = field(default_factory=dict)
    truth: dict[int, int] = field(default_factory=dict)
    sharing: Counter[UUID] = field(default_factory=Counter)
    running: set[int] = field(default_factory=set)
    next_xid: int = 10
    completed: int = 9
    position: int = 0
    waiting_id: int = 0
    epoch: int = 0
    log: list[Record] = field(default_factory=lambda: [Record([], 9, 0)])
    flushed: int = 1
    wrongs: list[str] = field(default_factory=list)
    fenced_off: int = 0
    undo: list[tuple[dict[Any, Any], Any, Any]] = field(default_factory=list)

    # --- transactions --------------------------------------------------------------------------------------------

    def begin(self) -> int:
        """Draws a transaction id."""
        xid = self.next_xid
        self.next_xid += 1
        self.running.add(xid)
        return xid

    def abort(self, xid: int) -> None:
        self.running.discard(xid)
        self.completed = max(self.completed, xid)

    def commit(self, xid: int, *, flush: bool) -> None:
        """What was put since the last commit becomes one transaction."""
        self.abort(xid)
        self.log.append(Record(self.undo, max(xid, self.log[-1].xid), self.position))
        self.undo = []
        if flush:
            self.flushed = len(self.log)

    def put(self, table: dict[Any, Any], key: Any, value: Any = _NOTHING) -> None:
        """Writes an entry, or removes it."""
        self.undo.append((table, key, table.get(key, _NOTHING)))
        if value is _NOTHING:
            table.pop(key, None)
        else:
            table[key] = value

    def crash(self, survives: int) -> None:
        """Loses all commits but the first so many; their transaction ids are given out again."""
        while len(self.log) > survives:
            for table, key, value in reversed(self.log.pop().undo):
                if value is _NOTHING:
                    table.pop(key, None)
                else:
                    table[key] = value
        last = self.log[-1]
        self.completed, self.next_xid, self.position = last.xid, last.xid + 1, last.position
        self.running.clear()
        self.sharing.clear()
        self.flushed = len(self.log)
        self.epoch += 1

    def snapshot(self) -> str:
        xmax = self.completed + 1
        running = sorted(xid for xid in self.running if xid < xmax)
        return f"{running[0] if running else xmax}:{xmax}:{','.join(map(str, running))}"

    # --- what relays ask -----------------------------------------------------------------------------------------

    def read(self, reading: Reading) -> Page:
        """See `outboxkit.dialects.Dialect.read`."""
        found: list[Row] = []
        large: dict[int, int] = {}
        for position in sorted(self.hot):
            stored = self.hot[position]
            size = len(stored.row.payload)
            if (
                position > reading.last
                and stored.shard in reading.shards
                and any(_wanted(part, stored, missed=reading.missed) for part in reading.parts)
                and (reading.round is None or not unseen(reading.round, stored.xid))
            ):
                if size:
                    if large and sum(large.values()) + size > reading.max_bytes:
                        return Page(found, self.snapshot(), large, cut=True)
                    large[position] = size
                found.append(stored.row)
                if len(found) == reading.limit:
                    break
        return Page(found, self.snapshot(), large)

    def confirm_lease(self, relay: UUID) -> timedelta:
        """See `outboxkit.outbox.confirm_lease`."""
        self.look(relay)
        self.flushed = len(self.log)
        return self.leases[relay] - self.now

    def look(self, relay: UUID) -> None:
        if self.leases.get(relay, self.now) <= self.now:
            self.fenced_off += 1
            raise LeaseLost

    def fence(self, relay: UUID) -> None:
        """See `outboxkit.outbox.fence`: the lock is held until `unlock`."""
        self.look(relay)
        self.sharing[relay] += 1

    def unlock(self, relay: UUID) -> None:
        self.sharing[relay] -= 1

    def stopped_keys(self, shards: Collection[int]) -> frozenset[Key]:
        return frozenset(key for key in self.stopped if shard_of(*key, 0) in shards)

    @property
    def paused(self) -> PauseSet:
        """See `outboxkit.outbox.pauses.pause_set`."""
        return self.control.get("pause_set", NOTHING_PAUSED)

    def due_rows(self, shards: Collection[int], without: Collection[str], limit: int, paused: PauseSet) -> list[Row]:
        """See `outboxkit_relay.store.due.due_rows`."""
        heads: dict[Key, int] = {}
        for waits in self.waiting.values():
            row = waits.row
            if row.key is not None:
                heads[row.topic, row.key] = min(row.position, heads.get((row.topic, row.key), row.position))
        due = []
        for waits in self.waiting.values():
            row, at = waits.row, waits.due_at
            if row.key is not None:
                stop = self.stopped.get((row.topic, row.key))
                is_head = heads[row.topic, row.key] == row.position
                at = stop.due_at if stop is not None and stop.reason == "retry" and is_head else None
            mine = waits.shard in shards and row.topic not in without and not paused.covers(row)
            if at is not None and at <= self.now and mine:
                due.append(row)
        return sorted(due, key=lambda row: row.position)[:limit]

    def enqueue_scheduled(self, xid: int, shards: Collection[int], limit: int) -> None:
        """See `outboxkit_relay.store.due.enqueue_scheduled`: a new position, a fresh xid."""
        due = [(one.due_at, number) for number, one in self.scheduled.items() if one.due_at and one.due_at <= self.now]
        for _, number in sorted(due)[:limit]:
            one = self.scheduled[number]
            if one.shard in shards:
                self.position += 1
                row = one.row._replace(position=self.position)
                self.put(self.hot, self.position, Stored(row, xid, one.shard))
                self.put(self.truth, number, self.position)
                self.put(self.scheduled, number)

    def remove(self, rows: Iterable[Row]) -> None:
        """Deletes acknowledged rows, by position and id."""
        for row in rows:
            if row.waiting_id is not None:
                if row.waiting_id in self.waiting:
                    self.put(self.waiting, row.waiting_id)
            elif row.position in self.hot and self.hot[row.position].row.id == row.id:
                self.put(self.hot, row.position)

    # --- the waiting room: `outboxkit_relay.store.stopped_keys`, verb by verb ---

    def move_to_waiting(self, rows: Iterable[Row], reason: str = "follower") -> None:
        for row in rows:
            if row.waiting_id is None and row.position in self.hot:
                stored = self.hot[row.position]
                self.waiting_id += 1
                moved = stored.row._replace(waiting_id=self.waiting_id)
                self.put(self.waiting, self.waiting_id, Waiting(moved, stored.shard, reason, None))
                self.put(self.hot, row.position)

    def stop_key(self, row: Row, attempts: int, delay: timedelta, followers: Sequence[Row]) -> None:
        due_at = self.now + delay
        if row.waiting_id is None:
            self.move_to_waiting([row], "retry")
        for waiting_id, waits in list(self.waiting.items()):
            same = waiting_id == row.waiting_id if row.waiting_id is not None else waits.row.position == row.position
            if same:
                failed = replace(waits, row=waits.row._replace(attempts=attempts), due_at=due_at)
                self.put(self.waiting, waiting_id, failed)
        self.move_to_waiting(followers)
        if row.key is not None and self.waits(row):
            key = row.topic, row.key
            stop = self.stopped.get(key)
            request = stop.request if stop is not None and stop.position == row.position else None
            rests = self.now + timedelta(minutes=1) if request == "skip" else due_at
            self.put(self.stopped, key, Stop(row.position, "retry", rests, request))

    def waits(self, row: Row) -> bool:
        """Whether anything of the row's key waits: the row itself may be settled by a zombie."""
        return any((waits.row.topic, waits.row.key) == (row.topic, row.key) for waits in self.waiting.values())

    def bury(self, row: Row) -> None:
        self.put(self.letters, row.id.int, row)
        self.remove([row])

    def park(self, head: Row, followers: Sequence[Row]) -> None:
        self.bury(head)
        self.move_to_waiting(followers)
        if head.key is not None:
            self.put(self.stopped, (head.topic, head.key), Stop(head.position, "parked", None))

    def append_followers(self, rows: Sequence[Row]) -> None:
        self.move_to_waiting([row for row in rows if row.key is not None])
        for row in rows:
            if row.key is None:
                self.stop_key(row, 0, timedelta(0), ())
            if row.key is not None and (row.topic, row.key) not in self.stopped and self.waits(row):
                self.put(self.stopped, (row.topic, row.key), Stop(row.position, "retry", self.now))

    def resume_key(self, keys: Iterable[Key]) -> None:
        for key in keys:
            left = [waits.row.position for waits in self.waiting.values() if (waits.row.topic, waits.row.key) == key]
            if not left:
                if key in self.stopped:
                    self.put(self.stopped, key)
            elif key in self.stopped:
                self.put(self.stopped, key, Stop(min(left), "retry", self.now))

    def reinsert_head(self, head: Row) -> None:
        """A repaired dead letter stands in front of its followers again."""
        assert head.key is not None
        self.waiting_id += 1
        back = head._replace(waiting_id=self.waiting_id, attempts=0)
        shard = shard_of(head.topic, head.key, head.id.int)
        self.put(self.waiting, self.waiting_id, Waiting(back, shard, "retry", self.now))
        self.put(self.letters, head.id.int)
        self.resume_key([(head.topic, head.key)])

    def carry_out_requests(self, shards: Collection[int]) -> None:
        for key, stop in list(self.stopped.items()):
            if stop.request is not None and shard_of(*key, 0) in shards:
                self._carry_out(key, stop)

    def _carry_out(self, key: Key, stop: Stop) -> None:
        """See `outboxkit_relay.store.operator_requests`."""
        dead = [row for row in self.letters.values() if row.position == stop.position]
        if stop.request == "repair" and dead:
            self.reinsert_head(dead[0])
        elif stop.request == "release" and stop.reason == "retry":
            self.put(self.stopped, key, replace(stop, request=None, due_at=self.now))
        elif stop.request == "skip" and stop.reason == "retry":
            if stop.due_at is not None and stop.due_at > self.now:
                line = [waits.row for waits in self.waiting.values() if (waits.row.topic, waits.row.key) == key]
                self.bury(min(line, key=lambda row: row.position))
                self.resume_key([key])
        else:
            self.resume_key([key])

    # --- leases --------------------------------------------------------------------------------------------------

    def must_wait(self, relay: UUID) -> bool:
        """Whether a lock of an open fenced transaction is in the way of a renewal or a take-over."""
        return any(
            count and (other == relay or self.leases.get(other, self.now) <= self.now)
            for other, count in self.sharing.items()
        )

    def renew_and_balance(self, relay: UUID, lease: timedelta, *, release: bool) -> tuple[frozenset[int], bool]:
        """See `outboxkit_relay.store.leases`."""
        self.look(relay)
        self.put(self.leases, relay, self.now + lease)
        for other, until in list(self.leases.items()):
            if until <= self.now:
                self.put(self.leases, other)
        mine = [shard for shard, owner in self.owners.items() if owner == relay]
        free = [shard for shard, owner in self.owners.items() if owner not in self.leases]
        quota = -(-SHARDS // len(self.leases))
        taken = free[: max(0, quota - len(mine))]
        for shard in taken:
            self.put(self.owners, shard, relay)
        if release:
            for shard in mine[quota:]:
                self.put(self.owners, shard, None)
            mine = mine[:quota]
        return frozenset((*mine, *taken)), len(mine) > quota

    def leave(self, relay: UUID) -> None:
        for shard, owner in self.owners.items():
            if owner == relay:
                self.put(self.owners, shard, None)
        self.put(self.leases, relay)

    def check_owner(self, relay: UUID, rows: Iterable[Row]) -> None:
        """I10: only the owner of a shard changes anything but the presence of published rows."""
        for row in rows:
            if self.owners[shard_of(row.topic, row.key, row.id.int)] != relay or relay not in self.leases:
                self.wrongs.append(f"I10: a relay that does not own its shard changed message {row.id.int}")


def _wanted(part: Part, stored: Stored, *, missed: bool) -> bool:
    if (stored.row.topic in part.topics) != part.only:
        return False
    return part.seen is None or unseen(part.seen, stored.xid) != missed
