"""Reading by snapshot rounds, in lanes, as a model: the real `Lanes` against a tiny PostgreSQL, every step explored.

State: writers, each one transaction made of the steps of a program; the tables' rows; a reader that takes pages of the
main lane and of catch-up lanes, in any order, while topics are set aside, paused and brought back. Every interleaving
is explored (each state once); at the end the reader goes on until all lanes are one and have nothing left. Then every
committed row must have been delivered exactly once, and rows of a key in position order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from uuid import UUID

import pytest

from outboxkit.rows import Page, Part, Reading, Row
from outboxkit_relay.core.lanes import MAIN, Lane, Lanes
from tests.conftest import PROFILE
from tests.property.relay.database import unseen

SHARDS = frozenset({0})
NOW = datetime(2026, 1, 1, tzinfo=UTC)

# 'x' takes an xid early, 'l' locks the key's row, 'a' inserts for the key in topic a, 'b' for another key in topic b,
# 'c' commits, 'r' rolls back
PROGRAMS = ("lac", "xlac", "laac", "bbc", "lar")


@dataclass(frozen=True, slots=True)
class Model:
    """One state: all of it is compared, so that it is explored once."""

    steps: tuple[str, ...]  # left to do, by writer
    xids: tuple[int, ...]  # 0: none yet
    lock: int = -1
    next_xid: int = 10
    running: frozenset[int] = frozenset()
    completed: int = 9
    position: int = 0
    rows: tuple[tuple[int, int, str, int], ...] = ()  # xid, position, topic, writer, not yet committed
    committed: tuple[tuple[int, int, str], ...] = ()  # xid, position, topic
    main: Lane = field(default_factory=Lane)
    topics: tuple[tuple[str, Lane | None], ...] = ()
    joining: str | None = None
    delivered: tuple[int, ...] = ()
    turns: int = 0

    def lanes(self) -> Lanes:
        return Lanes(SHARDS, self.main, dict(self.topics), self.joining)

    def with_lanes(self, lanes: Lanes, delivered: tuple[int, ...] | None = None) -> Model:
        return replace(
            self,
            main=lanes.main,
            topics=tuple(sorted(lanes.topics.items())),
            joining=lanes.joining,
            delivered=self.delivered if delivered is None else delivered,
        )


def snapshot(model: Model) -> str:
    running = sorted(xid for xid in model.running if xid <= model.completed)
    return f"0:{model.completed + 1}:{','.join(map(str, running))}"


def read(model: Model, reading: Reading) -> Page:
    """A page, as `outboxkit.dialects.postgresql` selects it."""

    def wanted(part: Part, xid: int, topic: str) -> bool:
        return (topic in part.topics) == part.only and (part.seen is None or unseen(part.seen, xid))

    found = [
        Row.of(position, UUID(int=position), topic, b"k" if topic == "a" else None, "", "", b"", b"", NOW, None)
        for xid, position, topic in sorted(model.committed, key=lambda row: row[1])
        if position > reading.last
        and any(wanted(part, xid, topic) for part in reading.parts)
        and (reading.round is None or not unseen(reading.round, xid))
    ]
    return Page(found[: reading.limit], snapshot(model))


def writers(model: Model) -> Iterator[Model]:
    for number, left in enumerate(model.steps):
        if not left or (left[0] == "l" and model.lock >= 0):
            continue
        step, xid = left[0], model.xids[number]
        steps = (*model.steps[:number], left[1:], *model.steps[number + 1 :])
        if not xid:  # the first write draws the xid, as a step of its own
            xids = (*model.xids[:number], model.next_xid, *model.xids[number + 1 :])
            drawn = replace(model, xids=xids, next_xid=model.next_xid + 1, running=model.running | {model.next_xid})
            yield replace(drawn, steps=steps) if step == "x" else drawn
        elif step == "l":
            yield replace(model, steps=steps, lock=number)
        elif step in "ab":
            row = (xid, model.position + 1, step, number)
            yield replace(model, steps=steps, position=model.position + 1, rows=(*model.rows, row))
        else:
            mine = tuple(row[:3] for row in model.rows if row[3] == number)
            yield replace(
                model,
                steps=steps,
                lock=-1 if model.lock == number else model.lock,
                running=model.running - {xid},
                completed=max(model.completed, xid),
                rows=tuple(row for row in model.rows if row[3] != number),
                committed=model.committed + (mine if step == "c" else ()),
            )


def scans(lanes: Lanes, name: str) -> bool:
    read = [lanes.main if name == MAIN else lanes.topics[name]]
    if name == MAIN and lanes.joining is not None:
        read.append(lanes.topics[lanes.joining])
    return any(lane is None or lane.seen is None for lane in read)


def deliver(model: Model, name: str, limit: int, *, separate: str | None = None) -> Model:
    """A page of a lane is read; afterwards a topic may be full and go on in a lane of its own."""
    lanes = model.lanes()
    page = read(model, lanes.reading(name, limit))
    held = model.delivered if scans(lanes, name) else ()  # a scan finds what is in hand, too; a memory must not
    lanes.advance(name, page, limit)
    rows = [row for row in page.rows if row.position not in held and lanes.reads(row.topic)]
    if separate is not None:
        lanes.separate(separate)
    return model.with_lanes(lanes, (*model.delivered, *(row.position for row in rows)))


def readers(model: Model, limit: int, turns: int) -> Iterator[Model]:
    if model.turns >= turns:
        return
    model = replace(model, turns=model.turns + 1)
    yield deliver(model, MAIN, limit)
    yield deliver(model, MAIN, limit, separate="a")
    for topic, lane in model.topics:
        if lane is None:
            lanes = model.lanes()
            lanes.resume_reading(topic)
            yield model.with_lanes(lanes)
        elif not lane.is_through:
            yield deliver(model, topic, limit)
    # Unavailability: the topic is not read for a while. What was delivered of it counts as settled here.
    lanes = model.lanes()
    lanes.stop_reading("a")
    yield model.with_lanes(lanes)


def finish(model: Model, limit: int) -> Model:
    """All writers have ended: every lane comes home."""
    for _ in range(100):
        lanes = model.lanes()
        for topic in list(lanes.topics):
            lanes.resume_reading(topic)
        model = model.with_lanes(lanes)
        behind = next((topic for topic, lane in model.topics if lane is not None and not lane.is_through), MAIN)
        before, at_rest = model.delivered, model.main.is_through and not model.topics
        model = deliver(model, behind, limit)
        if at_rest and model.main.is_through and model.delivered == before:
            return model
    raise AssertionError("the lanes do not come together")


def verdict(model: Model) -> str:
    delivered = list(model.delivered)
    committed = sorted(position for _, position, _ in model.committed)
    if sorted(delivered) != committed:
        return f"lost or doubled: committed {committed}, delivered {delivered}"
    of_key = [position for position in delivered if position in {p for _, p, topic in model.committed if topic == "a"}]
    return "" if of_key == sorted(of_key) else f"order: {of_key}"


def explore(programs: tuple[str, ...], limit: int, turns: int) -> tuple[int, list[str]]:
    """Every interleaving; returns how many states there are, and what is wrong."""
    seen, wrongs = set[Model](), []
    stack = [Model(steps=programs, xids=(0,) * len(programs))]
    while stack:
        model = stack.pop()
        if model in seen:
            continue
        seen.add(model)
        if not any(model.steps) and (wrong := verdict(finish(model, limit))):
            wrongs.append(f"{wrong} after {model}")
        stack.extend(writers(model))
        stack.extend(readers(model, limit, turns))
    return len(seen), wrongs


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("programs", list(itertools.combinations_with_replacement(PROGRAMS, 2)), ids="-".join)
def test_two_writers_and_every_interleaving(programs: tuple[str, ...], limit: int) -> None:
    states, wrongs = explore(programs, limit, turns=5 if PROFILE == "full" else 3)

    assert not wrongs, wrongs[0]
    assert states > 100


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("programs", list(itertools.combinations_with_replacement(PROGRAMS, 3)), ids="-".join)
def test_three_writers_and_every_interleaving(programs: tuple[str, ...]) -> None:
    _, wrongs = explore(programs, limit=1, turns=3)

    assert not wrongs, wrongs[0]
