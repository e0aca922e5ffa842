"""What a destination may take: a rate, messages in flight, and a circuit that opens when it refuses too much."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.guards.circuit_breaker import Breaker, CircuitRule, CircuitState
from outboxkit.guards.token_bucket import TokenBucket
from outboxkit.policy import Failure, Order
from outboxkit.rows import Page
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.core.lanes import MAIN
from outboxkit_relay.core.protocol import Command, Fetch, Fetched, Owned, Publish, Settle, Settled, Tick
from outboxkit_relay.core.state import RelayConfig, State
from outboxkit_relay.core.step import step
from tests.unit.relay.core.builders import ALL, NOW, Core, only, row, sent

SECOND = timedelta(seconds=1)
RULE = CircuitRule(failure_rate=0.5, window=timedelta(seconds=10), open_for=timedelta(seconds=5), min_messages=4)


def limited(**limits: object) -> Core:
    core = Core(Order.PIPELINED)
    config = RelayConfig(batch_size=2, window=8, order=Order.PIPELINED, limits=DestinationLimits(**limits))  # type: ignore[arg-type]
    core.state = State(config=config)
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset()))
    return core


# --- rate --------------------------------------------------------------------------------------------------------


@given(rate=st.floats(0.5, 5_000), seed=st.integers(0, 1_000))
def test_a_bucket_lets_through_its_rate_and_one_burst_and_never_more(rate: float, seed: int) -> None:
    rng, now, gone = random.Random(seed), datetime(2026, 1, 1, tzinfo=UTC), 0
    bucket, began = TokenBucket(rate), now
    for _ in range(200):
        count = bucket.allow(rng.randint(1, 1_000), now)
        bucket.take(count)
        gone += count
        assert gone <= bucket.burst + rate * (now - began).total_seconds() + 1e-6
        now = max(now, bucket.ready_at) if not count else now + timedelta(milliseconds=rng.randint(0, 50))


def test_asking_again_when_it_says_gives_something() -> None:
    bucket, now = TokenBucket(200.0), NOW
    assert bucket.allow(1_000, now) == 20
    bucket.take(20)
    assert bucket.allow(1_000, now) == 0
    assert bucket.ready_at - now == pytest.approx(timedelta(seconds=0.1), abs=timedelta(microseconds=2))
    assert bucket.allow(1_000, bucket.ready_at) == 20


def test_a_destination_with_a_rate_goes_on_when_its_bucket_is_full_again() -> None:
    core = limited(rate=20.0)
    assert sent(core.fetched(row(1), row(2), row(3), row(4), row(5))) == [[1, 2]]
    assert core.state.pace_at is not None
    assert timedelta(0) < core.state.pace_at - core.now <= timedelta(milliseconds=101)

    core.now = core.state.pace_at

    assert sent(core.on(Tick())) == [[3, 4]]


# --- in flight ---------------------------------------------------------------------------------------------------


def test_a_destination_has_no_more_in_flight_than_it_may() -> None:
    core = limited(in_flight=3)

    assert sent(core.fetched(*map(row, range(1, 7)))) == [[1, 2], [3]]
    assert core.state.pace_at is None, "an answer makes room, not time"
    assert sent(core.answered(1, 2)) == [[4, 5]]


# --- circuit -----------------------------------------------------------------------------------------------------


def test_a_circuit_opens_when_half_of_a_window_is_refused() -> None:
    breaker = Breaker(RULE)
    assert not breaker.refused(2, 1, NOW), "three messages say nothing"
    breaker.passed(2, NOW)
    assert not breaker.refused(0, 0, NOW)
    assert breaker.refused(1, 0, NOW)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    breaker = Breaker(RULE)
    breaker.refused(3, 0, NOW)

    assert not breaker.refused(1, 0, NOW + 11 * SECOND)
    breaker.passed(9, NOW + 12 * SECOND)
    assert breaker.refused(8, 0, NOW + 13 * SECOND)


def test_a_probe_that_gets_through_closes_it_and_the_window_begins_anew() -> None:
    breaker = Breaker(RULE)
    assert breaker.refused(9, 0, NOW)
    assert breaker.refused(1, 0, NOW + 5 * SECOND), "a failed probe leaves it open"

    breaker.passed(1, NOW + 6 * SECOND)

    assert not breaker.open
    assert not breaker.refused(1, 0, NOW + 6 * SECOND)


def test_a_destination_with_an_open_circuit_is_left_alone_and_then_probed() -> None:
    core = limited(circuit=RULE)
    core.fetched(*map(row, range(1, 5)))
    refused = [(0, Failure.REFUSING), (1, Failure.REFUSING)]
    core.answered(1, 2, *refused)
    core.answered(2, 2, *refused)
    orders = core.state.destinations["orders"]
    assert orders.circuit(core.now) is CircuitState.OPEN
    assert orders.trouble is not None
    assert orders.trouble.until == core.now + RULE.open_for
    assert orders.trouble.since == NOW

    core.now += RULE.open_for
    assert orders.circuit(core.now) is CircuitState.HALF_OPEN
    core.on(Owned(ALL, has_surplus=False, stopped=frozenset()))  # 5 s are more than a third of the lease
    (fetch,) = [command for command in core.fetched() if isinstance(command, Fetch)]
    assert fetch.lane == "orders"
    page = Page([row(number) for number in range(1, 30)], "5:5:")
    commands = core.on(Fetched("orders", page, (), core.now + SECOND))
    (probe,) = [command for command in commands if isinstance(command, Publish)]
    assert len(probe.batch.rows) <= 10
    core.answered(probe.number, len(probe.batch.rows))

    assert orders.circuit(core.now) is CircuitState.CLOSED


def test_the_same_trouble_without_a_circuit_is_a_short_pause() -> None:
    core = limited()
    core.fetched(*map(row, range(1, 5)))
    core.answered(1, 2, (0, Failure.REFUSING), (1, Failure.REFUSING))

    trouble = core.state.destinations["orders"].trouble

    assert trouble is not None
    assert trouble.until - core.now <= timedelta(milliseconds=100)
    assert step(core.state, Tick(), core.now, random.Random(1))


# --- bytes -------------------------------------------------------------------------------------------------------


def large(core: Core, sizes: dict[int, int], lane: str = MAIN) -> list[Command]:
    """A page with a row of its own key for each size; those of the size 0 are light."""
    rows = [row(number, b"%d" % number) for number in sizes]
    page = Page(rows, "5:5:", {number: size for number, size in sizes.items() if size})
    return core.on(Fetched(lane, page, (), core.now + SECOND))


def reads(commands: list[Command]) -> list[str]:
    return [command.lane for command in commands if isinstance(command, Fetch)]


def test_nothing_more_is_read_while_the_bytes_in_hand_are_at_their_bound() -> None:
    core = limited()
    core.state.config = replace(core.state.config, max_bytes=100, batch_size=4)

    commands = large(core, {1: 60, 2: 60, 3: 0})

    assert core.state.large_bytes == 120
    assert not reads(commands)
    settle = only(Settle, core.answered(1, 3))
    assert reads(core.on(Settled(settle, None)))
    assert core.state.large_bytes == core.state.destinations["orders"].large == 0


def test_a_destination_with_many_bytes_goes_on_in_a_lane_of_its_own() -> None:
    core = limited(in_flight=1)
    core.state.config = replace(core.state.config, max_bytes=100, batch_size=4)

    commands = large(core, {1: 20, 2: 20})

    assert "orders" in core.state.lanes.topics
    assert reads(commands) == [MAIN], "the others flow"
    assert core.state.lanes.topics["orders"] is not None
    (reading,) = [command.reading for command in commands if isinstance(command, Fetch)]
    assert reading.max_bytes == 25


def test_what_is_dropped_counts_no_longer() -> None:
    core = limited()
    core.state.config = replace(core.state.config, max_bytes=1_000)
    large(core, {1: 60, 2: 60})

    core.answered(1, 2, (0, Failure.BROKER_DOWN), (1, Failure.BROKER_DOWN))

    assert core.state.large_bytes == core.state.destinations["orders"].large == 0
