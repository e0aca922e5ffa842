"""Stored rows as values: what a relay reads, page by page, and the proof of what became of them. Pure.

SQL is in `outboxkit.outbox` and `outboxkit.dialects`; the relay's core sees only these.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final, NamedTuple, Self
from uuid import UUID

__all__ = [
    "BEFORE_ALL",
    "LARGE",
    "NOTHING_PAUSED",
    "NO_ID",
    "UNREADABLE",
    "CutOff",
    "Dependency",
    "Evidence",
    "NoText",
    "Page",
    "Part",
    "PauseSet",
    "Reading",
    "Request",
    "Row",
    "StopReason",
    "WaitReason",
    "exact",
    "microseconds",
    "shard_of",
]

LARGE: Final = 4096  #: bytes; payloads above are counted by their size, all others by their number
BEFORE_ALL: Final = -(2**63)  #: below every position, those of rows that others have inserted, too
UNREADABLE: Final = -(2**62)  #: stands for an instant outside of the years 1 to 9999: no clock ever shows it
NO_ID: Final = bytes(16)  #: stands for an id that is no UUID, in a row whose time is `UNREADABLE`
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Dependency(StrEnum):
    """Systems that a consumer cannot do without."""

    BROKER = "broker"
    DATABASE = "database"
    REGISTRY = "registry"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOff:
    """Why a run of a consumer gets no messages, or cannot handle them, in ``inbox_consumers.trouble``.

    Attributes:
        of: what does not answer.
        since: when that began, by this machine's clock.
        reason: in the client's words, without secrets.
        is_new: the run has only just started, and waits for its first partitions or queues.
    """

    of: Dependency
    since: datetime
    reason: str = ""
    is_new: bool = False

    def to_text(self) -> str:
        """The form in which a run keeps it beside its heartbeat."""
        return json.dumps(asdict(self) | {"since": self.since.isoformat()})

    @classmethod
    def from_text(cls, text: str | None, since: datetime) -> Self | None:
        """The inverse of `to_text`; of what another version wrote, the text is the reason."""
        if not text:
            return None
        try:
            found = json.loads(text)
            began = datetime.fromisoformat(found["since"])
            return cls(**{**found, "of": Dependency(found["of"]), "since": began})
        except (ValueError, TypeError, KeyError):
            return cls(of=Dependency.BROKER, since=since, reason=text)


class WaitReason(StrEnum):
    """Why a message waits, in ``outbox_waiting.reason``."""

    RETRY = "retry"  #: a failed head, until its next try
    FOLLOWER = "follower"  #: behind the head of its key
    SCHEDULED = "scheduled"  #: for its instant
    PARKED = "parked"  #: of a consumer: it is dead, and its key waits for an operator


class StopReason(StrEnum):
    """Why a key is stopped, in ``outbox_stopped_keys.reason``."""

    RETRY = "retry"  #: its head waits for the next try
    PARKED = "parked"  #: its head is dead; an operator decides on the followers


class Request(StrEnum):
    """Requests for a stopped key, in ``outbox_stopped_keys.request``."""

    RELEASE = "release"  #: try the waiting head at once; behind a dead head the followers go on
    SKIP = "skip"  #: a waiting head becomes a dead letter; the followers go on
    REPAIR = "repair"  #: the dead head that is being replayed returns to its old position


class NoText(str):
    """Stored bytes that are no text, made readable: good to be shown, never to be sent, for others look the same."""

    __slots__ = ("fault",)
    fault: UnicodeDecodeError

    def __new__(cls, fault: UnicodeDecodeError) -> Self:
        """Made of what decoding them raised."""
        made = super().__new__(cls, fault.object.decode(errors="replace"))
        made.fault = fault
        return made


def exact(text: str) -> str:
    """The text as it is stored.

    Raises:
        UnicodeDecodeError: it is none.
    """
    if isinstance(text, NoText):
        raise text.fault
    return text


class Row(NamedTuple):
    """One stored outbox row as a relay reads it: raw values, because this is the hot path.

    It is a tuple of what the driver returns: making a UUID and a datetime of every row would cost more than all else
    that is done to it. `of` makes one from decoded values.
    """

    position: int
    raw_id: bytes
    topic: str
    key: bytes | None
    type: str
    kind: str
    payload: bytes
    headers: bytes
    recorded_us: int  # microseconds since 1970
    expires_us: int | None
    attempts: int = 0
    waiting_id: int | None = None  # set when it comes from outbox_waiting
    size: int = 0  # bytes of its payload, when the page has left that out at first

    @classmethod
    def of(  # noqa: PLR0917  the columns in their order
        cls,
        position: int,
        id: UUID,  # noqa: A002
        topic: str,
        key: bytes | None,
        type: str,  # noqa: A002
        kind: str,
        payload: bytes,
        headers: bytes,
        recorded_at: datetime,
        expires_at: datetime | None,
        attempts: int = 0,
        waiting_id: int | None = None,
    ) -> Row:
        """A row of decoded values, in the same order."""
        expires_us = None if expires_at is None else microseconds(expires_at)
        sent = (topic, key, type, kind, payload, headers)
        return cls(position, id.bytes, *sent, microseconds(recorded_at), expires_us, attempts, waiting_id)

    @classmethod
    def stored(  # noqa: PLR0917  the columns in their order
        cls,
        position: int,
        id: UUID,  # noqa: A002
        topic: str,
        key: bytes | None,
        type: str,  # noqa: A002
        kind: str,
        payload: bytes,
        headers: bytes,
        recorded_us: int,
        expires_us: int | None,
        attempts: int = 0,
        waiting_id: int | None = None,
    ) -> Row:
        """A row of columns as SQLAlchemy returns them, in the same order; instants are numbers already."""
        sent = (topic, key, type, kind, payload, headers)
        return cls(position, id.bytes, *sent, recorded_us, expires_us, attempts, waiting_id)

    @property
    def id(self) -> UUID:
        """The message's id."""
        return UUID(bytes=self.raw_id)

    @property
    def recorded_at(self) -> datetime:
        """When the row was inserted, by the database's clock."""
        return _EPOCH + timedelta(microseconds=self.recorded_us)

    @property
    def expires_at(self) -> datetime | None:
        """When it is no longer worth delivering."""
        return None if self.expires_us is None else _EPOCH + timedelta(microseconds=self.expires_us)


