"""Whatever the deliveries, failures and copies: one effect per message, in order of its key, or one letter."""

from __future__ import annotations

import asyncio
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import tables
from outboxkit.consumer import Consumer, run
from outboxkit.consumer.handlers import MessageContext
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order

RETRIES = 2


@dataclass(frozen=True)
class Sent:
    """One message: how often it is delivered, and how many tries of each delivery fail."""

    key: str | None
    copies: int
    failures: int


sent = st.builds(
    Sent,
    key=st.sampled_from(["a", "b", None]),
    copies=st.integers(1, 3),
    failures=st.sampled_from([0, 0, 0, 1, RETRIES, RETRIES + 1]),
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    messages=st.lists(sent, min_size=1, max_size=12), immediate=st.integers(0, 1), batch=st.sampled_from([1, 3, 500])
)
def test_every_message_has_one_effect_or_one_letter(messages: list[Sent], immediate: int, batch: int) -> None:
    settings_of_run = mock.patch.object(run, "IDLE", timedelta(milliseconds=1))
    with tempfile.TemporaryDirectory() as folder, settings_of_run:
        asyncio.run(_check(Path(folder), messages, immediate, batch))


async def _check(folder: Path, messages: list[Sent], immediate: int, batch: int) -> None:
    world = ConsumerFixture(f"sqlite:///{folder}/test.db")
    retry = impatient(immediate, RETRIES - immediate)
    billing = Consumer("billing", sessions=world.asynchronous, retry=retry, prefetch=batch)

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=ctx.id, number=placed.number))
        await session.flush()
        if ctx.attempt <= messages[placed.number].failures:
            raise KeyError

    for number, message in enumerate(messages):
        world.send(*[order(number, key=message.key, message_id=f"m{number}")] * message.copies)
    await world.run(billing)

    dead = {int(letter.message_id[1:]) for letter in world.rows(tables.dead_letters)}
    effects = world.effects()
    by_key: dict[str | None, list[int]] = defaultdict(list)
    for number in effects:
        by_key[messages[number].key].append(number)
    await world.close()
    assert dead == {number for number, message in enumerate(messages) if message.failures > RETRIES}
    assert sorted(effects) == sorted(set(range(len(messages))) - dead)
    assert all(numbers == sorted(numbers) for key, numbers in by_key.items() if key is not None)
