"""A deterministic world for the consumer's core: processes, a broker's log and a database, driven by one seed.

Processes begin and end attempts, die at any step, are taken for dead while they still work, and lose the broker. Every
step is drawn from the seed, so that a failure can be run again.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from outboxkit.brokers import Delivery
from outboxkit.consumer.core import Core
from outboxkit.consumer.protocol import (
    MAX_DEATHS,
    Append,
    Attempt,
    Bury,
    Command,
    ConsumerPolicy,
    Drop,
    Failed,
    Hold,
    Job,
    OrderingKey,
    Seen,
)
from outboxkit.policy import Failure, RetryPolicy, full_jitter

__all__ = ["Database", "Log", "Plan", "Process", "SimulatedWorld", "violations"]

NOW = datetime(2026, 1, 1, tzinfo=UTC)
RETRIES = 2
FAULTY_STEPS = 1_500


@dataclass(frozen=True)
class Plan:
    """What one message does: its key, how often it fails, whether it kills the process, whether it is unreadable."""

    key: bytes | None
    failures: int = 0
    kills: bool = False
    unreadable: bool = False

    @property
    def dies(self) -> bool:
        return self.kills or self.unreadable or self.failures > RETRIES


class Log:
    """One partition: what is not acknowledged, and all behind it, comes again to the next owner."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.acknowledged: set[int] = set()
        self.position = 0

    def take(self, limit: int) -> list[Delivery]:
        offsets = range(self.position, min(self.position + limit, len(self.plans)))
        self.position = max(self.position, offsets.stop)
        return [
            Delivery(
                topic="t",
                key=self.plans[offset].key,
                headers=(),
                payload=b"",
                origin=f"t[0]@{offset}",
                partition=0,
                offset=offset,
            )
            for offset in offsets
        ]

    def acknowledge(self, offsets: list[int]) -> None:
        self.acknowledged.update(offsets)

    @property
    def committed(self) -> int:
        return next(offset for offset in range(len(self.plans) + 1) if offset not in self.acknowledged)

    def rewind(self) -> None:
        self.position = self.committed
        self.acknowledged = {offset for offset in self.acknowledged if offset < self.position}


@dataclass
class Row:
    """A row of the waiting room."""

    number: int
    offset: int
    attempts: int
    due: bool
    locked: bool = False


class Database:
    """Committed state. `claims` are rows of transactions that are under way: others wait for them."""

    def __init__(self, plans: list[Plan]) -> None:
        self.plans = plans
        self.effects: list[int] = []
        self.inbox: set[int] = set()
        self.letters: dict[int, Failure] = {}
        self.rows: list[Row] = []
        self.claims: dict[int, Work] = {}
        self.markers: dict[object, list[int]] = {}
        self.suspects: dict[int, int] = {}
        self.killers: dict[int, int | None] = {}  # who caused the latest death that each message is blamed for
        self.numbers = 0

    def key_of(self, offset: int) -> OrderingKey | None:
        key = self.plans[offset].key
        return None if key is None else ("t", key)

    def waiting_keys(self) -> set[OrderingKey]:
        return {key for row in self.rows if (key := self.key_of(row.offset)) is not None}

    def add(self, offset: int, attempts: int, *, due: bool) -> None:
        self.numbers += 1
        self.rows.append(Row(self.numbers, offset, attempts, due))

    def promote(self, key: OrderingKey | None) -> None:
        first = next((row for row in self.rows if key is not None and self.key_of(row.offset) == key), None)
        if first is not None:
            first.due = True

    def remove(self, number: int) -> bool:
        row = self.row(number)
        if row is not None:
            self.rows.remove(row)
            self.promote(self.key_of(row.offset))
        return row is not None

    def row(self, number: int) -> Row | None:
        return next((row for row in self.rows if row.number == number), None)

    def is_settled(self, offset: int) -> bool:
        return offset in self.inbox or offset in self.letters or any(row.offset == offset for row in self.rows)

    def bury_markers_of(self, process: object, killer: int | None) -> None:
        """What a vanished process was handling is suspect."""
        for marker in [name for name in self.markers if name is process or getattr(name, "owner", None) is process]:
            for offset in set(self.markers.pop(marker)):
                self.suspects[offset] = self.suspects.get(offset, 0) + 1
                self.killers[offset] = killer


@dataclass(eq=False)
class Work:
    """A command under way: begun, and then committed."""

    owner: Process
    command: Command
    begun: bool = False
    failed: Failed | None = None


