"""A broker and its client: ordered channels, acknowledgements that come late or never, refusals, outages.

A client keeps the port's promises and no more: what it sent before a reset may still arrive, in order; after an
unknown outcome it takes nothing until it is reset; what waits behind a refused batch of its destination is refused.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outboxkit.brokers import Batch, Receipts, Refusal
from outboxkit.policy import Failure
from outboxkit.rows import Row
from outboxkit_relay.core.protocol import Answered

__all__ = ["Broker", "Client"]


@dataclass(slots=True)
class Pending:
    """A batch under way: for each row None while unknown, else whether it was stored or why not."""

    number: int
    rows: Sequence[Row]
    outcomes: list[Failure | bool | None]


@dataclass(slots=True)
class Channel:
    """What a client has sent to a destination, in order."""

    topic: str
    sent: deque[tuple[Pending, int]] = field(default_factory=deque)
    frozen: bool = False


@dataclass(slots=True)
class Broker:
    """What is stored, and what will be refused.

    Attributes:
        log: numbers of messages, by topic, in order of arrival.
        plans: refusals to come, by the message's number.
        refused: numbers that the broker itself has refused at least once.
        away: destinations that take nothing.
        troubles: how often something was given up or refused: what allows duplicates.
    """

    rng: random.Random
    log: dict[str, list[Row]] = field(default_factory=lambda: defaultdict(list))
    plans: dict[int, list[Failure]] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    away: set[str] = field(default_factory=set)
    channels: list[Channel] = field(default_factory=list)
    troubles: Counter[str] = field(default_factory=Counter)

    def take(self, row: Row) -> Failure | bool:
        """A message arrives."""
        plan = self.plans.get(row.id.int)
        if plan:
            self.refused.add(row.id.int)
            self.troubles["refusal"] += 1
            return plan.pop(0)
        self.log[row.topic].append(row)
        return True

    def advance(self, *, all_of_it: bool = False) -> bool:
        """Some channel delivers some of what was sent; whether there was anything."""
        ready = [channel for channel in self.channels if channel.sent and not channel.frozen]
        if not ready:
            return False
        for channel in ready if all_of_it else [self.rng.choice(ready)]:
            for _ in range(len(channel.sent) if all_of_it else self.rng.randint(1, len(channel.sent))):
                pending, index = channel.sent.popleft()
                pending.outcomes[index] = self.take(pending.rows[index])
        return True


@dataclass(slots=True)
class Client:
    """The publisher of one relay process."""

    broker: Broker
    report: Callable[[Answered], None]
    channels: dict[str, Channel] = field(default_factory=dict)
    pending: dict[int, Pending] = field(default_factory=dict)
    fatal: bool = False

    def publish(self, number: int, batch: Batch) -> None:
        pending = Pending(number, batch.rows, [None] * len(batch.rows))
        self.pending[number] = pending
        if self.fatal:
            self._finish(pending, Failure.INDETERMINATE)
        elif batch.destination in self.broker.away:
            self.broker.troubles["away"] += 1
            self._finish(pending, Failure.BROKER_DOWN)
        else:
            channel = self.channels.get(batch.destination)
            if channel is None:
                channel = self.channels[batch.destination] = Channel(batch.destination)
                self.broker.channels.append(channel)
            channel.sent.extend((pending, index) for index in range(len(batch.rows)))

    def acknowledge(self, *, one: bool = False) -> bool:
        """Reports batches whose outcomes are all known; whether there was any."""
        known = [pending for pending in self.pending.values() if None not in pending.outcomes]
        for pending in known[:1] if one else known:
            self._finish(pending, Failure.INDETERMINATE)
        return bool(known)

    def lose(self) -> None:
        """The connection breaks: what is not acknowledged is unknown, and some of it still arrives."""
        if not self.pending:
            return
        self.fatal = True
        self._abandon()

    def reset(self) -> None:
        self._abandon()
        self.fatal = False

    def _abandon(self) -> None:
        rng = self.broker.rng
        for channel in self.channels.values():
            channel.frozen = False
            late = rng.randint(0, len(channel.sent))
            while len(channel.sent) > late:
                channel.sent.pop()
        self.channels = {}
        for pending in list(self.pending.values()):
            self.broker.troubles["abandoned"] += 1
            acknowledged = rng.randint(0, len(pending.rows))
            pending.outcomes[acknowledged:] = [None] * (len(pending.rows) - acknowledged)
            self._finish(pending, Failure.INDETERMINATE)

    def _finish(self, pending: Pending, unknown: Failure) -> None:
        del self.pending[pending.number]
        refusals = []
        for index, outcome in enumerate(pending.outcomes):
            failure = unknown if outcome is None else outcome
            if isinstance(failure, Failure):
                refusals.append(Refusal(index, failure, failure.value))
        # A late arrival writes into a list that nobody reads any more.
        pending.outcomes = list(pending.outcomes)
        places = [0] * len(pending.rows)
        self.report(Answered(pending.number, Receipts(places, places, tuple(refusals))))
