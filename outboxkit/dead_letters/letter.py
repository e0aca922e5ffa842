"""The dead letter: what is kept of a message that died, and which letters a filter means.

The original bytes are kept as they came. What is kept of the failure is ours (`outboxkit.dead_letters.cause`): a
foreign error's text may quote data.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import and_, true

from outboxkit import tables
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy import ColumnElement

__all__ = ["DeadLetter", "Filter", "Side", "Stage", "State", "letter_of"]

_LETTERS: Final = tables.dead_letters


class Side(StrEnum):
    """The part that gave up."""

    RELAY = "relay"
    CONSUMER = "consumer"


class State(StrEnum):
    """The state of a letter: ``dead → replaying → replayed``, or ``dead → discarded``."""

    DEAD = "dead"
    REPLAYING = "replaying"  #: its outbox row is written, or the relay is asked to bring it back
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class Stage(StrEnum):
    """The step at which a message failed."""

    PUBLISH = "publish"
    READ = "read"  #: its headers
    ADMIT = "admit"
    DECODE = "decode"
    HANDLER = "handler"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter: the original, the failure, the schema facts. Its fields are the columns of ``dead_letters``.

    Attributes:
        headers: the original headers, packed (`outboxkit.headers.unpack_headers`).
        error: our own words; never a text of a foreign error, which may quote data.
        group: names the cause: letters that died of the same one have the same group.
        details: the error's chain and the places of its frames; constraint and table of a database error.
        source_position: orders the letters of one key: the outbox position (relay), the offset (Kafka), or the
            producer's sequence (queues), None when there is none. The letter of a replay inherits it.
        problems: why the reader's schema cannot read the writer's.
        replay_to: the consumer that the running replay is for, where it is not the one that failed.
        replaying_since: when that replay was queued.
    """

    id: UUID
    side: Side
    topic: str
    key: bytes | None
    message_id: str
    type: str
    kind: str
    headers: bytes
    payload: bytes | None
    failure: Failure
    stage: Stage
    error_class: str
    error: str
    attempts: int
    group: str
    consumer: str = ""
    source: str = ""
    origin: str = ""
    source_position: int | None = None
    path: str = ""
    byte_offset: int | None = None
    details: Any = None
    writer_schema: str = ""
    reader_schema: str = ""
    problems: Any = None
    state: State = State.DEAD
    generation: int = 0
    parent_id: UUID | None = None
    replay_to: str | None = None
    replaying_since: datetime | None = None
    first_failed_at: datetime | None = None
    died_at: datetime | None = None
    closed_at: datetime | None = None

    @property
    def message(self) -> Message:
        """The message as its consumer saw it.

        Raises:
            DecodeError: its headers cannot be read.
        """
        return from_wire(self.topic, self.key, unpack_headers(self.headers), self.payload or b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A choice of letters by stable fields, never by text. None means any."""

    state: State | None = State.DEAD
    side: Side | None = None
    consumer: str | None = None
    type: str | None = None
    topic: str | None = None
    key: bytes | None = None
    message_id: str | None = None
    stage: Stage | None = None
    failure: Failure | None = None
    error_class: str | None = None
    group: str | None = None
    source_position: int | None = None
    parent_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clause(self) -> ColumnElement[bool]:
        """Returns the condition on ``dead_letters``; ``since`` and ``until`` bound the time of death."""
        times = {"since": _LETTERS.c.died_at.__ge__, "until": _LETTERS.c.died_at.__lt__}
        given = {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }
        return and_(
            true(),
            *(times[name](value) if name in times else _LETTERS.c[name] == value for name, value in given.items()),
        )


def letter_of(row: Any) -> DeadLetter:
    """Returns the letter of a row of ``dead_letters``, given as a mapping."""
    enums: dict[str, Callable[[Any], Any]] = {"side": Side, "state": State, "stage": Stage, "failure": Failure}
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(DeadLetter)}
    return DeadLetter(**values | {name: enum(values[name]) for name, enum in enums.items()})
