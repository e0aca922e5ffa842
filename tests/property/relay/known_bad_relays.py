"""Wrong relays: each differs from the real one in one habit that has lost, doubled or reordered messages elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from outboxkit.brokers import Receipts
from outboxkit.policy import Followers
from outboxkit.rows import Page, Row
from outboxkit_relay.core import outcomes
from outboxkit_relay.core.destinations import Destination, key_of
from outboxkit_relay.core.lanes import Lane, Lanes
from outboxkit_relay.core.protocol import Answered, Command, Event, Fetch, Fetched
from outboxkit_relay.core.state import State
from tests.property.relay.database import Stored
from tests.property.relay.process import Process
from tests.property.relay.simulation import Key, SimulatedCluster

__all__ = [
    "Careless",
    "CursorOnPosition",
    "FenceThatDoesNotLock",
    "HoldOnlyTheMessage",
    "LookTooEarly",
    "PublishBeforeClaim",
    "ReleaseAtOnce",
    "SettleBeyondThePrefix",
    "SkipFailedHead",
    "SnapshotKept",
]


class PublishBeforeClaim(Process):
    """Looks at its lease, but does not make durable what it has read."""

    def safe_until(self) -> Any:
        self.database.look(self.id)
        return self.database.leases[self.id]


class CursorOnPosition(Process):
    """Reads on behind the highest position that it has seen."""

    cursor = 0

    def page(self, command: Fetch) -> Page:
        reading = command.reading
        scan = reading.parts[0].seen is None and reading.round is None
        last = 0 if scan else max(reading.last, self.cursor)
        parts = tuple(replace(part, seen=None) for part in reading.parts)
        page = self.database.read(replace(reading, parts=parts, last=last, round=None))
        self.cursor = max([last, *(row.position for row in page.rows)])
        return page


class SnapshotKept(Process):
    """Goes on with its snapshots after the server session was lost."""

    def gone(self) -> None:
        lanes = self.state.lanes
        super().gone()
        self.state.lanes = lanes


class SkipFailedHead(Process):
    """Holds a refused message back, and lets its followers go."""

    def step(self, event: Event) -> list[Command]:
        def stop_nothing(_state: State, destination: Destination, head: Row) -> tuple[Row, ...]:
            destination.free([head])
            return ()

        with patch.object(outcomes, "_stop", stop_nothing):
            return super().step(event)


class SettleBeyondThePrefix(Process):
    """Takes a batch as published up to the last message that was acknowledged."""

    def step(self, event: Event) -> list[Command]:
        if isinstance(event, Answered) and event.receipts.refusals:
            receipts = event.receipts
            refused = {refusal.index for refusal in receipts.refusals}
            last = max((index for index in range(len(receipts.offsets)) if index not in refused), default=-1)
            left = tuple(refusal for refusal in receipts.refusals if refusal.index > last)
            event = Answered(event.number, Receipts(receipts.partitions, receipts.offsets, left))
        return super().step(event)


class FenceThatDoesNotLock(Process):
    """Looks whether its lease holds before it buries or holds, but does not keep others from taking over."""

    def fence(self) -> None:
        self.database.look(self.id)


class HoldOnlyTheMessage(Process):
    """Holds a paused message back, and lets the later ones of its key go."""

    def step(self, event: Event) -> list[Command]:
        def only_the_paused(state: State, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
            held = [state.paused.covers(row) or key_of(row) in state.stopped for row in rows]
            free = [row for row, waits in zip(rows, held, strict=True) if not waits]
            return free, [row for row, waits in zip(rows, held, strict=True) if waits]

        with patch("outboxkit_relay.core.intake._split_paused", only_the_paused):
            return super().step(event)


class LookTooEarly(Process):
    """Takes what is due from the waiting room before it has read what is older."""

    def step(self, event: Event) -> list[Command]:
        with (
            patch.object(Lane, "has_scanned", new=True),
            patch.object(Lanes, "not_scanned", property(_not_read)),
        ):
            return super().step(event)


def _not_read(lanes: Lanes) -> frozenset[str]:
    return frozenset(topic for topic, lane in lanes.topics.items() if lane is None)


class Careless(SimulatedCluster):
    """Operators who release a key themselves instead of asking the relay that owns it; and they have much to do."""

    def __init__(self, seed: int, relay: type[Process]) -> None:
        super().__init__(seed, relay)
        self.trouble_rate = 0.4
        self.left_to_write *= 3
        del self.keys[1:]
        self.config = replace(self.config, retry=replace(self.config.retry, followers=Followers.PARK))
        for process in self.processes:
            process.config = process.state.config = self.config

    def _everything_moves(self) -> bool:
        self.request()
        return super()._everything_moves()

    def request(self) -> None:
        pages = [event.page for process in self.processes for event in process.arrivals if isinstance(event, Fetched)]
        read = {(row.topic, row.key) for page in pages for row in page.rows}
        for key, stop in list(self.database.stopped.items()):
            if stop.reason == "parked" and (key in read or not pages):
                self.release(key)

    def release(self, key: Key) -> None:
        database = self.database
        xid = database.begin()
        for waiting_id, waits in list(database.waiting.items()):
            row = waits.row
            if (row.topic, row.key) == key:
                fresh = row._replace(waiting_id=None, attempts=0)
                database.put(database.hot, row.position, Stored(fresh, xid, waits.shard))
                database.put(database.waiting, waiting_id)
        database.put(database.stopped, key)
        database.commit(xid, flush=True)
        self.counts["release"] += 1


class ReleaseAtOnce(Process):
    """Does not carry releases out between two pages, but finds out with every page which keys others have released."""

    def step(self, event: Event) -> list[Command]:
        if isinstance(event, Fetched):
            found = self.database.stopped_keys(self.state.lanes.shards)
            self.state.stopped = found | frozenset(self.state.moving_to_waiting)
        return super().step(event)
