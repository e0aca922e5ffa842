"""What becomes of rows whose batch was answered: published, read again, held, buried, or set aside. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit import policy
from outboxkit.policy import Bury, Followers, PauseDestination, Retry
from outboxkit.rows import Evidence
from outboxkit_relay.core.destinations import Destination, InFlightBatch, Key, Unavailability, by_topic, key_of
from outboxkit_relay.core.protocol import Burial, Hold, Settle

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence
    from datetime import datetime, timedelta

    from outboxkit.brokers import Receipts, Refusal
    from outboxkit.rows import Row
    from outboxkit_relay.core.protocol import StoppedKey
    from outboxkit_relay.core.state import State

__all__ = ["expiries", "freed", "judge", "keys_aside"]

_WAITING_ID: Final = attrgetter("waiting_id")


@dataclass(slots=True)
class _Outcome:
    """The rows of one flight, sorted by what becomes of them."""

    published: list[int] = field(default_factory=list)  # indexes
    held: list[Hold] = field(default_factory=list)
    buried: list[Burial] = field(default_factory=list)
    aside: list[Row] = field(default_factory=list)
    unknown: list[Row] = field(default_factory=list)  # still in the table: they are read again


def judge(
    state: State, destination: Destination, flight: InFlightBatch, *, now: datetime, rng: random.Random
) -> Settle:
    """Decides on every row of an answered flight, and updates what the relay knows of its destination."""
    receipts = flight.receipts
    assert receipts is not None  # noqa: S101  only answered flights acknowledged
    if not receipts.refusals and not destination.broken:
        destination.trouble = None
        if destination.breaker is not None:
            destination.breaker.passed(len(flight.rows), now)
        destination.free(flight.rows)
        return _publication(flight.rows, receipts)
    outcome = _Outcome()
    refusals = {refusal.index: refusal for refusal in receipts.refusals}
    for index, row in enumerate(flight.rows):
        refusal = refusals.get(index)
        if refusal is None and key_of(row) not in destination.broken:
            outcome.published.append(index)
        elif refusal is None or key_of(row) in destination.broken:
            outcome.unknown.append(row)  # what came before it may come after it: it does not count as published
        else:
            _sentence(state, destination, row, refusal, outcome=outcome, now=now, rng=rng)
    published = [flight.rows[index] for index in outcome.published]
    _look_at_circuit(destination, len(published), receipts, now)
    state.forget(outcome.unknown)
    destination.free(published)
    if destination.failing:
        state.forget(destination.drop())
        state.lanes.stop_reading(destination.topic)
    elif published:
        destination.trouble = None
    return _settlement(published, outcome, receipts)


def _sentence(
    state: State,
    destination: Destination,
    row: Row,
    refusal: Refusal,
    *,
    outcome: _Outcome,
    now: datetime,
    rng: random.Random,
) -> None:
    """Decides on a refused row of which nothing earlier of its key is in doubt."""
    if row.waiting_id is None and key_of(row) in state.stopped:
        # Its head failed a moment ago, or one behind it was paused.
        outcome.aside += [row, *destination.pull(key_of(row))]
        return
    failure, before = refusal.failure, destination.trouble
    times = (before.times + 1 if before else 1) if failure.of_destination else row.attempts + 1
    decision = policy.verdict(failure, times, state.rules.retry, now, rng)
    if isinstance(decision, Retry):
        outcome.held.append(_hold(state, destination, row, refusal, delay=decision.at - now))
    elif isinstance(decision, Bury):
        outcome.buried.append(_burial(state, destination, row, refusal, fate=decision.followers))
    else:
        outcome.unknown.append(row)
        destination.broken.add(key_of(row))
        if not destination.failing:
            until = decision.until if isinstance(decision, PauseDestination) else now
            since = before.since if before else now
            destination.failing, destination.trouble = True, Unavailability(until, times, failure, refusal.text, since)


def _hold(state: State, destination: Destination, row: Row, refusal: Refusal, *, delay: timedelta) -> Hold:
    return Hold(
        row=row,
        failure=refusal.failure,
        text=refusal.text,
        attempts=row.attempts + 1,
        delay=delay,
        followers=_stop(state, destination, row),
    )


def _burial(state: State, destination: Destination, row: Row, refusal: Refusal, *, fate: Followers) -> Burial:
    skip = fate is Followers.SKIP
    followers = () if skip else _stop(state, destination, row)
    if skip:
        destination.free([row])
    return Burial(
        row=row,
        failure=refusal.failure,
        text=refusal.text,
        attempts=row.attempts + 1,
        fate=fate,
        followers=followers,
    )


def _look_at_circuit(destination: Destination, published: int, receipts: Receipts, now: datetime) -> None:
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


def keys_aside(settlement: Settle) -> list[Key]:
    """Keys that are stopped when the settlement is committed, whatever the table says before."""
    heads = [*(held.row for held in settlement.held), *(burial.row for burial in settlement.buried)]
    return [key_of(row) for row in (*settlement.aside, *heads) if row.key is not None]


def expiries(rows: Sequence[Row]) -> tuple[Evidence, ...]:
    """The evidence of rows that came too late, by topic."""
    return tuple(
        Evidence(topic=topic, outcome="expired", rows=group, partitions=[-1] * len(group), offsets=[-1] * len(group))
        for topic, group in by_topic(rows).items()
    )


def _publication(rows: Sequence[Row], receipts: Receipts) -> Settle:
    evidence = Evidence(
        topic=rows[0].topic,
        outcome="published",
        rows=rows,
        partitions=receipts.partitions,
        offsets=receipts.offsets,
    )
    return Settle(evidence=(evidence,), freed=freed(rows))


def _settlement(published: list[Row], outcome: _Outcome, receipts: Receipts) -> Settle:
    evidence: tuple[Evidence, ...] = ()
    if published:
        partitions = [receipts.partitions[index] for index in outcome.published]
        offsets = [receipts.offsets[index] for index in outcome.published]
        topic = published[0].topic
        evidence = (Evidence(topic=topic, outcome="published", rows=published, partitions=partitions, offsets=offsets),)
    return Settle(
        evidence=evidence,
        held=tuple(outcome.held),
        buried=tuple(outcome.buried),
        aside=tuple(outcome.aside),
        freed=freed(published),
    )


def freed(rows: Sequence[Row]) -> tuple[StoppedKey, ...]:
    """The stopped keys whose head is settled: their next follower is due."""
    if not any(map(_WAITING_ID, rows)):
        return ()
    return tuple((row.topic, row.key) for row in rows if row.waiting_id is not None and row.key is not None)
