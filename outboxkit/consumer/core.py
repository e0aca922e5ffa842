"""The consumer's core: decides what happens to each delivery. Facts in, commands out; no I/O, no clock, no SQL.

    admit ──► lanes by key ──► Attempt ──► settled
                 │                ├──► Attempt again (immediate retry)
                 │                ├──► Hold   (wait for the next try; the followers of the key wait behind)
                 │                └──► Bury   (dead letter; with `park` the followers wait behind)
                 ├──► Append (the key waits already)
                 └──► Drop   (nobody here wants it)

A delivery is settled when the database has committed what became of it, and only then may the broker be told. The shell
(`outboxkit.consumer.run`) carries commands out and reports each one back: `attempted`, `stored` or `lost`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from outboxkit.consumer.protocol import (
    MAX_DEATHS,
    Append,
    Attempt,
    Bury,
    Drop,
    Failed,
    Hold,
    Standing,
    WhileWaiting,
)
from outboxkit.policy import Failure, Followers

if TYPE_CHECKING:
    import random
    from collections.abc import Hashable, Iterable, Sequence
    from datetime import datetime

    from outboxkit.brokers import Delivery
    from outboxkit.consumer.protocol import Command, ConsumerPolicy, Job, OrderingKey, Seen, Store

__all__ = ["Core"]


@dataclass(slots=True, eq=False)
class _Entry:
    """A job on its way through the core."""

    job: Job
    number: int
    deaths: int = 0
    alone: bool = False  # under a marker of its own
    single: bool = False  # its batch has failed
    behind: bool = False  # its key waits already


@dataclass(slots=True)
class _Lane:
    """The entries of one key, in order; ``busy`` while a command about its first ones is under way."""

    entries: deque[_Entry] = field(default_factory=deque)
    busy: bool = False


class Core:
    """The state of one run. Deterministic: the same calls give the same commands.

    Args:
        policy: how to decide.
        rng: source of the jitter.

    Attributes:
        settled: fresh deliveries that the broker may be told of; the shell takes them out.
        in_hand: jobs that are not settled.
        bytes_in_hand: their payloads.
    """

    def __init__(self, policy: ConsumerPolicy, rng: random.Random) -> None:
        self._policy, self._rng = policy, rng
        self._lanes: dict[Hashable, _Lane] = {}
        self._ready: deque[Hashable] = deque()
        self._busy = 0
        self._is_exclusive = False
        self._is_stopping = False
        self._opening = 0
        self._held: dict[OrderingKey, int] = {}  # key -> the opening that may not have seen that it waits
        self._rooms: set[int] = set()
        self.settled: list[Delivery] = []
        self.in_hand = 0
        self.bytes_in_hand = 0

    @property
    def is_idle(self) -> bool:
        """Whether no command is under way."""
        return self._busy == 0

    @property
    def under_way(self) -> int:
        """Commands that are being carried out."""
        return self._busy

    @property
    def waiting_in_hand(self) -> list[int]:
        """Rows of the waiting room that are in hand."""
        return list(self._rooms)

    # --- facts in ------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Notes that the database is being asked what `admit` will be told: what is held from now on is newer."""
        self._opening += 1

    def admit(self, jobs: Sequence[Job], seen: Seen) -> list[Command]:
        """Takes jobs in, in the order in which they were received."""
        # Where one is suspect all get markers of their own: a death must not count against the others.
        alone = any(job.identity in seen.suspects for job in jobs)
        commands: list[Command] = []
        for job in jobs:
            if job.room_id is not None and job.room_id in self._rooms:
                continue
            if job.standing in (Standing.IGNORED, Standing.EXPIRED):
                commands += self._drop(job)
                continue
            self._count(job, 1)
            deaths = seen.suspects.get(job.identity, 0)
            entry = _Entry(job, job.spent + 1, deaths, alone, behind=self._is_behind(job, seen))
            self._enqueue(entry)
        self._held = {key: opening for key, opening in self._held.items() if opening > self._opening}
        return commands + self._next()

    def attempted(self, attempt: Attempt, failed: Failed | None, now: datetime) -> list[Command]:
        """Takes in how an attempt ended: with its effect or as a duplicate (None), or failed."""
        if failed is None:
            self._release(attempt.jobs, settle=True)
        elif len(attempt.jobs) > 1:
            for lane in self._lanes_of(attempt.jobs):
                for entry in lane.entries:
                    entry.single = True
            self._release(attempt.jobs, settle=False)
        else:
            return [*self._after_failure(attempt, failed, now), *self._next()]
        return self._next()

    def abandoned(self, attempt: Attempt) -> list[Command]:
        """Takes in that an attempt was given up without effect, because of a stop."""
        self._release(attempt.jobs, settle=False)
        return self._next()

    def stored(self, command: Store) -> list[Command]:
        """Takes in that a command is committed."""
        if isinstance(command, Drop):
            self._rooms.difference_update(job.room_id for job in command.jobs if job.room_id is not None)
            return []
        key = command.jobs[0].lane
        waits = isinstance(command, Append | Hold) or command.parks
        if waits and key is not None and self._keeps_order:
            self._held[key] = self._opening
            for entry in self._lane(command.jobs[0]).entries:
                entry.behind = True
        self._release(command.jobs, settle=True)
        return self._next()

    def lost(self, command: Hold | Append | Bury, failed: Failed) -> list[Command]:
        """Takes in that a command cannot be carried out, because the database does not take the job's data."""
        if isinstance(command, Append) and len(command.jobs) > 1:
            return [Append(command.jobs[:1])]  # the rest stays in its lane and follows
        if isinstance(command, Bury):
            if not command.reduced:
                return [Bury(command.job, command.failed, command.attempts, reduced=True)]
            self._release(command.jobs, settle=True, tell=False)
            self._rooms.update(job.room_id for job in command.jobs if job.room_id is not None)  # not again in this run
            return self._next()
        if isinstance(command, Hold):
            return [Bury(command.job, command.failed, command.attempts)]
        return [Bury(command.jobs[0], failed, command.jobs[0].spent)]

    def stop(self) -> None:
        """Begins nothing more. What is under way is still told to the core."""
        self._is_stopping = True

    def unsettled(self) -> list[Delivery]:
        """Fresh deliveries that were not settled: the broker must hand them out again."""
        entries = (entry for lane in self._lanes.values() for entry in lane.entries)
        return [entry.job.delivery for entry in entries if entry.job.room_id is None]

    def named(self) -> list[str]:
        """Identities that the common crash marker must name."""
        entries = (entry for lane in self._lanes.values() for entry in lane.entries)
        return [entry.job.identity for entry in entries if not entry.alone]

    # --- decisions -----------------------------------------------------------------------------------------------

    @property
    def _keeps_order(self) -> bool:
        return self._policy.while_waiting is WhileWaiting.BLOCK

    def _is_behind(self, job: Job, seen: Seen) -> bool:
        if job.lane is None or job.room_id is not None or not self._keeps_order:
            return False
        return job.lane in seen.waiting or self._held.get(job.lane, -1) >= self._opening

    def _after_failure(self, attempt: Attempt, failed: Failed, now: datetime) -> list[Command]:
        (job,), number, policy = attempt.jobs, attempt.number, self._policy
        if failed.is_free and not self._is_too_old(job, now):
            return [Hold(job, failed.delay or timedelta(0), number - 1, failed, self._followers(job))]
        is_last = failed.failure.is_final or number >= policy.retry.attempts
        if is_last and policy.on_dead is not Followers.BLOCK:
            parks = policy.on_dead is Followers.PARK and job.delivery.key is not None
            return [Bury(job, failed, number, parks, self._followers(job) if parks else ())]
        if number <= policy.retry.immediate and failed.delay is None and not failed.failure.is_final:
            if self._is_stopping:
                self._release(attempt.jobs, settle=False)
                return []
            return [Attempt(attempt.jobs, number + 1, attempt.alone)]
        delay = failed.delay or policy.retry.delayed.delay(max(number - policy.retry.immediate, 1), self._rng)
        return [Hold(job, delay, number, failed, self._followers(job))]

    def _is_too_old(self, job: Job, now: datetime) -> bool:
        return job.first_failed_at is not None and now - job.first_failed_at > self._policy.patience

    def _followers(self, job: Job) -> tuple[Job, ...]:
        """The later jobs of its key that are in hand; those of a waiting job are in the room already."""
        if job.lane is None or job.room_id is not None or not self._keeps_order:
            return ()
        entries = iter(self._lane(job).entries)
        next(entries)
        return tuple(entry.job for entry in entries)

    def _next(self) -> list[Command]:
        """Begins as much as there is room for."""
        commands: list[Command] = []
        while (
            self._ready and not self._is_stopping and not self._is_exclusive and self._busy < self._policy.concurrency
        ):
            first = self._lanes[self._ready[0]].entries[0]
            if self._must_be_exclusive(first):
                if self._busy:
                    break
                self._is_exclusive = True
            self._busy += 1
            commands.append(self._begin(first))
        return commands

    @staticmethod
    def _must_be_exclusive(entry: _Entry) -> bool:
        """A message is only buried for a death that it died alone: no other one may be suspected for its sake."""
        return entry.deaths == MAX_DEATHS - 1 and not entry.behind

    def _begin(self, first: _Entry) -> Command:
        job, lane = first.job, self._lanes[self._ready[0]]
        if first.behind:
            jobs = [entry.job for entry in lane.entries if entry.behind]
            self._occupy([lane])
            return Append(tuple(jobs))
        if job.fault is None and first.deaths < MAX_DEATHS:
            return Attempt(self._chunk(first), first.number, first.alone)
        failed = job.fault or Failed(failure=Failure.CRASH)
        parks = self._policy.on_dead is Followers.PARK and job.delivery.key is not None
        followers = self._followers(job) if parks else ()
        self._occupy([lane])
        return Bury(job, failed, first.number if job.fault else first.deaths, parks, followers)

    def _chunk(self, first: _Entry) -> tuple[Job, ...]:
        """The jobs of one transaction: one, or as many as a batch takes, whole keys in their order."""
        jobs: list[Job] = []
        lanes: list[_Lane] = []
        for name in list(self._ready):
            lane = self._lanes[name]
            before = len(jobs)
            for entry in lane.entries:
                if len(jobs) >= self._policy.batch or (jobs and not _may_share(entry)):
                    break
                jobs.append(entry.job)
                if not _may_share(first):
                    break
            if len(jobs) > before:
                lanes.append(lane)
            if len(jobs) >= self._policy.batch or not _may_share(first):
                break
        self._occupy(lanes)
        return tuple(jobs)

    # --- the books -----------------------------------------------------------------------------------------------

    def _drop(self, job: Job) -> list[Command]:
        if job.room_id is None:
            self.settled.append(job.delivery)
            return []
        self._rooms.add(job.room_id)
        return [Drop((job,))]

    def _enqueue(self, entry: _Entry) -> None:
        name = _name(entry.job)
        lane = self._lanes.setdefault(name, _Lane())
        lane.entries.append(entry)
        if len(lane.entries) == 1 and not lane.busy:
            self._ready.append(name)

    def _occupy(self, lanes: Iterable[_Lane]) -> None:
        for lane in lanes:
            lane.busy = True
            self._ready.remove(_name(lane.entries[0].job))

    def _release(self, jobs: Sequence[Job], *, settle: bool, tell: bool = True) -> None:
        """Ends a command: its lanes are free again, and its jobs are settled or come first again."""
        self._busy -= 1
        self._is_exclusive = False
        for job in jobs if settle else ():
            self._lane(job).entries.popleft()
            self._count(job, -1)
            if tell and job.room_id is None:
                self.settled.append(job.delivery)
        for name in dict.fromkeys(map(_name, jobs)):
            lane = self._lanes[name]
            lane.busy = False
            if lane.entries:
                self._ready.append(name)
            else:
                del self._lanes[name]

    def _count(self, job: Job, sign: int) -> None:
        self.in_hand += sign
        self.bytes_in_hand += sign * job.size
        if job.room_id is not None:
            (self._rooms.add if sign > 0 else self._rooms.discard)(job.room_id)

    def _lane(self, job: Job) -> _Lane:
        return self._lanes[_name(job)]

    def _lanes_of(self, jobs: Sequence[Job]) -> list[_Lane]:
        return [self._lanes[name] for name in dict.fromkeys(map(_name, jobs))]


def _name(job: Job) -> Hashable:
    """Fresh jobs of one key share a lane. What has no order, and each head that has waited, has a lane of its own."""
    return job if job.lane is None or job.room_id is not None else job.lane


def _may_share(entry: _Entry) -> bool:
    job = entry.job
    return job.shares and not (
        entry.alone or entry.single or entry.behind or job.fault or job.room_id is not None or entry.deaths
    )
