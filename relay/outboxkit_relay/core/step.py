"""The relay's core: takes an event in and says what to do next. No clock, no I/O, no threads: it is deterministic.

``step(state, event, now, rng) -> (state, commands)``. The shell (`outboxkit_relay.daemon.relay`) carries the commands
out and brings their results back as events:

    Owned ─▶ Fetch ─▶ Fetched ─▶ Publish… ─▶ Answered… ─▶ Settle ─▶ Settled
              ▲________│ (while there is room)

The state belongs to the core and is changed in place: an event carries a thousand rows, and a copy per event would cost
more than all the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

from outboxkit.policy import Failure
from outboxkit_relay.core import protocol
from outboxkit_relay.core.destinations import key_of
from outboxkit_relay.core.intake import (
    apply_pauses,
    forget_settled,
    not_in_hand,
    note_settled,
    queue_due,
    queue_fresh,
    settle,
    stop_keys,
)
from outboxkit_relay.core.lanes import MAIN
from outboxkit_relay.core.outcomes import decide_outcomes
from outboxkit_relay.core.planning import give_up, plan
from outboxkit_relay.core.state import State

__all__ = ["step"]

_FLOWING_FOR: Final = timedelta(seconds=1)  # after the last message, reads stay quick
_SLOWER: Final = 1.5  # each empty read waits so much longer than the one before

Commands = list[protocol.Command]


def step(state: State, event: protocol.Event, now: datetime, rng: random.Random) -> tuple[State, Commands]:
    """Takes an event in, and returns what to do now."""
    commands: Commands = []
    if isinstance(event, protocol.Answered):
        _answered(state, event, commands, now=now, rng=rng)
    else:
        _ON[type(event)](state, event, commands, now)
    if state.joined and not state.left:
        plan(state, commands, now, rng)
    return state, commands


def _owned(state: State, event: protocol.Owned, commands: Commands, now: datetime) -> None:
    if not event.shards >= state.lanes.shards:
        # Some were given back; what is queued may belong to them.
        for destination in state.destinations.values():
            state.forget(destination.drop())
        state.lanes.forget()
    if not event.shards <= state.lanes.shards:
        state.empty_rounds = 0  # of these none has been read
    state.lanes.own(event.shards)
    state.joined, state.busy = True, False
    state.has_surplus, state.work_elsewhere = event.has_surplus, event.work_elsewhere
    # What a settlement has stopped while this was asked may be missing in the answer.
    stop_keys(state, event.stopped | state.stopped_lately)
    apply_pauses(state, event.paused, commands, now)
    state.rebalance_at = now + state.config.lease / 3
    state.wake_at = min(state.wake_at, now)


def _fetched(state: State, event: protocol.Fetched, commands: Commands, now: datetime) -> None:
    state.reading, state.work_elsewhere = False, state.work_elsewhere or bool(event.due)
    state.lease_until = event.until or state.lease_until
    # A scan finds what is in hand, too; and every read finds rows with transaction ids from another cluster.
    rows = not_in_hand(state, event.page.rows)
    state.flaws |= event.flaws
    if event.page.large:
        state.track_bytes([row for row in rows if state.lanes.reads(row.topic)], event.page.large)
    state.lanes.advance(event.lane, event.page, state.config.batch_size)
    forget_settled(state)
    queue_fresh(state, rows, commands, now)
    # What is due of a topic that was paused while this was read is still due afterwards; and of a key that was touched
    # meanwhile, an earlier row may be due.
    due = [row for row in event.due if state.lanes.reads(row.topic) and key_of(row) not in state.touched]
    queue_due(state, due, commands, now)
    if due:  # the next ones of their keys are due as soon as these are settled
        state.look_at, state.wake_at = now, min(state.wake_at, now)
    if event.lane == MAIN and state.lanes.main.round is None:
        _schedule_next_read(state, now, found=bool(event.page.rows or due))


def _schedule_next_read(state: State, now: datetime, *, found: bool) -> None:
    """Ends a round of the main lane: the next one begins at once while messages flow, later and later when not."""
    config = state.config
    state.empty_rounds = 0 if found else state.empty_rounds + 1
    if found:
        state.flowing_until, state.idle = now + _FLOWING_FOR, timedelta(0)
    elif now < state.flowing_until:
        state.idle = config.quick
    else:
        state.idle = min(max(state.idle, config.quick) * _SLOWER, config.slow)
    state.wake_at = now if state.hinted else now + state.idle
    state.hinted = False


def _rescanned(state: State, event: protocol.RescanResult, commands: Commands, now: datetime) -> None:
    state.busy = False
    state.lease_until = event.until or state.lease_until
    rows = not_in_hand(state, event.rows)
    state.flaws |= event.flaws
    state.found_by_rescan += len(rows)
    queue_fresh(state, rows, commands, now)


def _lease_confirmed(state: State, event: protocol.LeaseConfirmed, _commands: Commands, _now: datetime) -> None:
    state.busy = False
    state.lease_until = event.until


def _answered(state: State, event: protocol.Answered, commands: Commands, *, now: datetime, rng: random.Random) -> None:
    destination = next((found for found in state.destinations.values() if event.number in found.batches), None)
    if destination is None:
        return  # of a time before the lease was lost
    failures = {refusal.failure for refusal in event.receipts.refusals}
    if Failure.FENCED in failures:
        _fenced(state, protocol.Fenced(), commands, now)
        return
    broker = destination.limits.broker
    if Failure.INDETERMINATE in failures and event.number > state.given_up.get(broker, 0):
        give_up(state, commands, now, broker)  # the session may be broken, and what is unknown must not come later
    for batch in destination.acknowledged(event.number, event.receipts):
        settle(state, decide_outcomes(state, destination, batch, now=now, rng=rng), commands)
    if destination.failing and not destination.batches:
        destination.failing = False
        destination.broken.clear()


def _settled(state: State, event: protocol.Settled, commands: Commands, now: datetime) -> None:
    note_settled(state, event, commands, now)


def _fenced(state: State, _event: protocol.Fenced, commands: Commands, _now: datetime) -> None:
    state.start_again()
    commands.append(protocol.GiveUp())
    if state.stop_at is not None:
        state.left = True
    commands.append(protocol.Leave() if state.left else protocol.Rejoin())


def _tick(_state: State, _event: protocol.Tick, _commands: Commands, _now: datetime) -> None:
    """Only time has passed: `plan` looks at the clock."""


def _woken(state: State, _event: protocol.Woken, _commands: Commands, now: datetime) -> None:
    state.wake_at, state.hinted, state.woken = min(state.wake_at, now), state.reading, True


def _stop(state: State, event: protocol.StopRelay, commands: Commands, _now: datetime) -> None:
    state.stop_at = event.until
    for batch in state.batches():
        batch.deadline = min(batch.deadline, event.until)
    if not state.joined:
        state.left = True
        commands.append(protocol.Leave())


_ON: Final[dict[type, Callable[[State, Any, Commands, datetime], None]]] = {
    protocol.Owned: _owned,
    protocol.Fetched: _fetched,
    protocol.RescanResult: _rescanned,
    protocol.LeaseConfirmed: _lease_confirmed,
    protocol.Settled: _settled,
    protocol.Fenced: _fenced,
    protocol.Tick: _tick,
    protocol.StopRelay: _stop,
    protocol.Woken: _woken,
}
