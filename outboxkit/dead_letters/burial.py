"""Burial: a letter is made of what failed, stored with the message's end, and closed when its replay has ended."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, case, func, select, update

from outboxkit import inbox, tables
from outboxkit._sql import database_now
from outboxkit.avro.frames import frame_of, name_of
from outboxkit.dead_letters import cause
from outboxkit.dead_letters.letter import DeadLetter, Side, Stage, State, letter_of
from outboxkit.errors import CodecError, DecodeError, IncompatibleSchema
from outboxkit.headers import LETTER, from_wire, pack_headers, unpack_headers
from outboxkit.message import Message, content_hash
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import Connection

    from outboxkit.brokers import Delivery
    from outboxkit.rows import Row

__all__ = ["bury", "mark_replayed", "of_delivery", "of_row", "store"]

_ERROR_LENGTH: Final = 2_000
_LETTERS: Final = tables.dead_letters


def bury(connection: Connection, letter: DeadLetter) -> DeadLetter | None:
    """Stores a dead letter; None when the message needs none: its effect is committed, or it is dead already.

    Transaction: joins the caller's, which also settles the message; must be committed before the broker is told.
    Guarantee: from the commit on, redeliveries of a consumer's dead message have no effect until it is replayed.

    Writes: ``dead_letters``, ``inbox_messages``. Index used: the primary key.
    """
    headers = _readable(letter.headers)
    parent = _replayed(connection, letter.consumer, letter.topic, headers=headers, payload=letter.payload)
    if not _block(connection, letter):
        return None
    if parent is not None:
        _close(connection, parent.id, State.REPLAYED)
        letter = replace(letter, parent_id=parent.id, generation=parent.generation + 1)
        if parent.side is Side.CONSUMER:
            letter = replace(letter, source_position=parent.source_position)
    store(connection, letter)
    return letter


def mark_replayed(connection: Connection, consumer: str, message: Message) -> None:
    """Closes the letter whose replay this consumer has handled: the one whose id the message carries.

    A header alone closes nothing: the letter must be under way to this consumer, with this topic and payload.

    Transaction: joins the handler's: the letter is replayed if and only if the effect is committed.
    """
    letter = _replayed(connection, consumer, message.topic, headers=message.headers, payload=message.payload)
    if letter is not None:
        _close(connection, letter.id, State.REPLAYED)


def store(connection: Connection, letter: DeadLetter) -> None:
    """Inserts a letter as it is.

    Transaction: joins the caller's; does not commit. Writes: ``dead_letters``.
    """
    values = {field.name: getattr(letter, field.name) for field in fields(letter)}
    # PostgreSQL's text takes no NUL, and foreign headers may hold one; the headers' own bytes are kept as they are.
    clean = {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in values.items()}
    clean["error"] = clean["error"][:_ERROR_LENGTH]
    clean["message_id"] = clean["message_id"] if _fits(clean["message_id"]) else ""  # the headers keep it
    connection.execute(_LETTERS.insert().values({name: value for name, value in clean.items() if value is not None}))


def of_row(row: Row, failure: Failure, text: str, attempts: int) -> DeadLetter:
    """Makes the letter of an outbox row that the broker will never take, also of one whose headers are unreadable."""
    try:
        message = from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)
    except DecodeError:
        message = Message(id=str(row.id), type=row.type, topic=row.topic, payload=row.payload)
    return DeadLetter(
        id=uuid4(),
        side=Side.RELAY,
        topic=row.topic,
        key=row.key,
        message_id=message.id if message.id and _fits(message.id) else str(row.id),
        source=message.source,
        type=row.type,
        kind=row.kind,
        headers=row.headers,
        payload=row.payload,
        origin=f"outbox position {row.position}",
        source_position=row.position,
        failure=failure,
        stage=Stage.PUBLISH,
        error_class=failure.value,
        error=text,
        attempts=attempts,
        group=cause.group_of(failure.value, row.type, "", row.topic),
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
    keep_error_text: bool = False,
) -> DeadLetter:
    """Makes the letter of a delivery that a consumer gave up; ``message`` is None when its headers are unreadable."""
    known = message or Message(id="", type="", topic=delivery.topic, payload=b"")
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
        source_position=known.sequence if delivery.offset is None else delivery.offset,
        failure=failure,
        stage=stage,
        error_class=type(error).__qualname__,
        error=cause.words_of(error),
        path=error.path if isinstance(error, CodecError | IncompatibleSchema) else "",
        byte_offset=error.offset if isinstance(error, CodecError | IncompatibleSchema) else None,
        details=cause.details_of(error, keep_text=keep_error_text),
        attempts=attempts,
        group=cause.group_of(failure.value, stage.value, cause.kind_of(error), known.type, consumer, delivery.topic),
        writer_schema=known.schema or _writer_of(known),
    )


def _fits(message_id: str) -> bool:
    """Whether an id can be looked up: an index entry has no room for more."""
    return len(message_id.encode("utf-8", "replace")) <= inbox.MAX_ID_BYTES


def _writer_of(message: Message) -> str:
    """Returns the name of the writer's schema, an id or GUID of a registry; empty when the message names none."""
    try:
        return "" if "json" in message.content_type else name_of(frame_of(message))
    except DecodeError:
        return ""


def _replayed(
    connection: Connection, consumer: str, topic: str, *, headers: Iterable[tuple[str, bytes]], payload: bytes | None
) -> DeadLetter | None:
    """Finds the letter that this message replays; a number alone proves nothing: anybody can send one."""
    number = next((_uuid(value) for name, value in headers if name == LETTER), None)
    if number is None:
        return None
    receiver = func.coalesce(_LETTERS.c.replay_to, _LETTERS.c.consumer)
    # The relay's own are closed when they are sent: it has no word with those who receive them.
    is_under_way = case((_LETTERS.c.side == Side.RELAY, State.REPLAYED), else_=State.REPLAYING) == _LETTERS.c.state
    this = and_(_LETTERS.c.id == number, is_under_way, receiver == consumer, _LETTERS.c.topic == topic)
    found = connection.execute(select(_LETTERS).where(this)).one_or_none()
    if found is None or bytes(found.payload or b"") != (payload or b""):
        return None
    return letter_of(found._asdict())


def _readable(headers: bytes) -> list[tuple[str, bytes]]:
    """The headers; none when somebody else has packed them."""
    try:
        return unpack_headers(headers)
    except DecodeError:
        return []


def _uuid(value: bytes) -> UUID | None:
    try:
        return UUID(value.decode("ascii"))
    except ValueError:
        return None


def _block(connection: Connection, letter: DeadLetter) -> bool:
    # A conflict's id belongs to another message, and without an id nothing can be recognised.
    if letter.side is Side.RELAY or not letter.message_id or letter.failure is Failure.CONFLICT:
        return True
    digest = content_hash(letter.message)
    return inbox.block(connection, letter.consumer, source=letter.source, message_id=letter.message_id, digest=digest)


def _close(connection: Connection, letter_id: UUID, state: State) -> None:
    values: dict[str, Any] = {"state": state, "closed_at": database_now()}
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter_id).values(values))
