"""The relay's core: what to do next. No clock, no I/O, no threads: the same events give the same commands.

``step(state, event, now, rng) -> (state, commands)``. The shell (`outboxkit_relay.daemon.relay`) carries the commands
out and brings their results back as events:

    Owned ─▶ Fetch ─▶ Fetched ─▶ Publish… ─▶ Answered… ─▶ Settle ─▶ Settled
              ▲________│ (while there is room)

The state belongs to the core and is changed in place: an event carries a thousand rows, and a copy per event would cost
more than all the rest.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import Batch
from outboxkit.policy import Failure
from outboxkit.rows import Reading
from outboxkit_relay.core.destinations import InFlightBatch, Key, by_topic, key_of
from outboxkit_relay.core.lanes import MAIN
from outboxkit_relay.core.outcomes import expiries, freed, judge, keys_aside
from outboxkit_relay.core.protocol import (
    Answered,
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
from outboxkit_relay.core.state import LONG_AGO, State

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from outboxkit.rows import PauseSet, Row
    from outboxkit_relay.core.destinations import Destination
    from outboxkit_relay.core.protocol import StoppedKey

__all__ = ["step"]

_POSITION: Final = attrgetter("position")
_EXPIRES_AT: Final = attrgetter("expires_at")
_WAITING_ID: Final = attrgetter("waiting_id")
_PROBE: Final = 10  # rows: enough to see whether a destination works again, few enough to lose
_WAITING_ROOM_EVERY: Final = timedelta(milliseconds=100)
_ASK_EVERY: Final = timedelta(milliseconds=100)  # (once) whether something is left
_WAITING_ROOM_CAN_WAIT: Final = timedelta(milliseconds=400)  # while hints come
_WATCH_EVERY: Final = timedelta(minutes=1)
_LAST_ANSWERS: Final = timedelta(seconds=5)  # after a stop has given up: an adapter that answers later is broken
_FLOWING_FOR: Final = timedelta(seconds=1)  # after the last message, reads stay quick
_SLOWER: Final = 1.5  # each empty read waits so much longer than the one before


def step(state: State, event: Event, now: datetime, rng: random.Random) -> tuple[State, list[Command]]:
    """Takes an event in, and says what to do now."""
    commands: list[Command] = []
    if isinstance(event, Answered):
        _answered(state, event, commands, now=now, rng=rng)
    else:
        _ON[type(event)](state, event, commands, now)
    if state.joined and not state.left:
        _go_on(state, commands, now)
    return state, commands


# --- what each event means ---------------------------------------------------------------------------------------


def _owned(state: State, event: Owned, commands: list[Command], now: datetime) -> None:
    if not event.shards >= state.lanes.shards:
        # Some were given back; what is queued may belong to them.
        for destination in state.destinations.values():
            state.forget(destination.drop())
        state.lanes.forget()
    if not event.shards <= state.lanes.shards:
        state.empty_rounds = 0  # of these none has been read
    state.lanes.own(event.shards)
    state.joined, state.busy, state.has_surplus, state.more = True, False, event.has_surplus, event.more
    # What a settlement has stopped while this was asked may be missing in the answer.
    _stopped_now(state, event.stopped | state.stopped_lately)
    _hold(state, event.holds, commands, now)
    state.balance_at = now + state.rules.lease / 3
    state.wake_at = min(state.wake_at, now)


def _fetched(state: State, event: Fetched, commands: list[Command], now: datetime) -> None:
    state.reading, state.more = False, state.more or bool(event.due)
    state.lease_until = event.until or state.lease_until
    # A scan finds what is in hand, too; and every read finds rows with transaction ids from another cluster.
    rows = _not_in_hand(state, event.page.rows)
    if event.page.heavy:
        state.track_bytes([row for row in rows if state.lanes.reads(row.topic)], event.page.heavy)
    state.lanes.went_on(event.lane, event.page, state.rules.batch_size)
    _fade(state)
    _take_in(state, rows, commands, now)
    # What is due of a topic that was paused while this was read is still due afterwards; and of a key that was touched
    # meanwhile, an earlier row may be due.
    due = [row for row in event.due if state.lanes.reads(row.topic) and key_of(row) not in state.touched]
    _take_in_due(state, due, commands, now)
    if due:  # the next ones of their keys are due as soon as these are settled
        state.look_at, state.wake_at = now, min(state.wake_at, now)
    if event.lane == MAIN and state.lanes.main.round is None:
        _rest(state, now, found=bool(event.page.rows or due))


def _missed(state: State, event: RescanResult, commands: list[Command], now: datetime) -> None:
    state.busy = False
    state.lease_until = event.until or state.lease_until
    rows = _not_in_hand(state, event.rows)
    state.found_by_rescan += len(rows)
    _take_in(state, rows, commands, now)


def _claimed(state: State, event: LeaseConfirmed, _commands: list[Command], _now: datetime) -> None:
    state.busy = False
    state.lease_until = event.until


def _answered(state: State, event: Answered, commands: list[Command], *, now: datetime, rng: random.Random) -> None:
    destination = next((found for found in state.destinations.values() if event.number in found.flights), None)
    if destination is None:
        return  # of a time before the lease was lost
    if any(refusal.failure is Failure.FENCED for refusal in event.receipts.refusals):
        _fenced(state, Fenced(), commands, now)
        return
    if event.number > state.given_up and any(
        refusal.failure is Failure.INDETERMINATE for refusal in event.receipts.refusals
    ):
        _give_up(state, commands, now)  # the session may be broken, and what is unknown must not come later
    for flight in destination.acknowledged(event.number, event.receipts):
        _settle(state, judge(state, destination, flight, now=now, rng=rng), commands)
    if destination.failing and not destination.flights:
        destination.failing = False
        destination.broken.clear()


def _settled(state: State, event: Settled, _commands: list[Command], _now: datetime) -> None:
    rows = list(event.settlement.rows())
    state.settling -= 1
    state.release_bytes(rows)
    waited = list(filter(None, map(_WAITING_ID, rows)))
    state.waiting.difference_update(waited)
    fresh = [row for row in rows if row.waiting_id is None] if waited else rows
    state.settled_but_maybe_read.append((state.reads, list(map(_POSITION, fresh))))
    state.setting_aside.subtract(keys_aside(event.settlement))
    state.setting_aside = +state.setting_aside
    if event.stopped is not None:
        _learn_stopped(state, event.settlement, event.stopped)
    if not state.reading:
        state.reads += 1  # every read from now on begins after this settlement
        _fade(state)


def _fenced(state: State, _event: Fenced, commands: list[Command], _now: datetime) -> None:
    state.start_again()
    commands.append(GiveUp())
    if state.stop_at is not None:
        state.left = True
    commands.append(Leave() if state.left else Rejoin())


def _tick(_state: State, _event: Tick, _commands: list[Command], _now: datetime) -> None:
    """Only time has passed: `_go_on` looks at the clock."""


def _woken(state: State, _event: Woken, _commands: list[Command], now: datetime) -> None:
    state.wake_at, state.hinted, state.woken = min(state.wake_at, now), state.reading, True


def _stop(state: State, event: StopRelay, commands: list[Command], _now: datetime) -> None:
    state.stop_at = event.until
    for flight in state.flights():
        flight.deadline = min(flight.deadline, event.until)
    if not state.joined:
        state.left = True
        commands.append(Leave())


_ON: Final[dict[type, Callable[..., None]]] = {
    Owned: _owned,
    Fetched: _fetched,
    RescanResult: _missed,
    LeaseConfirmed: _claimed,
    Settled: _settled,
    Fenced: _fenced,
    Tick: _tick,
    StopRelay: _stop,
    Woken: _woken,
}


def _stopped_now(state: State, stopped: frozenset[Key]) -> None:
    # Rows on their way to the waiting room keep their key stopped, although the table does not say so yet.
    state.stopped = frozenset(stopped) | frozenset(state.setting_aside)


def _hold(state: State, holds: PauseSet, commands: list[Command], now: datetime) -> None:
    """What operators have paused is taken out of the queues; what they have resumed comes back with the next read."""
    if holds == state.holds:
        return
    state.holds = holds
    for topic in sorted(holds.destinations):
        if state.lanes.reads(topic):
            state.forget(state.destination(topic).drop())
            state.lanes.stop_reading(topic)
    if holds.single_out:
        for destination in state.destinations.values():
            queued = destination.drop()
            state.forget([row for row in queued if row.waiting_id is not None])  # what is not paused is still due
            _take_in(state, [row for row in queued if row.waiting_id is None], commands, now)


def _learn_stopped(state: State, settlement: Settle, stopped: frozenset[StoppedKey]) -> None:
    """Of other keys the answer may be older than what is known: it says something about the settlement's own only."""
    own = {*settlement.freed, *keys_aside(settlement)}
    state.stopped_lately = (state.stopped_lately - own) | (own & stopped)
    _stopped_now(state, (state.stopped - own) | (own & stopped))


