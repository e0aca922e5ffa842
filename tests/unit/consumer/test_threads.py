"""Threads for handlers that block: results, errors and cancellations reach whoever waits, and nobody else."""

from __future__ import annotations

import asyncio
import threading
from functools import partial

import pytest

from outboxkit.consumer.transactions import Threads


async def test_results_and_errors_reach_those_who_wait() -> None:
    threads = Threads(4, "t")

    def fail() -> None:
        raise SystemExit("even this")

    found = await asyncio.gather(*(threads.run(partial(abs, -n)) for n in range(100)))
    with pytest.raises(SystemExit):
        await threads.run(fail)

    assert found == list(range(100))
    assert await threads.run(lambda: "and it goes on") == "and it goes on"
    threads.close()


@pytest.mark.parametrize("error", [StopIteration, asyncio.CancelledError])
async def test_what_no_future_can_carry_reaches_who_waits_as_an_error_and_nobody_else(
    error: type[BaseException],
) -> None:
    threads, both = Threads(2, "t"), threading.Barrier(2)

    def fail() -> None:
        both.wait()
        raise error

    failed, good = threads.run(fail), threads.run(both.wait)
    with pytest.raises(RuntimeError, match=error.__name__) as raised:
        await failed
    assert isinstance(raised.value.__cause__, error)
    assert await good in (0, 1)
    threads.close()


async def test_as_many_run_side_by_side_as_are_allowed_and_no_more_are_started_than_are_needed() -> None:
    threads, together = Threads(3, "side-by-side"), threading.Barrier(3)

    await asyncio.gather(*(threads.run(together.wait) for _ in range(3)))
    for _ in range(10):
        await threads.run(lambda: None)

    assert len([one for one in threading.enumerate() if one.name.startswith("side-by-side")]) == 3
    threads.close()


async def test_one_after_the_other_needs_one_thread() -> None:
    threads = Threads(16, "alone")

    for _ in range(50):
        await threads.run(lambda: None)

    assert [one.name for one in threading.enumerate() if one.name.startswith("alone")] == ["alone-1"]
    threads.close()


async def test_cancelling_interrupts_no_function_and_loses_no_result_of_others() -> None:
    threads, go_on, ended = Threads(2, "t"), threading.Event(), threading.Event()

    def slow() -> None:
        go_on.wait()
        ended.set()

    cancelled = threads.run(slow)
    cancelled.cancel()
    go_on.set()

    assert await threads.run(lambda: 1) == 1
    await asyncio.to_thread(ended.wait)
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    threads.close()


def test_a_function_that_outlives_its_loop_harms_nobody() -> None:
    go_on, threads = threading.Event(), Threads(1, "outlives")

    async def leave() -> None:
        threads.run(go_on.wait)

    asyncio.run(leave())
    (thread,) = (one for one in threading.enumerate() if one.name == "outlives-1")
    threads.close()
    go_on.set()
    thread.join(30)

    assert not thread.is_alive()
