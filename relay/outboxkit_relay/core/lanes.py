"""Lanes: the memory of what has been read, and the next read. Pure.

A lane is a set of topics that is read together; its memory is one snapshot. The *main* lane serves all healthy topics.
A topic leaves it when its destination is in trouble (then nothing of it is read) or full (then it goes on at its own
pace, with the main lane's memory). It comes back as a *catch-up* lane and joins the main lane when it has no pages
left: one round with both memories, after which one snapshot serves for both.

Forgetting a lane is always safe: it costs one scan, and what a scan finds again is dropped by who still holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

from outboxkit.rows import BEFORE_ALL, Page, Part, Reading

__all__ = ["MAIN", "Lane", "Lanes"]

MAIN: Final = ""  #: name of the main lane; a catch-up lane has the name of its topic


@dataclass(frozen=True, slots=True)
class Lane:
    """The memory of one lane.

    Attributes:
        seen: the snapshot of its last complete round; None when it must scan everything.
        round: the snapshot of the round under way, None between rounds.
        last: the position up to which the round under way has come.
    """

    seen: str | None = None
    round: str | None = None
    last: int = BEFORE_ALL

    @property
    def has_scanned(self) -> bool:
        """Whether everything that was present when it began has been read."""
        return self.seen is not None

    @property
    def is_through(self) -> bool:
        """Whether it has no pages left."""
        return self.seen is not None and self.round is None

    def after(self, page: Page, limit: int) -> Lane:
        """The memory after a page. A page shorter than the limit ends the round, unless its bytes cut it."""
        snapshot = self.round or page.snapshot
        if len(page.rows) < limit and not page.cut:
            return Lane(seen=snapshot)
        return replace(self, round=snapshot, last=page.rows[-1].position if page.rows else self.last)


@dataclass(slots=True)
class Lanes:
    """All lanes of a relay.

    Attributes:
        shards: the owned ones; every lane covers all of them.
        main: reads every topic that is not in `topics`.
        topics: topics outside the main lane: a lane of their own, or None when they are not read.
        joining: the topic whose lane takes part in the main lane's round under way.
    """

    shards: frozenset[int] = frozenset()
    main: Lane = Lane()
    topics: dict[str, Lane | None] = field(default_factory=dict)
    joining: str | None = None

    @property
    def not_scanned(self) -> frozenset[str]:
        """Topics outside the main lane that are not read, or of which an old message may not have been read yet."""
        return frozenset(topic for topic, lane in self.topics.items() if lane is None or not lane.has_scanned)

    def own(self, shards: frozenset[int]) -> None:
        """Notes the owned shards. New ones need a scan; a lost one is just not read any more."""
        gained = shards - self.shards
        self.shards = shards
        if gained:
            self.forget()

    def forget(self) -> None:
        """Scans everything again; topics that are not read stay out."""
        self.main, self.joining = Lane(), None
        self.topics = {topic: None if lane is None else Lane() for topic, lane in self.topics.items()}

    def stop_reading(self, topic: str) -> None:
        """Stops reading a topic and forgets its memory."""
        if self.joining == topic:
            self.joining = None
        self.topics[topic] = None

    def separate(self, topic: str) -> None:
        """Gives a topic a lane of its own, with the memory of the lane it was in: nothing is read twice."""
        if self.joining == topic:
            own = self.topics[topic]
            assert own is not None  # noqa: S101  only a lane that is through joins
            self.topics[topic], self.joining = replace(self.main, seen=own.seen), None
        elif topic not in self.topics:
            self.topics[topic] = self.main

    def resume_reading(self, topic: str) -> None:
        """Reads a topic again, beginning with a scan."""
        if topic in self.topics and self.topics[topic] is None:
            self.topics[topic] = Lane()

    def reading(self, name: str, limit: int) -> Reading:
        """The next read of a lane. A new round of the main lane also merges one catch-up topic without pages left."""
        if name != MAIN:
            lane = self.topics[name]
            assert lane is not None  # noqa: S101  the caller asks for lanes that are read
            alone = Part(frozenset({name}), only=True, seen=lane.seen)
            return Reading(shards=self.shards, parts=(alone,), round=lane.round, last=lane.last, limit=limit)
        if self.main.round is None and self.main.seen is not None:
            self.joining = next(
                (topic for topic, lane in self.topics.items() if lane is not None and lane.is_through), None
            )
        parts: tuple[Part, ...] = (Part(frozenset(self.topics), only=False, seen=self.main.seen),)
        if self.joining is not None and (lane := self.topics[self.joining]) is not None:
            parts = (*parts, Part(frozenset({self.joining}), only=True, seen=lane.seen))
        return Reading(shards=self.shards, parts=parts, round=self.main.round, last=self.main.last, limit=limit)

    def memory(self, limit: int) -> Reading:
        """The main lane alone, between rounds."""
        part = Part(frozenset(self.topics), only=False, seen=self.main.seen)
        return Reading(shards=self.shards, parts=(part,), limit=limit)

    def advance(self, name: str, page: Page, limit: int) -> None:
        """Notes a page of a lane."""
        if name != MAIN:
            lane = self.topics.get(name)
            if lane is not None:
                self.topics[name] = lane.after(page, limit)
            return
        self.main = self.main.after(page, limit)
        if self.main.round is None and self.joining is not None:
            del self.topics[self.joining]
            self.joining = None

    def reads(self, topic: str) -> bool:
        """Whether rows of the topic are read."""
        return self.topics.get(topic, self.main) is not None
