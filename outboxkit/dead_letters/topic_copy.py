"""Copies: a dead letter as a message on a topic, for the tools and alarms that people have there already.

The letter in the database is the truth: it is the one that is replayed. A copy is written to the outbox in the same
transaction, with the original key, payload and headers, and headers that say what happened, in the words of
Spring Kafka, Kafka Connect, or our own. Nobody else has names for what broke in a schema, so those are always ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from outboxkit import outbox
from outboxkit.avro.frames import frame_of, name_of
from outboxkit.avro.model.parse import parse
from outboxkit.brokers import Delivery
from outboxkit.dead_letters.letter import DeadLetter, Stage
from outboxkit.errors import ConfigurationError, DecodeError, SchemaError
from outboxkit.headers import LETTER, REPLAY_FOR, format_instant, from_wire, pack_headers
from outboxkit.message import Headers, Kind

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["DeadLetterTopic", "Style", "headers_of", "write"]

_OURS: Final = "outboxkit-dlq-"
_SCHEMA: Final = "outboxkit-schema-"
_SPRING: Final = "kafka_dlt-"
_CONNECT: Final = "__connect.errors."
_AGAIN: Final = (REPLAY_FOR, LETTER, "outboxkit-attempt", "ce_sequence", "ce_recordedtime")  # the relay adds new ones
_ENVELOPE: Final = ("ce_", "cloudevents")
_MAX_BYTES: Final = 4_000  # of the problems and of an error: headers count against the size of a message
_DECODING: Final = (Stage.READ, Stage.DECODE)


class Style(StrEnum):
    """Products whose header names a copy may have."""

    OUTBOXKIT = "outboxkit"
    SPRING = "spring"
    CONNECT = "connect"


@dataclass(frozen=True, slots=True)
class DeadLetterTopic:
    """Topic to which a consumer's dead letters are copied.

    Attributes:
        topic: the topic, which must exist; ``{topic}`` and ``{consumer}`` stand for where the message came from and
            who gave it up.
        style: whose header names.

    Raises:
        ConfigurationError: no topic, a topic with other braces, or an unknown style.
    """

    topic: str = "{topic}.{consumer}.dlq"
    style: str = Style.OUTBOXKIT

    def __post_init__(self) -> None:
        try:
            named = self.topic.format(topic="t", consumer="c")
        except (LookupError, ValueError) as error:
            raise ConfigurationError(f"the topic {self.topic!r} may hold {{topic}} and {{consumer}} only") from error
        if not named or self.style not in {*Style}:
            styles = ", ".join(Style)
            raise ConfigurationError(f"copies need a topic and a style of {styles}, got {named!r} and {self.style!r}")


def write(
    connection: Connection, letter: DeadLetter, delivery: Delivery, copy_to: DeadLetterTopic, *, writer: str = ""
) -> None:
    """Writes the copy of a letter to the outbox.

    Transaction: joins the one that stores the letter; does not commit.
    Guarantee: letter and copy commit together; the copy is published at least once, and keeps the message's id.

    Args:
        connection: the caller's.
        letter: as it was stored.
        delivery: what died.
        copy_to: where to and how.
        writer: text of the writer's schema, when it is known.
    """
    facts = headers_of(letter, delivery, Style(copy_to.style), writer=writer)
    kept = tuple(header for header in delivery.headers if not _is_replaced(header[0], copy_to.style))
    try:
        from_wire(letter.topic, letter.key, kept, b"")
    except DecodeError:  # the envelope is what is broken; the letter in the database has it byte for byte
        kept = tuple(header for header in kept if not header[0].lower().startswith(_ENVELOPE))
    copy = replace(
        letter,
        message_id=letter.message_id or str(letter.id),
        topic=copy_to.topic.format(topic=letter.topic, consumer=letter.consumer),
        kind=Kind.EVENT.value,
        headers=pack_headers((*kept, *facts)),
    )
    outbox.rewrite(connection, [copy])


def headers_of(letter: DeadLetter, delivery: Delivery, style: Style, *, writer: str = "") -> Headers:
    """Headers of a copy besides the original ones."""
    said = {Style.OUTBOXKIT: _our_words, Style.SPRING: _springs_words, Style.CONNECT: _connects_words}[style]
    ours = [(f"{_OURS}id", str(letter.id).encode())] if style is not Style.OUTBOXKIT else []
    return (*said(letter, delivery), *ours, *_schema_facts(letter, delivery, writer))


def _is_replaced(name: str, style: str) -> bool:
    """Whether an earlier header gives way. Spring keeps the origins of all hops, and only the last exception."""
    ours = name in _AGAIN or name.startswith((_OURS, _SCHEMA))
    return ours or (style == Style.SPRING and name.startswith(f"{_SPRING}exception-"))


def _our_words(letter: DeadLetter, delivery: Delivery) -> Iterator[tuple[str, bytes]]:
    yield from _texts(
        _OURS,
        {
            "id": letter.id,
            "consumer": letter.consumer,
            "topic": letter.topic,
            "partition": delivery.partition,
            "offset": delivery.offset,
            "origin": letter.origin,
            "failure": letter.failure.value,
            "stage": letter.stage.value,
            "error-class": letter.error_class,
            "error": letter.error,
            "attempts": letter.attempts,
            "first-failed-at": letter.first_failed_at and format_instant(letter.first_failed_at),
            "generation": letter.generation,
            "cause": letter.group,
        },
    )


def _springs_words(letter: DeadLetter, delivery: Delivery) -> Iterator[tuple[str, bytes]]:
    yield f"{_SPRING}original-topic", letter.topic.encode()
    if delivery.partition is not None and delivery.offset is not None:
        yield f"{_SPRING}original-partition", delivery.partition.to_bytes(4, "big")
        yield f"{_SPRING}original-offset", delivery.offset.to_bytes(8, "big", signed=True)
    if (occurred := _occurred(letter)) is not None:
        yield f"{_SPRING}original-timestamp", int(occurred.timestamp() * 1000).to_bytes(8, "big", signed=True)
        yield f"{_SPRING}original-timestamp-type", b"CREATE_TIME"
    yield f"{_SPRING}original-consumer-group", letter.consumer.encode()
    yield from _texts(_SPRING, {"exception-fqcn": letter.error_class, "exception-message": letter.error})


def _connects_words(letter: DeadLetter, delivery: Delivery) -> Iterator[tuple[str, bytes]]:
    yield from _texts(
        _CONNECT,
        {
            "topic": letter.topic,
            "partition": delivery.partition,
            "offset": delivery.offset,
            "connector.name": letter.consumer,
            "task.id": 0,
            "stage": "VALUE_CONVERTER" if letter.stage in _DECODING else "TASK_PUT",
            "class.name": "outboxkit.Consumer",
            "exception.class.name": letter.error_class,
            "exception.message": letter.error,
        },
    )


def _schema_facts(letter: DeadLetter, delivery: Delivery, writer: str) -> Iterator[tuple[str, bytes]]:
    kind, registered = _frame(delivery)
    failed = letter.stage in _DECODING
    yield from _texts(
        _SCHEMA,
        {
            "frame": kind,
            "writer-id": registered,
            "writer-fingerprint": letter.writer_schema if letter.writer_schema != registered else "",
            "reader-fingerprint": letter.reader_schema,
            "subject": _subject(writer),
            "stage": letter.stage.value if failed and kind else "",
            "path": letter.path if failed else "",
            "byte-offset": letter.byte_offset if failed else None,
            "problems": _capped(letter.problems),
        },
    )


def _subject(writer: str) -> str:
    try:
        return parse(writer, lenient=True).name if writer else ""
    except SchemaError:
        return ""


def _frame(delivery: Delivery) -> tuple[str, str]:
    """The kind of a message's frame, and the id or GUID that a registry gave to its schema."""
    try:
        message = from_wire(delivery.topic, delivery.key, delivery.headers, delivery.payload or b"")
        frame = None if "json" in message.content_type else frame_of(message)
    except DecodeError:
        frame = None
    if frame is None:
        return "", ""
    return frame.kind.value, name_of(frame) if frame.fingerprint is None else ""


def _occurred(letter: DeadLetter) -> datetime | None:
    try:
        return letter.message.occurred_at
    except DecodeError:
        return None


def _capped(problems: list[object] | None) -> str:
    """As many problems as a header should carry, as JSON."""
    some = list(problems or ())
    while len(json.dumps(some).encode()) > _MAX_BYTES:
        some.pop()
    return json.dumps(some) if some else ""


def _texts(prefix: str, facts: dict[str, object]) -> Iterator[tuple[str, bytes]]:
    for name, fact in facts.items():
        if fact is not None and fact != "":
            yield prefix + name, str(fact).encode("utf-8", "replace")[:_MAX_BYTES]
