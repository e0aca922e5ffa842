"""The crash sweep: the relay dies at every place that its code declares, another one finishes, nothing is wrong."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import select

import outboxkit
import outboxkit_relay
from outboxkit import _failpoints, migrations, outbox, tables
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ, by_key, first_occurrences, numbers, ordinal
from tests.conftest import PROFILE
from tests.deadlines import DEADLINE
from tests.faults.brokers import on_brokers
from tests.faults.traffic import LARGEST, LEFT, OURS, evidenced, message, open_destination, with_limit
from tests.servers.postgres import create_database, drop_database

POINTS = tuple(name for name in _failpoints.NAMES if re.match(r"(claim|publish|settle|lease|dead)\.", name))
# The short profile sweeps one place of each family, the full one all of them, at the first three hits.
SHORT = ("claim.after_commit", "publish.after_ack", "settle.before_commit", "dead.after_insert")
SWEPT, HITS = (POINTS, (1, 2, 3)) if PROFILE == "full" else (SHORT, (1,))
EVENTS, KEYS = 50, 5
UNDELIVERABLE = 3  # more than there are hits
BATCH, WINDOW = 5, 2
# What a crash may repeat: what is at the broker, and as much again that is acknowledged and being settled.
REPEATED = 2 * WINDOW * BATCH
SIDE_BY_SIDE = 4
KILLED = 137  # by the failpoint; a signal would be negative
# At these places nothing of a first batch is at the broker, and at those a batch is acknowledged and not settled.
NOTHING_SENT = {"claim.before_commit", "claim.after_commit", "publish.before_send"}
NOT_SETTLED = {"publish.after_ack", "settle.before_commit"}
SETTLED = {"settle.after_commit"}


@dataclass(frozen=True)
class Crash:
    """What a killed relay left behind, and what a second one made of it."""

    point: str
    hit: int
    status: int
    copies: int
    settled: int
    wrong: tuple[str, ...]


def test_the_sweep_knows_every_failpoint_of_the_relays_code() -> None:
    """A place that is not declared would never be swept; those of a replay have a sweep of their own."""
    (relay,), (library,) = outboxkit_relay.__path__, outboxkit.__path__
    found = _failpoints_in(relay) | _failpoints_in(library)

    assert found == set(_failpoints.NAMES)
    assert {name for name in _failpoints_in(relay) if not name.startswith("replay.")} == set(POINTS)


def _failpoints_in(folder: str) -> set[str]:
    code = "".join(path.read_text() for path in Path(folder).rglob("*.py"))
    return set(re.findall(r'\bfailpoint\("([^"]+)"\)', code))


@pytest.mark.timeout(1800)
@on_brokers("kafka", "rabbitmq")
def test_a_relay_killed_at_every_failpoint_loses_nothing_and_reorders_nothing(
    postgres: servers.Server,
    broker: servers.Server,
    tmp_path: Path,
    scores: list[str],
) -> None:
    plan = [(point, hit) for hit in HITS for point in SWEPT]
    crash = partial(_crash, postgres, broker, tmp_path)
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        crashes = list(pool.map(crash, plan))

    hit = {found.point for found in crashes if found.status == KILLED}
    copies = [found.copies for found in crashes]
    scores.append(
        f"crash sweep on {broker.name}: hit/swept/declared = {len(hit)}/{len(SWEPT)}/{len(POINTS)}, "
        f"{len(crashes)} kills, {sum(copies) / len(copies):.1f} copies for each, at most {max(copies)}"
    )
    assert hit == set(SWEPT), f"void: never hit {set(SWEPT) - hit}"
    assert [(found.point, found.hit, found.status) for found in crashes if found.status != KILLED] == []
    assert [(found.point, found.hit, found.wrong) for found in crashes if found.wrong] == []
    first = {found.point: found for found in crashes if found.hit == 1}
    assert [point for point in first.keys() & NOTHING_SENT if first[point].copies] == [], "sent before its time"
    assert [point for point in first.keys() & NOT_SETTLED if not first[point].copies] == [], "void: nothing in flight"
    assert [point for point in first.keys() & SETTLED if not first[point].settled] == [], "void: nothing was settled"


def _crash(postgres: servers.Server, broker: servers.Server, folder: Path, plan: tuple[str, int]) -> Crash:
    point, hit = plan
    with _world(postgres, broker, folder / f"{point}-{hit}") as (world, reader, topic):
        written = _write(world, topic)
        victim = world.start("relay", "run", OUTBOXKIT_FAILPOINTS=f"{point}=exit:{hit}")
        status = victim.wait(DEADLINE)
        # What its server sessions had begun is committed or rolled back when they are gone.
        world.until(lambda: world.scalar(f"SELECT count(*) FROM pg_stat_activity WHERE {OURS}") == 0, "it is gone")
        settled = evidenced(world)
        second = world.start("relay", "run", OUTBOXKIT_RELAY__DRAIN="1h")
        world.until(lambda: world.said(second, "relay.joined"), "another one has joined")
        world.until(lambda: world.scalar(LEFT) == 0, f"everything is published after {point}")
        world.stop(second)  # at once: nothing is in flight, and its drain limit is longer than this test waits

        seen = reader.read()
        first = first_occurrences(seen)
        times = Counter(one.id for one in seen)
        copies = {name for name, count in times.items() if count > 1}
        dead = _dead(world)
        wrong = {
            "lost or invented": sorted(numbers(first)) != list(range(EVENTS)),
            "an id of its own": sorted(times) != sorted(written[:EVENTS]),
            "reordered": any(places != sorted(places) for places in by_key(first, ordinal).values()),
            "more than was in flight": len(copies) > REPEATED or max(times.values()) > 2,
            "settled and sent again": not copies.isdisjoint(settled),
            "false evidence": evidenced(world) != set(times),
            "dead letters": dead != Counter(written[EVENTS:]),
        }
        return Crash(point, hit, status, len(copies), len(settled), tuple(name for name, bad in wrong.items() if bad))


@contextmanager
def _world(
    postgres: servers.Server, broker: servers.Server, folder: Path
) -> Iterator[tuple[AcceptanceEnvironment, Kafka | RabbitMQ, str]]:
    """A database and a topic of its own."""
    folder.mkdir()
    url, topic = create_database(postgres.url), f"sweep-{uuid4().hex}"
    world = AcceptanceEnvironment(url, with_limit(broker), folder)
    world.environment["OUTBOXKIT_RELAY__BATCH_SIZE"] = str(BATCH)
    world.environment["OUTBOXKIT_RELAY__WINDOW"] = str(WINDOW)
    world.environment["OUTBOXKIT_RELAY__LEASE"] = "3s"
    try:
        with world.engine.begin() as connection:
            migrations.upgrade(connection)
        yield world, open_destination(broker, topic), topic
    finally:
        world.close()
        drop_database(url)


def _write(world: AcceptanceEnvironment, topic: str) -> list[str]:
    """Fifty events over five keys, and then a few that no broker takes; returns their ids, in this order.

    A refusal comes at once: were these among the first, they would be what the first hits meet.
    """
    good = [message(topic, f"k{number % KEYS}", number, number // KEYS) for number in range(EVENTS)]
    bad = [message(topic, f"bad{number}", number, 0, filler="x" * 2 * LARGEST) for number in range(UNDELIVERABLE)]
    for start in range(0, EVENTS, 10):
        with world.engine.begin() as connection:
            outbox.write(connection, good[start : start + 10])
    with world.engine.begin() as connection:
        outbox.write(connection, bad)
    return [one.id for one in (*good, *bad)]


def _dead(world: AcceptanceEnvironment) -> Counter[str]:
    with world.engine.connect() as connection:
        return Counter(connection.execute(select(tables.dead_letters.c.message_id)).scalars())
