"""A world of writers, relays, a database and a broker, driven by one seed.

    python -m tests.property.relay.simulation 4711             # one seed, and all its events
    python -m tests.property.relay.simulation 0 20000          # a range, with its rate

Every seed draws its own rules, load and faults. One seed in four is calm: no faults, so no duplicates.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit.policy import Backoff, Failure, Followers, Order, RetryPolicy
from outboxkit.rows import PauseSet, Row
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.core.protocol import Command, Event, Tick, Woken
from outboxkit_relay.core.state import RelayConfig
from tests.property.relay.broker import Broker
from tests.property.relay.database import Database, Stop, Stored, shard_of
from tests.property.relay.process import Process

__all__ = ["Outcome", "SimulatedCluster", "simulate"]

_START = datetime(2026, 1, 1, tzinfo=UTC)
_LEASE = timedelta(seconds=10)
_FINAL = (Failure.TOO_LARGE, Failure.REJECTED)
_TYPES = ("t", "t", "t", "u")
_BROKERS_OWN = (Failure.REFUSING, Failure.UNROUTABLE)

Key = tuple[str, bytes]


@dataclass(slots=True)
class Outcome:
    """What a seed has shown: what is wrong (empty when all is well), and how much happened."""

    seed: int
    wrongs: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Writer:
    """A transaction under way: the steps left, and what it holds."""

    steps: deque[tuple[str, str, bytes | None]]
    xid: int = 0
    rows: list[Stored] = field(default_factory=list)
    savepoint: int = 0
    keys: list[Key] = field(default_factory=list)


class SimulatedCluster:
    """Everything that a seed decides, and everything that happens."""

    def __init__(self, seed: int, relay: type[Process] = Process) -> None:
        self.rng = rng = random.Random(seed)
        self.relay = relay
        self.calm = seed % 4 == 0
        self.database = Database(_START)
        self.broker = Broker(rng)
        self.lax = not self.calm and rng.random() < 0.5  # writers commit without waiting for the disk
        config = _rules(rng, timedelta(minutes=1) if self.calm else timedelta(seconds=rng.choice((5, 30))))
        # Chances of their own: what the others decide under a seed stays what it was.
        self.operators = random.Random(f"operators of {seed}")
        self.config = replace(config, limits=_limits(self.operators), max_bytes=self.operators.choice((24, 48, 1_000)))
        self.large_rate = self.operators.choice((0.0, 0.3, 0.9))
        topics = ["a", "b", "c"][: rng.randint(1, 3)]
        keys = [b"k%d" % number for number in range(rng.randint(1, 3))]
        self.keys: list[Key] = [(topic, key) for topic in topics for key in keys]
        self.locks: dict[Key, Writer] = {}
        self.writers: list[Writer] = []
        self.left_to_write = rng.randint(3, 12)
        self.number = 0
        self.processes = [self.new_process() for _ in range(rng.randint(1, 3))]
        self.paused: dict[int, datetime] = {}  # by id() of the process
        self.counts: Counter[str] = Counter()
        self.pauses: Counter[str] = Counter()  # no faults: they allow no duplicates
        faults = [self.kill, self.pause, self.crash, self.cut, self.outage, self.stop_one, self.leap]
        self.faults: list[Callable[[], None]] = [] if self.calm else rng.sample(faults, rng.randint(1, 4))
        self.fault_rate = rng.choice((0.01, 0.03))
        self.hurry_until = _START
        self.once_scheduled: set[int] = set()
        self.trouble_rate = 0.0 if self.calm or rng.random() < 0.3 else 0.25
        self.pauses_rate = self.operators.choice((0.0, 0.0, 0.02))

    def new_process(self) -> Process:
        return self.relay(self.database, self.broker, self.config, self.rng)

    # --- the run ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        rng = self.rng
        for _ in range(rng.choice((0, 20, 60))):
            self.write()
        for process in self.processes:
            while rng.random() < 0.9:
                self.progress(process, rng.random())
        slow = rng.choice((1, 1, 3))  # a slow broker has more in flight
        common: list[Callable[[], object]] = [*[self.write] * 2 * slow, self.deliver, *[self.tick] * slow]
        for _ in range(rng.randint(150, 400)):
            chance = rng.random()
            if self.pauses_rate and self.operators.random() < self.pauses_rate:
                self.pause_or_resume()
                self.interfere()
                self._some_process().arrivals.append(Woken())  # also a stale one, or before the relay has joined
            elif chance < 0.05:
                self.upset(chance)
            elif chance < 0.35:
                rng.choice(common)()
            else:
                self.progress(rng.choice(self.processes), rng.random())

    def upset(self, chance: float) -> None:
        """A fault of those that this seed has, or what is no fault."""
        if self.faults and chance < self.fault_rate:
            self.rng.choice(self.faults)()
        elif not self.calm:
            self.request()
        elif chance < 0.005:
            self.stop_one()

    def progress(self, process: Process, chance: float) -> None:
        if self._is_paused(process):
            return
        act = process.dispatch if chance < 0.4 else process.read if chance < 0.8 else process.settle
        for _ in range(self.rng.choice((1, 2, 4, 8))):
            if not act():
                self.database.now += timedelta(milliseconds=self.rng.randint(0, 600 if self._is_hurried else 30))
                break

    @property
    def _is_hurried(self) -> bool:
        return self.database.now < self.hurry_until

    def tick(self) -> None:
        most = 100 if self.calm else self.rng.choice((5, 50, 500))
        self.database.now += timedelta(milliseconds=self.rng.randint(1, most))

    def deliver(self) -> None:
        if self.rng.random() < 0.5:
            self.broker.advance()
        else:
            self.rng.choice(self.processes).client.acknowledge(one=True)

    # --- writers ------------------------------------------------------------------------------------------------

    def write(self) -> None:
        if self.left_to_write and len(self.writers) < 4 and self.rng.random() < 0.5:
            self.left_to_write -= 1
            self.writers.append(Writer(self._program()))
        elif self.writers:
            writer = self.rng.choice(self.writers)
            for _ in range(self.rng.choice((1, 2, 5))):
                if writer.steps:
                    self._go_on(self._in_the_way_of(writer))

    def _in_the_way_of(self, writer: Writer) -> Writer:
        _, topic, key = writer.steps[0]
        holder = self.locks.get((topic, key)) if key is not None else None
        return holder if holder is not None and writer.steps[0][0] == "lock" else writer

    def _program(self) -> deque[tuple[str, str, bytes | None]]:
        rng = self.rng
        steps: deque[tuple[str, str, bytes | None]] = deque()
        if rng.random() < 0.3:
            steps.append(("xid", "", None))
        for topic, key in sorted(rng.sample(self.keys, min(len(self.keys), rng.choice((0, 1, 1, 2))))):
            steps.append(("lock", topic, key))
            steps.extend(("insert", topic, key) for _ in range(rng.randint(1, 4)))
            if rng.random() < 0.2:
                steps += [("savepoint", "", None), ("insert", topic, key), ("rollback", "", None)]
        if rng.random() < 0.2:
            steps.append(("insert", rng.choice(self.keys)[0], None))
        steps.append(("abort" if rng.random() < 0.15 else "commit", "", None))
        return steps

    def _go_on(self, writer: Writer) -> None:
        what, topic, key = writer.steps[0]
        if what == "lock" and key is not None:
            if (topic, key) in self.locks:
                return
            self.locks[topic, key] = writer
            writer.keys.append((topic, key))
        writer.steps.popleft()
        if what in {"xid", "lock", "insert"} and not writer.xid:
            writer.xid = self.database.begin()
        if what == "insert":
            self._insert(writer, topic, key)
        elif what == "savepoint":
            writer.savepoint = len(writer.rows)
        elif what == "rollback":
            del writer.rows[writer.savepoint :]
        elif what in {"commit", "abort"}:
            self._end(writer, commit=what == "commit")

    def _insert(self, writer: Writer, topic: str, key: bytes | None) -> None:
        database, rng = self.database, self.rng
        database.position += 1
        self.number += 1
        position = database.position
        kind = "command" if rng.random() < 0.1 else "event"
        expires = database.now + timedelta(milliseconds=rng.randint(1, 400)) if rng.random() < 0.05 else None
        row = Row.of(
            position, UUID(int=self.number), topic, key, self._type(), kind, self._payload(), b"", database.now, expires
        )
        writer.rows.append(Stored(row, writer.xid, shard_of(topic, key, self.number), self._due()))
        if rng.random() < self.trouble_rate:
            self.broker.plans[self.number] = self._plan()

    def _type(self) -> str:
        return self.operators.choice(_TYPES) if self.pauses_rate else _TYPES[0]

    def _due(self) -> datetime | None:
        """Some are scheduled."""
        late = self.pauses_rate and self.operators.random() < 0.1
        return self.database.now + timedelta(milliseconds=self.operators.randint(1, 3_000)) if late else None

    def _payload(self) -> bytes:
        """All but the empty one are large."""
        return b"large!" if self.large_rate and self.operators.random() < self.large_rate else b""

    def _plan(self) -> list[Failure]:
        rng = self.rng
        if rng.random() < 0.4:
            return [rng.choice(_BROKERS_OWN)] * rng.randint(1, 2)
        deadly = self.config.retry.followers is not Followers.BLOCK and rng.random() < 0.4
        return [rng.choice(_FINAL)] * (20 if deadly else 1)

    def _end(self, writer: Writer, *, commit: bool) -> None:
        database = self.database
        self.writers.remove(writer)
        for key in writer.keys:
            del self.locks[key]
        if not writer.xid:
            return
        if not commit:
            database.abort(writer.xid)
            return
        for stored in writer.rows:
            if stored.due_at is None:
                database.put(database.hot, stored.row.position, stored)
            else:
                database.put(database.scheduled, stored.row.id.int, stored)
                self.once_scheduled.add(stored.row.id.int)
            database.put(database.truth, stored.row.id.int, stored.row.position)
        database.commit(writer.xid, flush=not self.lax)

    # --- faults ----------------------------------------------------------------------------------------------------

    def _some_process(self) -> Process:
        return self.rng.choice(self.processes)

    def kill(self) -> None:
        process = self._some_process()
        process.die()
        self.counts["kill"] += 1
        self.processes[self.processes.index(process)] = self.new_process()

    def pause(self) -> None:
        settling = [process for process in self.processes if process.settler.tasks and not process.over]
        process = self.rng.choice(settling or self.processes)
        process.settle()  # often in the middle of a transaction
        self.paused[id(process)] = self.hurry_until = self.database.now + _LEASE * self.rng.choice((0.1, 1.0, 2.0))
        for channel in process.client.channels.values():
            channel.frozen = self.rng.random() < 0.5
        self.counts["pause"] += 1

    def leap(self) -> None:
        """Nothing happens for a long time."""
        self.database.now += _LEASE * self.rng.choice((0.3, 0.9, 1.1))
        self.counts["leap"] += 1

    def crash(self) -> None:
        database = self.database
        database.crash(self.rng.choice((database.flushed, self.rng.randint(database.flushed, len(database.log)))))
        self.writers.clear()
        self.locks.clear()
        self.counts["crash"] += 1

    def cut(self) -> None:
        for process in self.processes:
            if process.client.pending:
                process.client.lose()
                self.counts["cut"] += 1

    def outage(self) -> None:
        topic = self.rng.choice(self.keys)[0]
        self.broker.away ^= {topic}
        self.counts["outage"] += 1

    def request(self) -> None:
        """An operator wants parked keys to go on, and perhaps those whose heads are tried again."""
        if self.pauses_rate and self.operators.random() < 0.5:
            self.interfere()
        for key, stop in list(self.database.stopped.items()):
            if stop.reason == "parked" and stop.request is None:
                self.ask(key, stop)

    def ask(self, key: Key, stop: Stop) -> None:
        database = self.database
        request = self.rng.choice(("release", "repair"))
        if request == "repair":
            for letter in database.letters.values():
                if letter.position == stop.position:
                    self.broker.plans.pop(letter.id.int, None)
        xid = database.begin()
        database.put(database.stopped, key, Stop(stop.position, stop.reason, stop.due_at, request))
        database.commit(xid, flush=True)
        self.counts[request] += 1

    def pause_or_resume(self) -> None:
        """An operator pauses some of it, or resumes all."""
        rng, now = self.operators, self.database.paused
        topic, key = rng.choice(self.keys)
        self.control(
            rng.choice((
                PauseSet(),
                PauseSet(now.destinations | {topic}, now.types, now.keys),
                PauseSet(now.destinations, frozenset(_TYPES[-1:]), now.keys),
                PauseSet(now.destinations, now.types, now.keys | {(topic, key)}),
            ))
        )

    def interfere(self) -> None:
        """An operator does not wait for the next try of a head."""
        database, what = self.database, self.operators.choice(("release", "skip"))
        for key, stop in list(database.stopped.items()):
            if stop.reason == "retry" and stop.request is None:
                xid = database.begin()
                database.put(database.stopped, key, replace(stop, request=what))
                database.commit(xid, flush=True)
                self.pauses[f"{what} of a waiting head"] += 1

    def control(self, paused: PauseSet) -> None:
        database = self.database
        xid = database.begin()
        database.put(database.control, "pause_set", paused)
        database.commit(xid, flush=True)
        self.pauses["pauses"] += 1

    def stop_one(self) -> None:
        """A graceful restart."""
        process = self._some_process()
        if not process.stopping and len(self.processes) < 4:
            process.stopping = True
            self.processes.append(self.new_process())
            self.counts["stop"] += 1

    # --- the end ------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        self.broker.away.clear()
        self.control(PauseSet())
        self.paused.clear()
        for channel in self.broker.channels:
            channel.frozen = False
        while self.writers:
            for writer in list(self.writers):
                self._go_on(writer)

    def outlive(self) -> None:
        """Those who are paused stay so until others have taken over."""
        if any(map(self._is_paused, self.processes)) and self.rng.random() < 0.7:
            until = self.database.now + 1.5 * _LEASE
            while self.database.now < until:
                self._everything_moves()
                self.database.now += timedelta(milliseconds=900)

    def drain(self) -> bool:
        """Lets everything run until nothing is left; whether that came."""
        for _ in range(400):
            if not self._everything_moves():
                self.processes = [process for process in self.processes if not process.over]
                if self.is_over():
                    return True
                self.request()
                self.database.now += timedelta(milliseconds=400)
        return False

    def _everything_moves(self) -> bool:
        moved = self.broker.advance(all_of_it=True)
        for process in self.processes:
            if not self._is_paused(process):
                moved = process.client.acknowledge() or moved
                while process.dispatch():
                    moved = True
                while process.settle() or process.read():
                    moved = True
                    if process.waits:
                        break
        return moved

    def _is_paused(self, process: Process) -> bool:
        return self.paused.get(id(process), _START) > self.database.now

    def is_over(self) -> bool:
        database = self.database
        return not (database.hot or database.scheduled or database.waiting or database.stopped) and all(
            process.state.is_quiet and not process.state.queued for process in self.processes
        )


def _rules(rng: random.Random, patience: timedelta) -> RelayConfig:
    delayed = Backoff(base=timedelta(milliseconds=100), cap=timedelta(seconds=1), attempts=rng.randint(1, 2))
    followers = rng.choice((Followers.PARK, Followers.PARK, Followers.SKIP, Followers.BLOCK))
    return RelayConfig(
        batch_size=rng.choice((1, 2, 3, 5)),
        window=rng.randint(1, 3),
        order=rng.choice((Order.PIPELINED, Order.STRICT)),
        retry=RetryPolicy(immediate=rng.randint(0, 1), delayed=delayed, followers=followers),
        patience=patience,
        lease=_LEASE,
    )


def _limits(rng: random.Random) -> DestinationLimits:
    return DestinationLimits(
        in_flight=rng.choice((None, None, 1, 3)),
        rate=rng.choice((None, None, 30.0)),
        circuit=rng.choice((None, CircuitRule(min_messages=4, open_for=timedelta(seconds=2)))),
    )


# --- the verdict -----------------------------------------------------------------------------------------------------


def verdict(world: SimulatedCluster, *, drained: bool) -> list[str]:
    """Everything that is wrong."""
    database, log = world.database, world.broker.log
    wrongs = list(database.wrongs)
    if not drained:
        left = [*database.hot, *database.scheduled, *database.waiting, *database.stopped]
        wrongs.append(f"stuck: {left[:5]} of {len(left)} are left")
    published = Counter(row.id.int for rows in log.values() for row in rows)
    done = published.keys() | database.letters.keys() | database.expired.keys()
    if drained and (lost := sorted(database.truth.keys() - done)):
        wrongs.append(f"I1: committed and lost: {lost}")
    if ghosts := sorted(published.keys() - database.truth.keys()):
        wrongs.append(f"I2: published and never committed: {ghosts}")
    wrongs += _order(world)
    copies = sum(published.values()) - len(published)
    faults = sum(world.counts.values()) + sum(world.broker.troubles.values())
    # What was read under the old lease may still go out after a fault that the relay has not noticed.
    window = world.config.batch_size * world.config.window * len(log) + world.config.room
    if copies > (0 if world.calm else faults * window):
        wrongs.append(f"I4: {copies} copies after {faults} faults, window {window}")
    if found := sum(process.state.found_by_rescan for process in world.processes):
        wrongs.append(f"the watchdog found {found} rows that the lanes had missed")
    if drained and (left := [process.state.large for process in world.processes if process.state.large]):
        wrongs.append(f"bytes in hand that are not: {left}")
    return wrongs


def _order(world: SimulatedCluster) -> list[str]:
    """I3: of two messages of a key the earlier one comes first; exempt: dead, expired and (pipelined) refused ones.

    And scheduled ones: they get their position when they are due, without the lock that a writer of the key holds.
    """
    pipelined = world.config.order is Order.PIPELINED
    exempt = (world.broker.refused if pipelined else set()) | world.database.expired.keys() | world.once_scheduled
    if world.config.retry.followers is Followers.SKIP:
        exempt = exempt | {number for number, plan in world.broker.plans.items() if len(plan) > 2}
    wrongs = []
    for rows in world.broker.log.values():
        first: dict[bytes, dict[int, int]] = defaultdict(dict)
        for row in rows:
            number = row.id.int
            if row.key is not None and number not in exempt and number not in world.database.letters:
                first[row.key].setdefault(number, row.position)
        for key, seen in first.items():
            order = list(seen.values())
            if order != sorted(order):
                wrongs.append(f"I3: {rows[0].topic}/{key.decode()} arrived as {order}")
    return wrongs


def simulate(seed: int, relay: type[Process] = Process, world: type[SimulatedCluster] | None = None) -> Outcome:
    """Runs one seed from beginning to verdict."""
    here = (world or SimulatedCluster)(seed, relay)
    here.run()
    here.outlive()
    here.heal()
    drained = here.drain()
    counts = here.counts + here.broker.troubles + here.pauses
    counts["published"] = sum(map(len, here.broker.log.values()))
    counts["committed"] = len(here.database.truth)
    counts["fenced off"] = here.database.fenced_off
    return Outcome(seed, verdict(here, drained=drained), counts)


# --- the command line ------------------------------------------------------------------------------------------------


class Talking(Process):
    """Tells every event and what it led to."""

    def step(self, event: Event) -> list[Command]:
        commands = super().step(event)
        if commands or not isinstance(event, Tick):
            after = (self.database.now - _START).total_seconds()
            print(f"{after:8.3f} relay {str(self.id)[-6:]}\n    {event}\n    -> {commands}")  # noqa: T201
        return commands


def main(first: int, last: int | None = None) -> None:
    """Runs one seed and tells its events, or all of a range and tells their rate."""
    if last is None:
        print(simulate(first, Talking))  # noqa: T201
        return
    began, counts = time.process_time(), Counter[str]()
    for seed in range(first, last):
        outcome = simulate(seed)
        counts += outcome.counts
        if outcome.wrongs:
            print(outcome)  # noqa: T201
    rate = (last - first) / (time.process_time() - began)
    print(f"{last - first} seeds, {rate:.0f} per second of processor time: {dict(counts)}")  # noqa: T201


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
