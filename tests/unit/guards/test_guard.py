"""A guard around functions and blocks: what is called, how often, and what the caller gets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from outboxkit import context
from outboxkit.errors import ConfigurationError, GuardRefused
from outboxkit.guards import CircuitRule, Guard, grpc_timeout, guard, http_headers, remaining, report
from outboxkit.guards.guard import _guards
from outboxkit.policy import Backoff

AT_ONCE = Backoff(base=timedelta(microseconds=1), cap=timedelta(microseconds=1), attempts=2)


@pytest.fixture(autouse=True)
def _no_guard_is_left() -> Iterator[None]:
    yield
    _guards.clear()


class Away(Exception):
    pass


class Service:
    """Fails so often, then answers."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def ask(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise Away
        return "answer"

    async def ask_later(self) -> str:
        return self.ask()


@pytest.mark.parametrize(("failures", "calls"), [(0, 1), (2, 3)])
async def test_a_call_is_tried_again_until_it_succeeds(failures: int, calls: int) -> None:
    plain, later = Service(failures), Service(failures)

    assert guard("plain", retry=AT_ONCE)(plain.ask)() == "answer"
    assert await guard("later", retry=AT_ONCE)(later.ask_later)() == "answer"

    assert (plain.calls, later.calls) == (calls, calls)


async def test_the_last_error_is_the_callers_unless_there_is_a_fallback() -> None:
    with pytest.raises(Away):
        guard("plain", retry=AT_ONCE)(Service(9).ask)()
    with pytest.raises(Away):
        await guard("later", retry=AT_ONCE)(Service(9).ask_later)()

    assert guard("plain with", fallback=lambda error: type(error).__name__)(Service(9).ask)() == "Away"
    assert await guard("later with", fallback=lambda _: "cached")(Service(9).ask_later)() == "cached"


async def test_an_open_circuit_calls_nothing() -> None:
    service = Service(99)
    rule = CircuitRule(failure_rate=0.5, min_messages=2)
    asked = guard("payments", breaker=rule)(service.ask_later)
    for _ in range(2):
        with pytest.raises(Away):
            await asked()

    with pytest.raises(GuardRefused, match="payments: not called, because of its circuit") as refused:
        await asked()

    assert service.calls == 2
    assert refused.value.retry_after > timedelta(seconds=4)
    (state,) = report()
    assert (state.circuit, state.failed, state.refused, state.running) == ("open", 2, 1, 0)


async def test_a_slow_call_is_interrupted_and_counts_as_a_failure() -> None:
    never = asyncio.Event()
    asked = guard("slow", timeout="1ms")(never.wait)

    with pytest.raises(TimeoutError):
        await asked()

    assert report()[0].failed == 1


def test_errors_of_others_pass_and_do_not_count() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise KeyError

    asked = guard("picky", retry=AT_ONCE, on=Away, fallback=lambda _: "cached")(ask)

    with pytest.raises(KeyError):
        asked()
    assert (len(calls), report()[0].failed, report()[0].succeeded) == (1, 0, 1)


def test_a_deadline_bounds_a_call_and_what_it_hands_on() -> None:
    slow = guard("slow", timeout="1h")
    until = datetime.now(UTC) + timedelta(minutes=1)

    with context.bounded(until), slow.limits() as allowed:
        assert allowed is not None
        assert allowed <= timedelta(minutes=1)
        assert remaining() is not None
        assert (grpc_timeout() or 0) <= 60
        assert http_headers()["x-request-deadline"].startswith(until.strftime("%Y-%m-%dT%H:%M"))
    assert remaining() is None


def test_nothing_is_called_after_the_deadline() -> None:
    service = Service(0)

    with context.bounded(datetime.now(UTC)), pytest.raises(GuardRefused, match="deadline"):
        guard("late")(service.ask)()

    assert service.calls == 0


def test_a_conversation_goes_along() -> None:
    with context.correlation("checkout-42"):
        assert http_headers() == {"x-correlation-id": "checkout-42"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"bulkhead": 0},
        {"bulkhead": 1.5},
        {"bulkhead": "5"},
        {"bulkhead": True},
        {"rate": 0},
        {"rate": -1.0},
        {"rate": "10"},
        {"rate": True},
        {"rate": math.inf},
        {"rate": math.nan},
        {"timeout": "soon"},
        {"timeout": 5},
        {"breaker": 0.5},
        {"breaker": CircuitRule},
        {"retry": 3},
        {"fallback": "cached"},
        {"on": "Away"},
        {"on": (Away, "Away")},
        {"on": BaseException},
    ],
    ids=repr,
)
def test_limits_that_make_no_sense_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        guard("wrong", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="name"):
        guard(7)  # type: ignore[arg-type]

    assert report() == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_rate": 0},
        {"failure_rate": 1.1},
        {"failure_rate": "0.5"},
        {"failure_rate": True},
        {"failure_rate": math.nan},
        {"window": 30},
        {"window": "soon"},
        {"open_for": timedelta(0)},
        {"min_messages": 0},
        {"min_messages": 1.5},
    ],
    ids=repr,
)
def test_a_circuits_rule_is_checked_where_it_is_made(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        CircuitRule(**wrong)  # type: ignore[arg-type]


def test_a_second_guard_of_one_name_is_refused() -> None:
    assert isinstance(guard("payments"), Guard)

    with pytest.raises(ConfigurationError, match="share the guard object"):
        guard("payments")