def microseconds(instant: datetime) -> int:
    """Microseconds since 1970."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


def shard_of(topic: str, key: bytes | None, message_id: UUID, shards: int) -> int:
    """The shard of a message: the first two bytes of SHA-256 over (topic, NUL, key), modulo the number of shards.

    A message without a key has no order to keep and is spread by its id.
    """
    digest = hashlib.sha256(topic.encode() + b"\0" + (message_id.bytes if key is None else key)).digest()
    return int.from_bytes(digest[:2], "big") % shards


@dataclass(frozen=True, slots=True)
class Part:
    """Topics with one memory.

    Attributes:
        topics: these topics, or all but these.
        only: which of the two.
        seen: what a snapshot saw is left out; None leaves nothing out.
    """

    topics: frozenset[str]
    only: bool
    seen: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One page that a relay wants: rows that the parts' snapshots did not see.

    Attributes:
        shards: the shards it owns.
        parts: one or two.
        round: snapshot of the round's first page: what it did not see belongs to the next round; None on that page.
        last: only positions above.
        limit: at most so many rows.
        max_bytes: no more large payloads than fit in so many bytes, but one: a page has a size, whatever is in it.
        missed: the complement instead: rows that are present although the snapshots saw them.
        blind: only positions are told, all else is a placeholder: for a row that cannot be read.
    """

    shards: frozenset[int]
    parts: tuple[Part, ...]
    round: str | None = None
    last: int = BEFORE_ALL
    limit: int
    max_bytes: int = 16 << 20
    missed: bool = False
    blind: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Result of a read.

    Attributes:
        rows: in position order.
        snapshot: what this statement could see; told also when there are no rows.
        large: the payloads above `LARGE` bytes: their sizes by position.
        cut: the page ends here although more was asked for and may be there.
    """

    rows: list[Row]
    snapshot: str
    large: Mapping[int, int] = field(default_factory=dict)
    cut: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Evidence of a published batch, for the ledger.

    Attributes:
        topic: the destination.
        outcome: ``published`` or ``expired``.
        rows: the rows, in order.
        partitions: where the broker put each, -1 when it does not tell.
        offsets: likewise.
    """

    topic: str
    outcome: str
    rows: Sequence[Row]
    partitions: Sequence[int]
    offsets: Sequence[int]


@dataclass(frozen=True, slots=True)
class PauseSet:
    """All pauses in force, as relays ask them.

    Attributes:
        destinations: topics and queues of which nothing is read.
        types: event types that wait.
        keys: (destination, key) that wait.
    """

    destinations: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()
    keys: frozenset[tuple[str, bytes]] = frozenset()

    @property
    def single_out(self) -> bool:
        """Whether single messages must be looked at."""
        return bool(self.types or self.keys)

    def covers(self, row: Row) -> bool:
        """Whether the message itself is paused."""
        return row.type in self.types or (row.topic, row.key) in self.keys


NOTHING_PAUSED: Final = PauseSet()