@dataclass(eq=False)
class Process:
    """One run: a core, and what is under way for it. Subclasses are wrong on purpose."""

    database: Database
    log: Log
    rng: random.Random
    policy: ConsumerPolicy
    make_core: Callable[[ConsumerPolicy, random.Random], Core] = Core
    work: list[Work] = field(default_factory=list)
    owns_log: bool = True

    def __post_init__(self) -> None:
        self.core = self.make_core(self.policy, self.rng)

    # --- steps -------------------------------------------------------------------------------------------------

    def receive(self) -> None:
        limit = self.rng.randint(1, 6)
        fresh = [self.job(delivery) for delivery in (self.log.take(limit) if self.owns_log else [])]
        due = [row for row in self.database.rows if row.due and not row.locked]
        jobs = [*(self.waiting(row) for row in due[:3]), *fresh]
        if not jobs:
            return
        self.core.open()
        names = [offset_of(job) for job in jobs]
        suspects = {str(offset): deaths for offset, deaths in self.database.suspects.items()}
        if not set(names) & set(self.database.suspects):
            self.database.markers[self] = [*map(int, self.core.named()), *names]
        seen = Seen(suspects=suspects, waiting=self.database.waiting_keys())
        self.add(self.core.admit(jobs, seen))

    def job(self, delivery: Delivery, **facts: Any) -> Job:
        plan = self.database.plans[delivery.offset or 0]
        fault = Failed(failure=Failure.POISON) if plan.unreadable else None
        key = None if delivery.key is None else (delivery.topic, delivery.key)
        return Job(delivery=delivery, identity=str(delivery.offset), lane=key, fault=fault, **facts)

    def waiting(self, row: Row) -> Job:
        delivery = Delivery(
            topic="t",
            key=self.database.plans[row.offset].key,
            headers=(),
            payload=b"",
            origin="",
            partition=0,
            offset=row.offset,
        )
        return self.job(delivery, room_id=row.number, spent=row.attempts)

    def add(self, commands: list[Command]) -> None:
        self.work += [Work(self, command) for command in commands]

    def acknowledge(self) -> None:
        settled, self.core.settled = self.core.settled, []
        if self.owns_log:
            self.log.acknowledge([one.offset or 0 for one in settled])

    def step(self, work: Work) -> bool:
        """Begins or commits a command; False when another transaction is in the way, or the process dies of it."""
        if not work.begun:
            return self.begin(work)
        self.work.remove(work)
        self.commit(work)
        return True

    def begin(self, work: Work) -> bool:
        command = work.command
        if isinstance(command, Attempt):
            offsets = [offset_of(job) for job in command.jobs]
            if any(self.database.claims.get(offset, work) is not work for offset in offsets):
                return False
            if command.alone:
                self.database.markers[work] = offsets
            for offset in offsets:
                if offset not in self.database.inbox and offset not in self.database.letters:
                    self.database.claims[offset] = work
                    if self.database.plans[offset].kills:
                        raise ProcessDied(offset)
            work.failed = self.outcome(command)
        work.begun = True
        return True

    def outcome(self, attempt: Attempt) -> Failed | None:
        for job in attempt.jobs:
            offset = offset_of(job)
            is_known = offset in self.database.inbox or offset in self.database.letters
            if not is_known and attempt.number <= self.database.plans[offset].failures:
                return Failed(failure=Failure.HANDLER)
        return None

    def commit(self, work: Work) -> None:
        command, database = work.command, self.database
        if isinstance(command, Attempt):
            self.commit_attempt(work, command)
            return
        self.store(command)
        database.claims = {offset: other for offset, other in database.claims.items() if other is not work}
        self.add(self.core.stored(command))

    def commit_attempt(self, work: Work, attempt: Attempt) -> None:
        database = self.database
        if work.failed is None:
            for job in attempt.jobs:
                if job.room_id is not None and not database.remove(job.room_id):
                    continue  # another process took it
                self.effect(offset_of(job))
        database.claims = {offset: other for offset, other in database.claims.items() if other is not work}
        if attempt.alone:
            database.markers.pop(work, None)
            for job in attempt.jobs:
                database.suspects.pop(offset_of(job), None)
        self.add(self.core.attempted(attempt, work.failed, NOW))

    def effect(self, offset: int) -> None:
        if offset not in self.database.inbox and offset not in self.database.letters:
            self.database.inbox.add(offset)
            self.database.effects.append(offset)

    def store(self, command: Hold | Append | Bury | Drop) -> None:
        database = self.database
        if isinstance(command, Hold):
            if command.job.room_id is not None:
                if (row := database.row(command.job.room_id)) is not None:
                    row.attempts, row.due = command.attempts, True
                return
            database.add(offset_of(command.job), command.attempts, due=True)
        if isinstance(command, Bury):
            self.bury(command)
        followers = command.followers if isinstance(command, Hold | Bury) else command.jobs
        for job in followers if not isinstance(command, Drop) else ():
            database.add(offset_of(job), 0, due=False)
        if isinstance(command, Append):
            database.promote(command.jobs[0].lane)

    def bury(self, command: Bury) -> None:
        offset, database = offset_of(command.job), self.database
        if command.job.room_id is not None and not database.remove(command.job.room_id):
            return
        if offset not in database.inbox and offset not in database.letters:
            database.letters[offset] = command.failed.failure
        database.suspects.pop(offset, None)


