"""The decisions of a guard, on a clock of the test's own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from outboxkit.guards.circuit_breaker import CircuitRule, CircuitState
from outboxkit.guards.policy import GuardLimits, Refusal, Refused, State

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
RULE = CircuitRule(failure_rate=0.5, window=30 * SECOND, open_for=5 * SECOND, min_messages=2)


def refusal(state: State, now: datetime, deadline: datetime | None = None) -> Refusal | None:
    found = state.begin(now, deadline)
    return found.why if isinstance(found, Refused) else None


def test_a_circuit_opens_lets_one_probe_through_and_closes() -> None:
    state = State(GuardLimits(circuit=RULE))
    for _ in range(2):
        assert refusal(state, NOW) is None
        state.end(NOW, failed=True)

    assert state.begin(NOW + SECOND, None) == Refused(Refusal.CIRCUIT, 4 * SECOND)
    later = NOW + 5 * SECOND
    assert state.circuit(later) is CircuitState.HALF_OPEN
    assert refusal(state, later) is None
    assert refusal(state, later) is Refusal.CIRCUIT  # one probe at a time
    state.end(later, failed=False)

    assert state.circuit(later) is CircuitState.CLOSED
    assert refusal(state, later) is None


def test_a_probe_that_fails_opens_the_circuit_again() -> None:
    state = State(GuardLimits(circuit=RULE))
    for _ in range(2):
        state.begin(NOW, None)
        state.end(NOW, failed=True)
    later = NOW + 6 * SECOND
    state.begin(later, None)
    state.end(later, failed=True)

    assert state.begin(later, None) == Refused(Refusal.CIRCUIT, 5 * SECOND)


def test_a_bulkhead_lets_so_many_calls_run_at_a_time() -> None:
    state = State(GuardLimits(bulkhead=2))

    assert [refusal(state, NOW) for _ in range(3)] == [None, None, Refusal.BULKHEAD]
    state.end(NOW, failed=False)
    assert refusal(state, NOW) is None


def test_a_rate_says_when_to_try_again() -> None:
    state = State(GuardLimits(rate=10))

    assert refusal(state, NOW) is None
    found = state.begin(NOW, None)
    assert isinstance(found, Refused)
    assert (found.why, timedelta(0) < found.retry_after <= SECOND / 5) == (Refusal.RATE, True)
    assert refusal(state, NOW + found.retry_after) is None


def test_the_time_of_a_call_is_its_own_or_what_remains() -> None:
    state = State(GuardLimits(timeout=3 * SECOND))

    assert state.begin(NOW, None) == 3 * SECOND
    assert state.begin(NOW, NOW + SECOND) == SECOND
    assert refusal(state, NOW, NOW) is Refusal.DEADLINE


def test_a_refused_call_takes_no_place() -> None:
    state = State(GuardLimits(bulkhead=1, rate=1000))
    state.begin(NOW, None)

    assert refusal(state, NOW) is Refusal.BULKHEAD
    assert state.running == 1
