"""Intake: what happens to rows that were read, and to settlements that are on their way. Pure.

A row that was read is queued, or goes to the waiting room (its key is stopped, or operators have paused it), or has
expired, or is dropped because it is in hand already.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit.rows import UNREADABLE, microseconds
from outboxkit_relay.core.destinations import Key, by_topic, key_of
from outboxkit_relay.core.flaws import NOT_ALLOWED
from outboxkit_relay.core.outcomes import expiries, freed, keys_stopped_by
from outboxkit_relay.core.protocol import Command, Settle

if TYPE_CHECKING:
    from outboxkit.rows import PauseSet, Row
    from outboxkit_relay.core.destinations import Destination
    from outboxkit_relay.core.protocol import Settled, StoppedKey
    from outboxkit_relay.core.state import State

__all__ = [
    "apply_pauses",
    "forget_settled",
    "not_in_hand",
    "note_settled",
    "queue_due",
    "queue_fresh",
    "settle",
    "stop_keys",
]

_POSITION: Final = attrgetter("position")
_EXPIRES_US: Final = attrgetter("expires_us")
_WAITING_ID: Final = attrgetter("waiting_id")


def not_in_hand(state: State, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows that are new to the relay."""
    known = state.positions.intersection(map(_POSITION, rows))
    return [row for row in rows if row.position not in known] if known else rows


def queue_fresh(state: State, rows: Sequence[Row], commands: list[Command], now: datetime) -> None:
    """Queues fresh rows for their destinations, except those of stopped keys and those that came too late."""
    to_waiting: list[Row] = []
    expired: list[Row] = []
    for topic, group in by_topic(rows).items():
        if not state.lanes.reads(topic):
            continue  # it was paused while this page was read; its own lane will find them
        state.positions.update(map(_POSITION, group))
        wanted = group
        if state.stopped or state.paused.single_out:
            wanted, kept_back = _split_paused(state, group)
            to_waiting += kept_back
        if [*map(_EXPIRES_US, wanted)].count(None) < len(wanted):
            expired += [row for row in wanted if _has_expired(row, now)]
            wanted = [row for row in wanted if not _has_expired(row, now)]
        destination = _queue(state, topic, wanted)
        if destination.queued > state.config.budget or destination.large > state.config.page_bytes:
            state.lanes.separate(topic)
    settle(state, Settle(evidence=expiries(expired), to_waiting=tuple(to_waiting)), commands)


def queue_due(state: State, rows: Sequence[Row], commands: list[Command], now: datetime) -> None:
    """Queues rows of the waiting room; those that came too late only free their key."""
    state.waiting.update(row.waiting_id for row in rows if row.waiting_id is not None)
    late: list[Row] = []
    for row in rows:
        if _has_expired(row, now):
            late.append(row)
        else:
            _queue(state, row.topic, [row])
    settle(state, Settle(evidence=expiries(late), freed=freed(late)), commands)


def _queue(state: State, topic: str, rows: Sequence[Row]) -> Destination:
    """Adds rows to the queue of their destination; all are flawed if it is not an allowed one."""
    destination = state.destination(topic)
    destination.add(rows)
    if not destination.is_allowed:
        state.flaws.update(dict.fromkeys(map(_POSITION, rows), NOT_ALLOWED))
    return destination


def apply_pauses(state: State, paused: PauseSet, commands: list[Command], now: datetime) -> None:
    """Takes out of the queues what operators have paused; what they have resumed comes back with the next read."""
    if paused == state.paused:
        return
    state.paused = paused
    for topic in sorted(paused.destinations):
        if state.lanes.reads(topic):
            state.forget(state.destination(topic).drop())
            state.lanes.stop_reading(topic)
    if paused.single_out:
        for destination in state.destinations.values():
            queued = destination.drop()
            state.forget([row for row in queued if row.waiting_id is not None])  # what is not paused is still due
            queue_fresh(state, [row for row in queued if row.waiting_id is None], commands, now)


def settle(state: State, settlement: Settle, commands: list[Command]) -> None:
    """Asks for a settlement, unless it is empty; its keys count as stopped from now on."""
    if not (settlement.evidence or settlement.needs_fence):
        return
    state.settling += 1
    state.work_elsewhere = state.work_elsewhere or settlement.needs_fence
    if keys := keys_stopped_by(settlement):
        state.moving_to_waiting.update(keys)
        state.touched.update(keys)
        state.stopped |= set(keys)
    commands.append(settlement)


def note_settled(state: State, event: Settled, commands: list[Command], now: datetime) -> None:
    """Lets the rows of a committed settlement go, and learns which keys are stopped now."""
    left = set(map(_POSITION, event.left))
    rows = [row for row in event.settlement.rows() if row.position not in left]
    state.settling -= 1
    state.release(rows)
    waited = list(filter(None, map(_WAITING_ID, rows)))
    state.waiting.difference_update(waited)
    fresh = [row for row in rows if row.waiting_id is None] if waited else rows
    state.settled_but_maybe_read.append((state.reads, list(map(_POSITION, fresh))))
    state.moving_to_waiting.subtract(keys_stopped_by(event.settlement))
    state.moving_to_waiting = +state.moving_to_waiting
    if event.stopped is not None:
        _learn_stopped(state, event.settlement, event.stopped)
    if event.left:
        state.forget(event.left)
        queue_fresh(state, event.left, commands, now)
    if not state.reading:
        state.reads += 1  # every read from now on begins after this settlement
        forget_settled(state)


def forget_settled(state: State) -> None:
    """Forgets settled rows that no read can find any more: those settled before the latest read began."""
    for read, positions in state.settled_but_maybe_read:
        if read < state.reads:
            state.positions.difference_update(positions)
    state.settled_but_maybe_read = [
        (read, positions) for read, positions in state.settled_but_maybe_read if read >= state.reads
    ]


def stop_keys(state: State, stopped: frozenset[Key]) -> None:
    """Notes the stopped keys. Rows on their way to the waiting room stop theirs before the table says so."""
    state.stopped = frozenset(stopped) | frozenset(state.moving_to_waiting)


def _has_expired(row: Row, now: datetime) -> bool:
    return row.expires_us is not None and UNREADABLE < row.expires_us <= microseconds(now)


def _split_paused(state: State, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows that may go out, and those that wait: of stopped keys, paused ones, and what follows these in a key."""
    stopped, free, kept_back = set(state.stopped), [], []
    for row in rows:
        if key_of(row) in stopped:
            kept_back.append(row)
        elif state.paused.covers(row):
            kept_back.append(row)
            stopped.add(key_of(row))
        else:
            free.append(row)
    return free, kept_back


def _learn_stopped(state: State, settlement: Settle, stopped: frozenset[StoppedKey]) -> None:
    """Believes the answer about the settlement's own keys; about others it may be older than what is known."""
    own = {*settlement.freed, *keys_stopped_by(settlement)}
    state.stopped_lately = (state.stopped_lately - own) | (own & stopped)
    stop_keys(state, (state.stopped - own) | (own & stopped))
