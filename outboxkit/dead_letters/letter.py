"""Letters: what is kept of a message that died, and how letters are found.

The original bytes are kept as they came. What is kept of the failure is ours: the class of the error, the place where
it was raised, and words only of our own errors and of the handler's own verdict; a foreign error's text may quote data.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, func, select, true

from outboxkit import tables
from outboxkit.avro.frames import frame_of, name_of
from outboxkit.errors import CodecError, DecodeError, IncompatibleSchema, OutboxKitError
from outboxkit.headers import from_wire, pack_headers, unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from outboxkit.signals import DeadLetterRequested

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from types import TracebackType

    from sqlalchemy import ColumnElement, Connection

    from outboxkit.brokers import Delivery
    from outboxkit.rows import Row

__all__ = [
    "DeadLetter",
    "Filter",
    "Side",
    "Stage",
    "State",
    "count",
    "find",
    "get",
    "letter_of",
    "of_delivery",
    "of_row",
    "place_of",
    "words_of",
]

_LETTERS: Final = tables.dead_letters
_OTHERS: Final = tuple(
    str(Path(path)) for path in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), Path(__file__).parent)
)


class Side(StrEnum):
    """Who gave up."""

    RELAY = "relay"
    CONSUMER = "consumer"


class State(StrEnum):
    """What became of a letter."""

    DEAD = "dead"
    REPLAYING = "replaying"  #: its outbox row is written, or the relay is asked to bring it back
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class Stage(StrEnum):
    """Where on its way a message failed."""

    PUBLISH = "publish"
    READ = "read"  #: its headers
    ADMIT = "admit"
    DECODE = "decode"
    HANDLER = "handler"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter: the original, the failure, the schema facts. Named as the columns of ``dead_letters``.

    Attributes:
        headers: the original headers, packed (`outboxkit.headers.unpack_headers`).
        error: our own words; never a text of a foreign error, which may quote data.
        fingerprint: the same for letters that have the same cause.
        problems: why the reader's schema cannot read the writer's.
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
    fingerprint: str
    consumer: str = ""
    source: str = ""
    origin: str = ""
    position: int | None = None
    path: str = ""
    byte_offset: int | None = None
    writer_schema: str = ""
    reader_schema: str = ""
    problems: Any = None
    state: State = State.DEAD
    generation: int = 0
    parent_id: UUID | None = None
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
    """Which letters: by stable fields only, never by text. None and empty mean any."""

    state: State | None = State.DEAD
    side: Side | None = None
    consumer: str | None = None
    type: str | None = None
    topic: str | None = None
    key: bytes | None = None
    message_id: str | None = None
    stage: Stage | None = None
    error_class: str | None = None
    fingerprint: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clause(self) -> ColumnElement[bool]:
        """The condition."""
        times = {"since": _LETTERS.c.died_at.__ge__, "until": _LETTERS.c.died_at.__lt__}
        given = {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }
        conditions = [
            times[name](value) if name in times else _LETTERS.c[name] == value for name, value in given.items()
        ]
        return and_(true(), *conditions)


# --- looking -----------------------------------------------------------------------------------------------------


def find(connection: Connection, which: Filter, *, limit: int = 100) -> list[DeadLetter]:
    """Letters, the newest first.

    Transaction: joins the caller's.
    """
    query = select(_LETTERS).where(which.clause()).order_by(_LETTERS.c.died_at.desc(), _LETTERS.c.id).limit(limit)
    return [letter_of(row._asdict()) for row in connection.execute(query)]


def count(connection: Connection, which: Filter) -> int:
    """How many letters `find` would find without a limit.

    Transaction: joins the caller's.
    """
    return connection.execute(select(func.count()).select_from(_LETTERS).where(which.clause())).scalar_one()


def get(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    """One letter, or None.

    Transaction: joins the caller's.
    """
    row = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id)).one_or_none()
    return None if row is None else letter_of(row._asdict())


def letter_of(row: Any) -> DeadLetter:
    """The letter of a row of ``dead_letters``, given as a mapping."""
    enums: dict[str, Callable[[Any], Any]] = {"side": Side, "state": State, "stage": Stage, "failure": Failure}
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(DeadLetter)}
    return DeadLetter(**values | {name: enum(values[name]) for name, enum in enums.items()})


# --- making


def of_row(row: Row, failure: Failure, text: str, attempts: int) -> DeadLetter:
    """The letter of an outbox row that the broker will never take."""
    headers = tuple(unpack_headers(row.headers))
    message = from_wire(row.topic, row.key, headers, row.payload)
    return DeadLetter(
        id=uuid4(),
        side=Side.RELAY,
        topic=row.topic,
        key=row.key,
        message_id=message.id or str(row.id),
        source=message.source,
        type=row.type,
        kind=row.kind,
        headers=row.headers,
        payload=row.payload,
        origin=f"outbox position {row.position}",
        position=row.position,
        failure=failure,
        stage=Stage.PUBLISH,
        error_class=failure.value,
        error=text,
        attempts=attempts,
        fingerprint=_group("", row.type, failure.value, row.topic),
        writer_schema=message.schema,
    )


def of_delivery(
    delivery: Delivery,
    message: Message | None,
    *,
    consumer: str,
    kind: str,
    failure: Failure,
    stage: Stage,
    error: BaseException,
    attempts: int,
) -> DeadLetter:
    """The letter of a delivery that a consumer gave up; ``message`` is None when its headers are unreadable."""
    known = message or Message(id="", type="", topic=delivery.topic, payload=b"")
    error_class = type(error).__qualname__
    return DeadLetter(
        id=uuid4(),
        side=Side.CONSUMER,
        consumer=consumer,
        topic=delivery.topic,
        key=delivery.key,
        message_id=known.id,
        source=known.source,
        type=known.type,
        kind=kind,
        headers=pack_headers(delivery.headers),
        payload=delivery.payload,
        origin=delivery.origin,
        position=delivery.offset,
        failure=failure,
        stage=stage,
        error_class=error_class,
        error=words_of(error),
        path=error.path if isinstance(error, CodecError | IncompatibleSchema) else "",
        byte_offset=error.offset if isinstance(error, CodecError | IncompatibleSchema) else None,
        attempts=attempts,
        fingerprint=_group(consumer, known.type, error_class, place_of(error)),
        writer_schema=known.schema or _writer_of(known),
    )


def _writer_of(message: Message) -> str:
    """The name of the writer's schema, empty when the message names none: an id or GUID of a registry."""
    try:
        return "" if "json" in message.content_type else name_of(frame_of(message))
    except DecodeError:
        return ""


def words_of(error: BaseException) -> str:
    """What may be kept of an error: our own words, or only the class and place of a foreign one."""
    if isinstance(error, OutboxKitError):
        return error.message
    if isinstance(error, DeadLetterRequested):
        return str(error)
    return f"{type(error).__qualname__} at {place_of(error)}"


def place_of(error: BaseException) -> str:
    """Where it was raised: file, line and function of the innermost frame of the application's own code."""
    frames: list[TracebackType] = []
    traceback = error.__traceback__
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    own = [frame for frame in frames if not frame.tb_frame.f_code.co_filename.startswith(_OTHERS)] or frames
    if not own:
        return "unknown place"
    code = own[-1].tb_frame.f_code
    return f"{Path(code.co_filename).name}:{own[-1].tb_lineno} in {code.co_name}"


def _group(consumer: str, type_name: str, error_class: str, place: str) -> str:
    """The fingerprint of a cause: the same for the same error at the same place."""
    return hashlib.sha256(f"{consumer}\0{type_name}\0{error_class}\0{place}".encode()).hexdigest()[:16]
