"""The core holds back what operators have paused: at once, in order, and without an attempt."""

from __future__ import annotations

from datetime import timedelta

import pytest

from outboxkit.policy import Failure, Order
from outboxkit.rows import PauseSet, Row
from outboxkit_relay.core.lanes import Lane
from outboxkit_relay.core.protocol import Fetch, Leave, Owned, Settle, Settled, Tick
from tests.unit.relay.core.builders import ALL, Core, K, only, row, sent

TYPE = PauseSet(types=frozenset({"u"}))
KEY = PauseSet(keys=frozenset({K}))
DESTINATION = PauseSet(destinations=frozenset({"orders"}))


def of_type_u(position: int, key: bytes | None = b"k", waiting_id: int | None = None) -> Row:
    return row(position, key, waiting_id)._replace(type="u")


def told(core: Core, paused: PauseSet) -> Core:
    core.on(Owned(ALL, has_surplus=False, stopped=core.state.stopped, paused=paused))  # type: ignore[arg-type]
    return core


def aside(commands: list[object]) -> list[int]:
    return [found.position for command in commands if isinstance(command, Settle) for found in command.to_waiting]


def test_behind_a_message_of_a_paused_type_its_key_waits_and_other_keys_do_not() -> None:
    core = told(Core(Order.PIPELINED), TYPE)

    commands = core.fetched(row(1), of_type_u(2), row(3), row(4, b"other"))

    assert sent(commands) == [[1, 4]]
    assert aside(list(commands)) == [2, 3]


def test_a_message_without_a_key_waits_alone() -> None:
    core = told(Core(Order.PIPELINED), TYPE)

    commands = core.fetched(row(1, None), of_type_u(2, None), row(3, None))

    assert (sent(commands), aside(list(commands))) == ([[1, 3]], [2])


@pytest.mark.parametrize("order", Order)
def test_what_is_queued_is_held_back_as_soon_as_the_relay_knows(order: Order) -> None:
    core = Core(order)
    core.state.lease_until = core.now  # nothing goes out before the next claim
    core.fetched(row(1), row(2, b"other"))
    assert core.state.queued == 0  # the page was claimed: both are at the broker
    core.fetched(of_type_u(3), row(4))
    core.state.lease_until = core.now

    commands = core.on(Owned(ALL, has_surplus=False, stopped=frozenset(), paused=KEY))

    assert aside(list(commands)) == ([3, 4] if order is Order.STRICT else [])
    assert not sent(commands)


def test_a_paused_destination_is_not_read_and_comes_back_with_a_scan() -> None:
    core = told(Core(), DESTINATION)

    commands = core.fetched(row(1))

    assert not sent(commands)
    (part,) = only(Fetch, commands).reading.parts
    assert (part.topics, part.only) == (frozenset({"orders"}), False)

    core.fetched()
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset()))
    assert core.state.lanes.topics == {"orders": Lane()}


def test_a_row_in_flight_that_fails_waits_in_front_of_what_was_paused_behind_it() -> None:
    core = Core(Order.STRICT)
    core.fetched(row(1), row(2))
    commands = told(core, TYPE).fetched(of_type_u(3))
    core.on(Settled(only(Settle, commands), frozenset({K})))

    settle = only(Settle, core.answered(1, 1, (0, Failure.REJECTED)))

    assert [found.position for found in settle.to_waiting] == [1, 2]
    assert core.state.queued == 0, "what stood behind it does not wait in memory for ever"


def test_strict_a_dropped_queue_still_waits_behind_what_is_in_flight() -> None:
    core = Core(Order.STRICT)
    core.fetched(row(1), row(2))

    commands = core.on(Owned(ALL, has_surplus=False, stopped=frozenset(), paused=TYPE))

    assert not sent(commands)
    assert core.state.queued == 1
    answer = core.answered(1, 1)
    assert sent(answer) == [[2]]


def test_the_waiting_room_is_not_looked_at_before_everything_older_has_been_read() -> None:
    """Else a message that was paused could overtake an older one of its key that nobody has read yet."""
    core = Core()
    first = core.state.lanes
    assert not first.main.has_scanned
    core.fetched(row(1), row(2))
    assert not any(command.look for command in core.on(Tick()) if isinstance(command, Fetch))


def test_once_does_not_wait_for_what_is_paused() -> None:
    core = Core()
    object.__setattr__(core.state.config, "once", True)
    told(core, DESTINATION)
    core.fetched(row(1))
    core.now += timedelta(seconds=1)
    core.on(Tick())

    assert any(isinstance(command, Leave) for command in core.fetched())
