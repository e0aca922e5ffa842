"""Reconnecting waits longer and longer, never longer than the cap, and the draw is kept."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.brokers._backoff import Reconnects

CAP = 5.0


@given(st.integers(), st.integers(1, 100), st.floats(0.001, 0.3))
def test_who_asks_in_short_intervals_waits_no_longer_than_the_cap(seed: int, failures: int, interval: float) -> None:
    reconnects = Reconnects(random.Random(seed))
    for _ in range(failures):
        reconnects.failed(now := 1_000.0)

    waited = 0.0
    while reconnects.left(now + waited) > 0:
        waited += interval

    assert waited <= CAP + interval


def test_failures_in_a_row_make_it_wait_longer() -> None:
    def mean(failures: int) -> float:
        total = 0.0
        for seed in range(200):
            reconnects = Reconnects(random.Random(seed))
            for _ in range(failures):
                reconnects.failed(0.0)
            total += reconnects.left(0.0)
        return total / 200

    assert mean(1) < mean(3) < mean(5) < mean(50) < CAP


def test_what_was_settled_makes_it_quick_again() -> None:
    reconnects = Reconnects(random.Random(1))
    for _ in range(20):
        reconnects.failed(0.0)

    reconnects.succeeded()
    reconnects.failed(0.0)

    assert reconnects.left(0.0) <= 0.2
    assert reconnects.failures == 1


@pytest.mark.parametrize("now", [0.0, 7.5])
def test_the_first_attempt_waits_for_nothing(now: float) -> None:
    assert Reconnects(random.Random(1)).left(now) == 0