class ProcessDied(Exception):
    """A message has killed the process."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def offset_of(job: Job) -> int:
    return job.delivery.offset or 0


class SimulatedWorld:
    """Runs processes of one kind over a log until everything is settled, with faults drawn from the seed."""

    def __init__(self, seed: int, make: Callable[..., Process] = Process, batch: int | None = None) -> None:
        self.rng = random.Random(seed)
        keys = [b"a", b"b", b"c", None]
        self.plans = [self._plan(self.rng.choice(keys)) for _ in range(self.rng.randint(5, 25))]
        self.database, self.log = Database(self.plans), Log(self.plans)
        self.policy = ConsumerPolicy(
            retry=RetryPolicy(immediate=self.rng.randint(0, 1), delayed=self._delays()),
            concurrency=self.rng.randint(1, 4),
            batch=batch or self.rng.choice([1, 1, 5]),
        )
        self.make = make
        self.deaths, self.killings = 0, 0
        self.wrong: list[str] = []
        self.zombies: list[Process] = []
        self.rebalances = 0
        self.process = self._start()

    def _plan(self, key: bytes | None) -> Plan:
        kind = self.rng.random()
        if kind < 0.03:
            return Plan(key, kills=True)
        if kind < 0.06:
            return Plan(key, unreadable=True)
        return Plan(key, failures=self.rng.choice([0] * 6 + [1, RETRIES, RETRIES + 2]))

    def _delays(self) -> Any:
        return full_jitter(timedelta(seconds=1), cap=timedelta(seconds=1), attempts=RETRIES)

    def _start(self) -> Process:
        for row in self.database.rows:
            row.locked = False
        for key in self.database.waiting_keys():
            self.database.promote(key)
        self.log.rewind()
        return self.make(self.database, self.log, self.rng, self.policy)

    def run(self, steps: int = 30_000) -> list[str]:
        """Returns what is wrong, in words. Faults happen in the first steps only."""
        for step in range(steps):
            self._step(faults=step < FAULTY_STEPS)
            if step > FAULTY_STEPS and self._is_over():
                break
        else:
            self.wrong.append(f"not settled after {steps} steps and {self.deaths} deaths")
        return self.wrong + violations(self.database, self.plans, self.killings)

    def _is_over(self) -> bool:
        at_rest = not self.process.work and not self.database.rows and self.log.committed == len(self.plans)
        return at_rest and not self.zombies

    def _step(self, *, faults: bool) -> None:
        draw = self.rng.random()
        if faults and draw < 0.01:
            self._die(self.process)
        elif faults and draw < 0.02:
            self._rebalance()
        elif draw < 0.3:
            self.process.receive()
        elif draw < 0.45:
            self.process.acknowledge()
            self._check_acknowledged()
        else:
            self._work()

    def _work(self) -> None:
        self.zombies = [zombie for zombie in self.zombies if zombie.work]
        process = self.rng.choice([self.process, *self.zombies])
        if not process.work:
            return
        work = self.rng.choice(process.work)
        try:
            process.step(work)
        except ProcessDied as death:
            self._die(process, death.offset)

    def _die(self, process: Process, killer: int | None = None) -> None:
        self.deaths += 1
        self.killings += killer is not None
        if (
            self.zombies
        ):  # two processes have the same messages: what one of them has counted the other one does not know
            killer = None
        self.database.claims = {at: work for at, work in self.database.claims.items() if work.owner is not process}
        self.database.bury_markers_of(process, killer)
        if process in self.zombies:
            self.zombies.remove(process)
        else:
            self.process = self._start()

    def _rebalance(self) -> None:
        """Another process gets the partition, and the old one does not know it yet."""
        self.process.owns_log = False
        self.zombies.append(self.process)
        self.rebalances += 1
        self.process = self._start()

    def _check_acknowledged(self) -> None:
        lost = [offset for offset in range(self.log.committed) if not self.database.is_settled(offset)]
        if lost:
            self.wrong.append(f"acknowledged and not settled: {lost}")


def violations(database: Database, plans: list[Plan], killings: int) -> list[str]:
    """Returns which promises were broken, in words.

    A message that three deaths have met may be dead though it killed nobody: but not for the sake of another one.
    """
    found: list[str] = []
    for offset, plan in enumerate(plans):
        times = database.effects.count(offset)
        is_dead = offset in database.letters
        if times + is_dead != 1 and not (plan.failures > RETRIES and is_dead and times == 0):
            found.append(f"message {offset} has {times} effects and {'a' if is_dead else 'no'} letter")
        is_crash = database.letters.get(offset) is Failure.CRASH
        if is_dead and not plan.dies and not (is_crash and database.killers.get(offset) is None):
            found.append(f"message {offset} is dead ({database.letters[offset].value}) and should not be")
    by_key: dict[bytes, list[int]] = defaultdict(list)
    for offset in database.effects:
        if (key := plans[offset].key) is not None:
            by_key[key].append(offset)
    found += [
        f"key {key!r} took effect in the order {order}" for key, order in by_key.items() if order != sorted(order)
    ]
    killers = sum(plan.kills for plan in plans)
    if killings > killers * MAX_DEATHS * 4:
        found.append(f"{killers} killers made {killings} deaths")
    return found
