"""Planning: decides what to do next, after every event: renew, publish, read, rescan, or leave. Pure."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import datetime, timedelta
from enum import Enum, auto
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import Batch, Receipts, Refusal
from outboxkit.policy import Failure
from outboxkit.rows import Reading
from outboxkit_relay.core import protocol
from outboxkit_relay.core.destinations import InFlightBatch
from outboxkit_relay.core.intake import settle
from outboxkit_relay.core.lanes import MAIN
from outboxkit_relay.core.outcomes import decide_outcomes
from outboxkit_relay.core.state import LONG_AGO, State

if TYPE_CHECKING:
    from outboxkit.rows import Row
    from outboxkit_relay.core.destinations import Destination

__all__ = ["give_up", "plan"]

_PROBE: Final = 10  # rows: enough to see whether a destination works again, few enough to lose
_WAITING_ROOM_EVERY: Final = timedelta(milliseconds=100)
_WAITING_ROOM_CAN_WAIT: Final = timedelta(milliseconds=400)  # while hints come
_ASK_EVERY: Final = timedelta(milliseconds=100)  # (once) whether something is left
_RESCAN_EVERY: Final = timedelta(minutes=1)
_LAST_ANSWERS: Final = timedelta(seconds=5)  # after a stop has given up: an adapter that answers later is broken


def plan(state: State, commands: list[protocol.Command], now: datetime, rng: random.Random) -> None:
    """Adds the commands that are due now."""
    for broker in _brokers_that_are_late(state, now):
        give_up(state, commands, now, broker)
    if now >= _rebalance_at(state) and not state.reading and not state.busy:
        _rebalance(state, commands, release=False)
    elif state.stop_at is not None:
        # What the broker has not answered even after the give-up stays in the table: another relay sends it again.
        abandoned = now >= state.stop_at + _LAST_ANSWERS and not state.settling
        _leave_if(state, commands, quiet=state.is_quiet or abandoned)
    elif state.has_surplus:
        if state.is_quiet:
            _rebalance(state, commands, release=True)
    else:
        if state.flaws:
            _refuse_flawed(state, commands, now, rng)
        _publish(state, commands, now)
        _read(state, commands, now)


def give_up(state: State, commands: list[protocol.Command], now: datetime, broker: str) -> None:
    """Gives up all that is in flight at a broker, once: the answers that follow end every batch."""
    state.given_up[broker] = state.number
    for destination in state.destinations.values():
        if destination.limits.broker == broker:
            for batch in destination.batches.values():
                batch.deadline = now + state.config.patience
    commands.append(protocol.GiveUp(broker))


def _brokers_that_are_late(state: State, now: datetime) -> list[str]:
    late = {
        destination.limits.broker
        for destination in state.destinations.values()
        if any(batch.deadline <= now for batch in destination.batches.values())
    }
    return sorted(late)


# --- lease and end -----------------------------------------------------------------------------------------------


def _rebalance_at(state: State) -> datetime:
    """When the lease is renewed; a relay that wants to leave asks sooner whether something is left."""
    wants_to_leave = state.config.once and state.work_elsewhere and state.empty_rounds
    return state.rebalance_at - state.config.lease / 3 + _ASK_EVERY if wants_to_leave else state.rebalance_at


def _rebalance(state: State, commands: list[protocol.Command], *, release: bool) -> None:
    state.busy, state.stopped_lately = True, frozenset()
    commands.append(protocol.Rebalance(release=release))


def _leave_if(state: State, commands: list[protocol.Command], *, quiet: bool) -> None:
    if quiet:
        state.left = True
        commands.append(protocol.Leave())


# --- publishing --------------------------------------------------------------------------------------------------


class _Hindrance(Enum):
    """Why a destination gets no batch now."""

    WAITS = auto()  #: for rows, an answer, its limits or its rate
    NEEDS_LEASE = auto()  #: the lease must be confirmed first


def _publish(state: State, commands: list[protocol.Command], now: datetime) -> None:
    state.pace_at = None
    for destination in state.destinations.values():
        while isinstance(batch := _next_batch(state, destination, now), Batch):
            state.number += 1
            destination.sent(InFlightBatch(state.number, batch.rows, now + state.config.patience, now))
            commands.append(protocol.Publish(state.number, batch))
        if batch is _Hindrance.NEEDS_LEASE:
            if not state.busy and not state.reading:
                state.busy = True
                commands.append(protocol.ConfirmLease())
            return


def _next_batch(state: State, destination: Destination, now: datetime) -> Batch | _Hindrance:
    """Takes the next rows of a destination out of its queue, if it may have them."""
    config, healthy = state.config, destination.trouble is None
    window = config.window if healthy else 1
    if (
        not destination.queue
        or len(destination.batches) >= window
        or state.settling >= config.window  # a crash repeats what is acknowledged and not settled: that is bounded
        or not destination.takes_more(state.given_up.get(destination.limits.broker, 0))
    ):
        return _Hindrance.WAITS
    count = destination.allowance(config.batch_size if healthy else _PROBE, now)
    if not count:
        _wait_for_pace(state, destination)
        return _Hindrance.WAITS
    if now >= state.lease_until:
        return _Hindrance.NEEDS_LEASE
    rows = destination.take(count, state.flaws)
    return Batch(destination.topic, rows) if rows else _Hindrance.WAITS


def _refuse_flawed(state: State, commands: list[protocol.Command], now: datetime, rng: random.Random) -> None:
    """Refuses flawed rows that stand at the head of a queue, when all that was sent before them is answered."""
    for destination in state.destinations.values():
        if destination.batches or destination.failing:
            continue
        while destination.queue and destination.queue[0].position in state.flaws:
            rows = _take_flawed(state, destination)
            unsent = [-1] * len(rows)
            refusals = (Refusal(at, Failure.INVALID, state.flaws[row.position]) for at, row in enumerate(rows))
            refused = InFlightBatch(0, rows, now, now, Receipts(unsent, unsent, tuple(refusals)))
            settle(state, decide_outcomes(state, destination, refused, now=now, rng=rng), commands)


def _take_flawed(state: State, destination: Destination) -> list[Row]:
    """The flawed rows at the head of the queue; they get no second try: it is not the broker that refuses them."""
    flawed = takewhile(lambda row: row.position in state.flaws, islice(destination.queue, state.config.batch_size))
    rows = destination.take(len(list(flawed)))
    return [row._replace(attempts=max(1, row.attempts)) for row in rows]


def _wait_for_pace(state: State, destination: Destination) -> None:
    """Notes when a destination with a rate may send again; without a rate it is an answer that makes room."""
    if destination.bucket is not None:
        ready_at = destination.bucket.ready_at
        state.pace_at = ready_at if state.pace_at is None else min(state.pace_at, ready_at)


# --- reading -----------------------------------------------------------------------------------------------------


def _read(state: State, commands: list[protocol.Command], now: datetime) -> None:
    """Reads the next page of some lane, if there is room and it is time; else looks for what was missed."""
    if state.reading or state.busy:
        return
    _resume_topics(state, now)
    lane = _next_lane(state, now)
    if _is_done(state):
        _leave_if(state, commands, quiet=state.is_quiet)
    elif lane is not None:
        commands.append(_fetch(state, lane, now))
    elif now >= state.rescan_at and state.is_quiet and not state.queued and state.lanes.main.is_through:
        _rescan(state, commands, now)


def _is_done(state: State) -> bool:
    """(once) Whether nothing is left to publish; what operators have paused is not waited for."""
    everywhere = state.lanes.topics.keys() <= state.paused.destinations
    empty = bool(state.empty_rounds) and not state.queued and everywhere
    return state.config.once and empty and not state.work_elsewhere


def _fetch(state: State, lane: str, now: datetime) -> protocol.Fetch:
    state.reading, state.latest_lane = True, lane
    state.reads += 1
    look_at = state.look_at + (_WAITING_ROOM_CAN_WAIT if state.woken else timedelta(0))
    look = now >= look_at and not state.waiting and state.lanes.main.has_scanned
    state.woken = False
    if look:
        state.look_at, state.touched = now + _WAITING_ROOM_EVERY, set(state.moving_to_waiting)
    reading = replace(state.lanes.reading(lane, state.config.batch_size), max_bytes=state.config.page_bytes)
    return protocol.Fetch(lane, reading, state.lanes.not_scanned, look, state.paused)


def _resume_topics(state: State, now: datetime) -> None:
    """Reads topics again whose trouble is over, and that nobody has paused."""
    for topic in [topic for topic, lane in state.lanes.topics.items() if lane is None]:
        destination = state.destination(topic)
        over = destination.trouble is None or destination.trouble.until <= now
        if over and not destination.failing and topic not in state.paused.destinations:
            state.lanes.resume_reading(topic)


def _next_lane(state: State, now: datetime) -> str | None:
    """The lane to read; main lane and catch-up lanes take turns, so that none waits for another's backlog."""
    lanes, config = state.lanes, state.config
    if state.large_bytes >= config.max_bytes:
        return None
    main = state.queued < config.room and (lanes.main.round is not None or now >= state.wake_at)
    catching_up = (
        topic
        for topic, lane in lanes.topics.items()
        if lane is not None and not lane.is_through and _has_room(state, state.destination(topic))
    )
    if not main or state.latest_lane == MAIN:
        return next(catching_up, MAIN if main else None)
    return MAIN


def _has_room(state: State, destination: Destination) -> bool:
    config = state.config
    return destination.queued <= config.budget // 2 and destination.large <= config.page_bytes // 2


def _rescan(state: State, commands: list[protocol.Command], now: datetime) -> None:
    if state.rescan_at > LONG_AGO:
        memory = state.lanes.memory(state.config.batch_size)
        state.busy = True
        reading = Reading(shards=memory.shards, parts=memory.parts, limit=memory.limit, missed=True)
        commands.append(protocol.Rescan(reading))
    state.rescan_at = now + _RESCAN_EVERY
