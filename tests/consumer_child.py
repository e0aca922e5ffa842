"""A consumer in a process of its own, that may die. It brings its own messages, always the same ones."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import _failpoints
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, Effect, OrderPlaced, impatient, order
from tests.deadlines import DEADLINE

__all__ = ["COUNT", "KILLED", "run_child"]

COUNT = 6
KILLED = 139

# One warm process, from which each child is forked: Python and its imports start once.
_warm = multiprocessing.get_context("forkserver")
_warm.set_forkserver_preload(["tests.consumer_child"])


def run_child(url: str, *, killer: int = -1, by: str = "exit", poison: int = -1, armed: str = "") -> int:
    """Handles all messages, unless the process dies at a failpoint or at order `killer`; returns its exit status."""
    child = _warm.Process(target=_main, args=(url, (killer, by), poison, armed))
    child.start()
    child.join(DEADLINE)
    if child.exitcode is None:
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode is not None
    return child.exitcode


def _messages(poison: int) -> list[Message]:
    broken: dict[str, Any] = {"payload": b"\xff"}
    return [
        order(number, key=f"k{number % 3}", message_id=f"m{number}", **broken if number == poison else {})
        for number in range(COUNT)
    ]


def _spin() -> None:
    """Never lets the event loop go on; the kernel ends it, as an orchestrator would."""
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + 1,) * 2)
    while True:
        pass


_DEATHS: dict[str, Callable[[], None]] = {
    "exit": lambda: os._exit(KILLED),
    "segmentation fault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "out of memory": lambda: os.kill(os.getpid(), signal.SIGKILL),  # as the kernel does it
    "endless loop": _spin,
}


def _consumer(world: ConsumerFixture, killer: int, by: str) -> Consumer:
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient())

    @billing.on(OrderPlaced, topic="orders")
    async def bill(placed: OrderPlaced, session: AsyncSession, ctx: MessageContext) -> None:
        if placed.number == killer:
            _DEATHS[by]()
        session.add(Effect(message_id=ctx.id, number=placed.number))

    return billing


def _main(url: str, killer: tuple[int, str], poison: int, armed: str) -> None:
    async def consume() -> None:
        _failpoints.enable(armed)
        world = ConsumerFixture(url)
        world.send(*_messages(poison))
        await world.run(_consumer(world, *killer))
        await world.close()

    asyncio.run(consume())
