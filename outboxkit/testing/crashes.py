"""Crashes of a consumer at every named place, in one process: each message must have its effect once all the same.

A crash is an exception that nothing handles: what is not committed is rolled back, nothing is acknowledged, and the
broker delivers the message again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy import func, select

from outboxkit import _failpoints, tables

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from outboxkit.consumer import Consumer
    from outboxkit.message import Message
    from outboxkit.testing.delivery import ConsumerHarness

__all__ = ["CRASH_POINTS", "assert_one_effect"]

CRASH_POINTS: Final = (
    "recv",
    "attempt.recorded",
    "inbox.inserted",
    "handler.before",
    "handler.after",
    "commit.before",
    "commit.after",
    "ack.before",
    "ack.after",
)


async def assert_one_effect(
    harness: ConsumerHarness, engine: Engine, messages: list[Message], *, consumer: Consumer, effects: Callable[[], int]
) -> None:
    """Delivers the first message once, the second twice, and each other one again after a crash at one place.

    Args:
        harness: delivers.
        engine: of the test's database.
        messages: equal ones with ids of their own, two more than there are `CRASH_POINTS`.
        consumer: whose handler it is.
        effects: counts the effects so far.

    Raises:
        AssertionError: the effects of a message that came again differ from those of one that came once.
    """
    once, twice, *others = messages
    expected = await _added(engine, effects, partial(harness.deliver, once, consumer=consumer))
    again = {"a second delivery": partial(harness.deliver, twice, consumer=consumer, times=2)}
    for place, message in zip(CRASH_POINTS, others, strict=True):
        again[f"a crash at {place}"] = partial(_deliver_after_crash, harness, message, consumer, place)
    found = {how: await _added(engine, effects, deliver) for how, deliver in again.items()}
    wrong = [f"after {how} {_told(counts)}" for how, counts in found.items() if counts != expected]
    if wrong:
        listed = "\n  ".join(wrong)
        raise AssertionError(f"{consumer.name}: one delivery makes {_told(expected)}\n  {listed}")


async def _deliver_after_crash(harness: ConsumerHarness, message: Message, consumer: Consumer, place: str) -> None:
    crashed = False
    _failpoints.enable(f"{place}=crash")
    try:
        await harness.deliver(message, consumer=consumer)
    except* _failpoints.Crash:
        crashed = True
    finally:
        _failpoints.disable()
    if not crashed:
        raise AssertionError(f"{consumer.name} never came to {place}: the message does not reach the handler")
    await harness.deliver(message, consumer=consumer)


async def _added(engine: Engine, effects: Callable[[], int], deliver: Callable[[], Awaitable[None]]) -> tuple[int, int]:
    """Counts the effects and the messages in the outbox that a delivery has added."""
    before, emitted = effects(), _emitted(engine)
    await deliver()
    return effects() - before, _emitted(engine) - emitted


def _emitted(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(tables.outbox_messages)).scalar_one()


def _told(counts: tuple[int, int]) -> str:
    return f"{counts[0]} effect(s) and {counts[1]} message(s)"
