"""Consumers that are wrong on purpose, each in one way: the simulation must notice every one of them."""

from __future__ import annotations

from outboxkit.brokers import Delivery
from outboxkit.consumer.core import Core
from outboxkit.consumer.protocol import Attempt, Job, OrderingKey, Seen
from tests.property.consumer.simulation import Process, Work, offset_of

__all__ = ["BAD"]


class AcknowledgesBeforeCommit(Process):
    """Tells the broker when it receives."""

    def job(self, delivery: Delivery, **facts: object) -> Job:
        if "room_id" not in facts and self.owns_log:
            self.log.acknowledge([delivery.offset or 0])
        return super().job(delivery, **facts)


class ChecksThenInserts(Process):
    """Looks whether the message was handled when the attempt begins; nothing makes the row unique."""

    def begin(self, work: Work) -> bool:
        self.database.claims.clear()  # nobody waits for anybody
        if isinstance(work.command, Attempt):
            unknown = [job for job in work.command.jobs if offset_of(job) not in self.database.inbox]
            self.decided = getattr(self, "decided", {}) | {work: unknown}
        return super().begin(work)

    def commit_attempt(self, work: Work, attempt: Attempt) -> None:
        for job in self.decided.get(work, []) if work.failed is None else []:
            if offset_of(job) in self.database.inbox:
                self.database.effects.append(offset_of(job))
        super().commit_attempt(work, attempt)


class DedupesOutsideTheTransaction(Process):
    """Its inbox row is committed before the effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.early: set[int] = set()

    def begin(self, work: Work) -> bool:
        begun = super().begin(work)
        if begun and isinstance(work.command, Attempt) and work.failed is None:
            for job in work.command.jobs:
                if offset_of(job) not in self.database.inbox:
                    self.database.inbox.add(offset_of(job))
                    self.early.add(offset_of(job))
        return begun

    def effect(self, offset: int) -> None:
        if offset in self.early:
            self.early.discard(offset)
            self.database.effects.append(offset)


class CommitsPastUnsettledMessages(Process):
    """Commits the highest offset that it has settled."""

    def acknowledge(self) -> None:
        if self.core.settled and self.owns_log:
            highest = max(one.offset or 0 for one in self.core.settled)
            self.log.acknowledge(list(range(highest + 1)))
        super().acknowledge()


class _Overtaking(Core):
    def _followers(self, job: Job) -> tuple[Job, ...]:
        del job
        return ()

    def _is_behind(self, job: Job, seen: Seen) -> bool:
        del job, seen
        return False

    def stored(self, command: object) -> list[object]:  # type: ignore[override]
        held = dict(self._held)
        found = super().stored(command)  # type: ignore[arg-type]
        self._held = held
        for lane in self._lanes.values():
            for entry in lane.entries:
                entry.behind = False
        return found  # type: ignore[return-value]


class LetsFollowersOvertake(Process):
    """Goes on with a key while one of its messages waits."""

    def __post_init__(self) -> None:
        self.core = _Overtaking(self.policy, self.rng)


class _ForgetsHeld(Core):
    def _is_behind(self, job: Job, seen: Seen) -> bool:
        self._held: dict[OrderingKey, int] = {}
        return super()._is_behind(job, seen)


class TrustsAnOldLook(Process):
    """Believes what the database said before a message of the key was put aside."""

    def __post_init__(self) -> None:
        self.core = _ForgetsHeld(self.policy, self.rng)
        self.before: set[OrderingKey] = set()

    def receive(self) -> None:
        known = self.database.waiting_keys
        before = self.before
        self.before = known()
        self.database.waiting_keys = lambda: before  # type: ignore[method-assign]
        super().receive()
        self.database.waiting_keys = known  # type: ignore[method-assign]


class SuspectsLoseTheirCount(Process):
    """A start forgets who was suspected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.database.suspects.clear()


class BlamesTheWholeBatch(Process):
    """Lets suspects run under the common marker."""

    def receive(self) -> None:
        super().receive()
        for work in self.work:
            if isinstance(work.command, Attempt) and work.command.alone:
                self.database.markers[self] = [offset for offset, _ in enumerate(self.database.plans)]


BAD = [
    AcknowledgesBeforeCommit,
    ChecksThenInserts,
    DedupesOutsideTheTransaction,
    CommitsPastUnsettledMessages,
    LetsFollowersOvertake,
    TrustsAnOldLook,
    SuspectsLoseTheirCount,
    BlamesTheWholeBatch,
]
