"""Outcomes: decides what follows from a broker's answer, row by row. Deterministic; changes state and destination.

A row of an answered batch is published, read again, tried again later, buried, or moved to the waiting room.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit import policy
from outboxkit.policy import Bury, Followers, PauseDestination, Retry
from outboxkit.rows import Evidence
from outboxkit_relay.core.destinations import Destination, InFlightBatch, Key, Unavailability, by_topic, key_of
from outboxkit_relay.core.protocol import Burial, FailedHead, Settle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outboxkit.brokers import Receipts, Refusal
    from outboxkit.rows import Row
    from outboxkit_relay.core.protocol import StoppedKey
    from outboxkit_relay.core.state import State

__all__ = ["decide_outcomes", "expiries", "freed", "keys_stopped_by"]

_WAITING_ID: Final = attrgetter("waiting_id")


@dataclass(slots=True)
class _Deciding:
    """The decisions on one answered batch, as they are made.

    Attributes:
        state: of the relay; changed.
        destination: of the batch; changed.
        now: the current instant.
        rng: source of the jitter.
        published: indexes of acknowledged rows.
        failed: heads that are tried again.
        buried: heads that are dead.
        to_waiting: fresh rows of stopped keys.
        unknown: rows that are still in the table and are read again.
    """

    state: State
    destination: Destination
    now: datetime
    rng: random.Random
    published: list[int] = field(default_factory=list)
    failed: list[FailedHead] = field(default_factory=list)
    buried: list[Burial] = field(default_factory=list)
    to_waiting: list[Row] = field(default_factory=list)
    unknown: list[Row] = field(default_factory=list)

    def refused(self, row: Row, refusal: Refusal) -> None:
        """Decides on a refused row; nothing earlier of its key is in doubt."""
        if row.waiting_id is None and key_of(row) in self.state.stopped:
            # Its head failed a moment ago, or one behind it was paused.
            self.to_waiting += [row, *self.destination.pull(key_of(row))]
            return
        failure, before = refusal.failure, self.destination.trouble
        times = (before.times + 1 if before else 1) if failure.of_destination else row.attempts + 1
        decision = policy.verdict(failure, times, self.state.config.retry, self.now, self.rng)
        if isinstance(decision, Retry):
            self.failed.append(self._failed_head(row, refusal, delay=decision.at - self.now))
        elif isinstance(decision, Bury):
            self.buried.append(self._burial(row, refusal, fate=decision.followers))
        else:
            self.unknown.append(row)
            self.destination.broken.add(key_of(row))
            if not self.destination.failing:
                until = decision.until if isinstance(decision, PauseDestination) else self.now
                since = before.since if before else self.now
                self.destination.failing = True
                self.destination.trouble = Unavailability(until, times, failure, refusal.text, since)

    def _failed_head(self, row: Row, refusal: Refusal, *, delay: timedelta) -> FailedHead:
        return FailedHead(
            row=row,
            failure=refusal.failure,
            text=refusal.text,
            attempts=row.attempts + 1,
            delay=delay,
            followers=_stop(self.state, self.destination, row),
        )

    def _burial(self, row: Row, refusal: Refusal, *, fate: Followers) -> Burial:
        skip = fate is Followers.SKIP
        followers = () if skip else _stop(self.state, self.destination, row)
        if skip:
            self.destination.free([row])
        return Burial(
            row=row,
            failure=refusal.failure,
            text=refusal.text,
            attempts=row.attempts + 1,
            fate=fate,
            followers=followers,
        )


def decide_outcomes(
    state: State, destination: Destination, batch: InFlightBatch, *, now: datetime, rng: random.Random
) -> Settle:
    """Decides on every row of an answered batch, and notes what the answer says about its destination."""
    receipts = batch.receipts
    assert receipts is not None  # noqa: S101  the caller hands over answered batches
    if not receipts.refusals and not destination.broken:
        return _all_published(destination, batch.rows, receipts, now)
    deciding = _Deciding(state, destination, now, rng)
    refusals = {refusal.index: refusal for refusal in receipts.refusals}
    for index, row in enumerate(batch.rows):
        refusal = refusals.get(index)
        if key_of(row) in destination.broken:
            deciding.unknown.append(row)  # what came before it may come after it: it does not count as published
        elif refusal is None:
            deciding.published.append(index)
        else:
            deciding.refused(row, refusal)
    published = [batch.rows[index] for index in deciding.published]
    _update_circuit(destination, len(published), receipts, now)
    state.forget(deciding.unknown)
    destination.free(published)
    if destination.failing:
        state.forget(destination.drop())
        state.lanes.stop_reading(destination.topic)
    elif published:
        destination.trouble = None
    return _settlement(published, deciding, receipts)


def _all_published(destination: Destination, rows: Sequence[Row], receipts: Receipts, now: datetime) -> Settle:
    destination.trouble = None
    if destination.breaker is not None:
        destination.breaker.passed(len(rows), now)
    destination.free(rows)
    return Settle(evidence=(_evidence(rows, receipts.partitions, receipts.offsets),), freed=freed(rows))


def _update_circuit(destination: Destination, published: int, receipts: Receipts, now: datetime) -> None:
    """Leaves the destination alone for longer when it refuses too much."""
    breaker, trouble = destination.breaker, destination.trouble
    refused = sum(refusal.failure.of_destination for refusal in receipts.refusals)
    if breaker is not None and refused and breaker.refused(refused, published, now) and trouble is not None:
        destination.trouble = replace(trouble, until=max(trouble.until, now + breaker.rule.open_for))


def _stop(state: State, destination: Destination, head: Row) -> tuple[Row, ...]:
    """Stops the head's key; returns its followers that were queued."""
    if head.key is None:
        destination.free([head])  # it will come back under the same position
        return ()
    state.stopped |= {key_of(head)}
    return tuple(destination.pull(key_of(head)))


# --- settlements -------------------------------------------------------------------------------------------------


def keys_stopped_by(settlement: Settle) -> list[Key]:
    """Keys that are stopped when the settlement is committed, whatever the table says before."""
    heads = [*(failed.row for failed in settlement.failed), *(burial.row for burial in settlement.buried)]
    return [key_of(row) for row in (*settlement.to_waiting, *heads) if row.key is not None]


def expiries(rows: Sequence[Row]) -> tuple[Evidence, ...]:
    """The evidence of rows that came too late, by topic."""
    return tuple(
        Evidence(topic=topic, outcome="expired", rows=group, partitions=[-1] * len(group), offsets=[-1] * len(group))
        for topic, group in by_topic(rows).items()
    )


def freed(rows: Sequence[Row]) -> tuple[StoppedKey, ...]:
    """The stopped keys whose head is settled: their next follower is due."""
    if not any(map(_WAITING_ID, rows)):
        return ()
    return tuple((row.topic, row.key) for row in rows if row.waiting_id is not None and row.key is not None)


def _evidence(rows: Sequence[Row], partitions: Sequence[int], offsets: Sequence[int]) -> Evidence:
    return Evidence(topic=rows[0].topic, outcome="published", rows=rows, partitions=partitions, offsets=offsets)


def _settlement(published: list[Row], deciding: _Deciding, receipts: Receipts) -> Settle:
    partitions = [receipts.partitions[index] for index in deciding.published]
    offsets = [receipts.offsets[index] for index in deciding.published]
    return Settle(
        evidence=(_evidence(published, partitions, offsets),) if published else (),
        failed=tuple(deciding.failed),
        buried=tuple(deciding.buried),
        to_waiting=tuple(deciding.to_waiting),
        freed=freed(published),
    )