def _fade(state: State) -> None:
    """Forgets settled rows that no read can find any more: those settled before the latest read began."""
    for read, positions in state.settled_but_maybe_read:
        if read < state.reads:
            state.positions.difference_update(positions)
    state.settled_but_maybe_read = [
        (read, positions) for read, positions in state.settled_but_maybe_read if read >= state.reads
    ]


def _rest(state: State, now: datetime, *, found: bool) -> None:
    """A round of the main lane has ended: read again at once while messages flow, later and later when not."""
    rules = state.rules
    state.empty_rounds = 0 if found else state.empty_rounds + 1
    if found:
        state.flowing_until, state.idle = now + _FLOWING_FOR, timedelta(0)
    elif now < state.flowing_until:
        state.idle = rules.quick
    else:
        state.idle = min(max(state.idle, rules.quick) * _SLOWER, rules.slow)
    state.wake_at = now if state.hinted else now + state.idle
    state.hinted = False


def _not_in_hand(state: State, rows: Sequence[Row]) -> Sequence[Row]:
    known = state.positions.intersection(map(_POSITION, rows))
    return [row for row in rows if row.position not in known] if known else rows


def _take_in(state: State, rows: Sequence[Row], commands: list[Command], now: datetime) -> None:
    """Queues fresh rows for their destinations, but for those of stopped keys and those that came too late."""
    aside: list[Row] = []
    expired: list[Row] = []
    for topic, group in by_topic(rows).items():
        if not state.lanes.reads(topic):
            continue  # it was paused while this page was read; its own lane will find them
        state.positions.update(map(_POSITION, group))
        wanted = group
        if state.stopped or state.holds.single_out:
            wanted, kept_back = _apart(state, group)
            aside += kept_back
        if any(map(_EXPIRES_AT, wanted)):
            expired += [row for row in wanted if row.expires_at is not None and row.expires_at <= now]
            wanted = [row for row in wanted if row.expires_at is None or row.expires_at > now]
        destination = state.destination(topic)
        destination.add(wanted)
        if destination.held > state.rules.budget or destination.heavy > state.rules.page_bytes:
            state.lanes.set_aside(topic)
    _settle(state, Settle(evidence=expiries(expired), aside=tuple(aside)), commands)


