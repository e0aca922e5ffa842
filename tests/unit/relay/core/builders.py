"""Rows, and a relay's core with a clock that a test moves."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import TypeVar
from uuid import UUID

from outboxkit.brokers import Receipts, Refusal
from outboxkit.policy import Failure, Followers, Order, RetryPolicy
from outboxkit.rows import Page, Row
from outboxkit_relay.core.lanes import MAIN
from outboxkit_relay.core.protocol import (
    Answered,
    Command,
    Event,
    Fetched,
    Owned,
    Publish,
)
from outboxkit_relay.core.state import RelayConfig, State
from outboxkit_relay.core.step import step

__all__ = ["ALL", "NOW", "Core", "K", "only", "row", "sent"]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ALL = frozenset({0, 1})
K = ("orders", b"k")
Kind = TypeVar("Kind")


def row(position: int, key: bytes | None = b"k", waiting_id: int | None = None, attempts: int = 0) -> Row:
    return Row.of(position, UUID(int=position), "orders", key, "t", "event", b"", b"", NOW, None, attempts, waiting_id)


class Core:
    """A relay's core with a clock that a test moves."""

    def __init__(self, order: Order = Order.STRICT, followers: Followers = Followers.PARK) -> None:
        retry = RetryPolicy(followers=followers)
        self.state = State(config=RelayConfig(batch_size=2, order=order, retry=retry))
        self.now = NOW
        self.on(Owned(ALL, has_surplus=False, stopped=frozenset()))

    def on(self, event: Event) -> list[Command]:
        return step(self.state, event, self.now, random.Random(1))[1]

    def fetched(self, *rows: Row, due: tuple[Row, ...] = ()) -> list[Command]:
        lease = self.now + timedelta(seconds=8)
        return self.on(Fetched(MAIN, Page(list(rows), "5:5:"), due, lease))

    def answered(self, number: int, count: int, *refused: tuple[int, Failure]) -> list[Command]:
        refusals = tuple(Refusal(index, failure, "no") for index, failure in refused)
        return self.on(Answered(number, Receipts([0] * count, [0] * count, refusals)))


def only(kind: type[Kind], commands: list[Command]) -> Kind:
    (found,) = [command for command in commands if isinstance(command, kind)]
    return found


def sent(commands: list[Command]) -> list[list[int]]:
    return [[one.position for one in command.batch.rows] for command in commands if isinstance(command, Publish)]