def _apart(state: State, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that may go out, and those that wait: of stopped keys, paused ones, and what follows these in a key."""
    stopped, free, kept_back = set(state.stopped), [], []
    for row in rows:
        if key_of(row) in stopped:
            kept_back.append(row)
        elif state.holds.hold(row):
            kept_back.append(row)
            stopped.add(key_of(row))
        else:
            free.append(row)
    return free, kept_back


def _take_in_due(state: State, rows: Sequence[Row], commands: list[Command], now: datetime) -> None:
    """Queues rows from the waiting room; of those that came too late only their followers are of interest."""
    state.waiting.update(row.waiting_id for row in rows if row.waiting_id is not None)
    late = [row for row in rows if row.expires_at is not None and row.expires_at <= now]
    for row in rows:
        if row not in late:
            state.destination(row.topic).add([row])
    _settle(state, Settle(evidence=expiries(late), freed=freed(late)), commands)


def _settle(state: State, settlement: Settle, commands: list[Command]) -> None:
    if settlement.evidence or settlement.needs_fence:
        state.settling += 1
        state.more = state.more or settlement.needs_fence
        if keys := keys_aside(settlement):
            state.setting_aside.update(keys)
            state.touched.update(keys)
            state.stopped |= set(keys)
        commands.append(settlement)


# --- what to do next ---------------------------------------------------------------------------------------------


def _go_on(state: State, commands: list[Command], now: datetime) -> None:
    if any(flight.deadline <= now for flight in state.flights()):
        _give_up(state, commands, now)
    if now >= _balance_at(state) and not state.reading and not state.busy:
        _balance(state, commands, release=False)
    elif state.stop_at is not None:
        # What the broker has not answered even after the give-up stays in the table: another relay sends it again.
        abandoned = now >= state.stop_at + _LAST_ANSWERS and not state.settling
        _leave_if(state, commands, quiet=state.is_quiet or abandoned)
    elif state.has_surplus:
        if state.is_quiet:
            _balance(state, commands, release=True)
    else:
        _hand_over(state, commands, now)
        _read(state, commands, now)


def _balance_at(state: State) -> datetime:
    """When it is to be renewed; one that wants to leave asks sooner whether something is left."""
    wants_to_leave = state.rules.once and state.more and state.empty_rounds
    return state.balance_at - state.rules.lease / 3 + _ASK_EVERY if wants_to_leave else state.balance_at


def _balance(state: State, commands: list[Command], *, release: bool) -> None:
    state.busy, state.stopped_lately = True, frozenset()
    commands.append(Rebalance(release=release))


def _leave_if(state: State, commands: list[Command], *, quiet: bool) -> None:
    if quiet:
        state.left = True
        commands.append(Leave())


def _give_up(state: State, commands: list[Command], now: datetime) -> None:
    """Once for all that is in flight: the answers that follow end every flight."""
    state.given_up = state.number
    for flight in state.flights():
        flight.deadline = now + state.rules.patience
    commands.append(GiveUp())


def _hand_over(state: State, commands: list[Command], now: datetime) -> None:
    rules, state.pace_at = state.rules, None
    for destination in state.destinations.values():
        limit, window = (rules.batch_size, rules.window) if destination.trouble is None else (_PROBE, 1)
        while (
            destination.queue
            and len(destination.flights) < window
            and state.settling < rules.window  # a crash repeats what is acknowledged and not settled: that is bounded
            and destination.takes_more(state.given_up)
        ):
            count = destination.allowance(limit, now)
            if not count:
                _wait_for_pace(state, destination)
                break
            if now >= state.lease_until:
                if not state.busy and not state.reading:
                    state.busy = True
                    commands.append(ConfirmLease())
                return
            state.number += 1
            rows = destination.take(count)
            destination.sent(InFlightBatch(state.number, rows, now + rules.patience, now))
            commands.append(Publish(state.number, Batch(destination.topic, rows)))


def _wait_for_pace(state: State, destination: Destination) -> None:
    """Without a bucket it is an answer that makes room."""
    if destination.bucket is not None:
        ready_at = destination.bucket.ready_at
        state.pace_at = ready_at if state.pace_at is None else min(state.pace_at, ready_at)


def _read(state: State, commands: list[Command], now: datetime) -> None:
    """Reads the next page of some lane, if there is room and it is time; else looks for what was missed."""
    if state.reading or state.busy:
        return
    _read_again(state, now)
    lane = _next_lane(state, now)
    # What operators have paused is not waited for.
    everywhere = state.lanes.topics.keys() <= state.holds.destinations
    if state.rules.once and state.empty_rounds and not state.held and everywhere and not state.more:
        _leave_if(state, commands, quiet=state.is_quiet)
    elif lane is not None:
        state.reading, state.latest_lane = True, lane
        state.reads += 1
        look_at = state.look_at + (_WAITING_ROOM_CAN_WAIT if state.woken else timedelta(0))
        look = now >= look_at and not state.waiting and state.lanes.main.has_scanned
        state.woken = False
        if look:
            state.look_at, state.touched = now + _WAITING_ROOM_EVERY, set(state.setting_aside)
        reading = replace(state.lanes.reading(lane, state.rules.batch_size), max_bytes=state.rules.page_bytes)
        commands.append(Fetch(lane, reading, state.lanes.not_scanned, look, state.holds))
    elif now >= state.watch_at and state.is_quiet and not state.held and state.lanes.main.is_through:
        _watch(state, commands, now)


def _read_again(state: State, now: datetime) -> None:
    """Topics whose trouble is over, and that nobody has paused, are read again."""
    for topic in [topic for topic, lane in state.lanes.topics.items() if lane is None]:
        destination = state.destination(topic)
        over = destination.trouble is None or destination.trouble.until <= now
        if over and not destination.failing and topic not in state.holds.destinations:
            state.lanes.come_back(topic)


def _next_lane(state: State, now: datetime) -> str | None:
    """Main lane and catch-up lanes take turns, so that none waits for another's backlog."""
    lanes, rules = state.lanes, state.rules
    if state.heavy_bytes >= rules.max_bytes:
        return None
    main = state.held < rules.room and (lanes.main.round is not None or now >= state.wake_at)
    catching_up = (
        topic
        for topic, lane in lanes.topics.items()
        if lane is not None and not lane.is_through and _has_room(state, state.destination(topic))
    )
    if not main or state.latest_lane == MAIN:
        return next(catching_up, MAIN if main else None)
    return MAIN


def _has_room(state: State, destination: Destination) -> bool:
    rules = state.rules
    return destination.held <= rules.budget // 2 and destination.heavy <= rules.page_bytes // 2


def _watch(state: State, commands: list[Command], now: datetime) -> None:
    if state.watch_at > LONG_AGO:
        memory = state.lanes.memory(state.rules.batch_size)
        state.busy = True
        commands.append(Rescan(Reading(shards=memory.shards, parts=memory.parts, limit=memory.limit, missed=True)))
    state.watch_at = now + _WATCH_EVERY
