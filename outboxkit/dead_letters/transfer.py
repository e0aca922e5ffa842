"""Transfer: letters as plain records, byte for byte, and letters made of what other tools have dead-lettered.

Read are the headers of Spring Kafka, of Kafka Connect, and of RabbitMQ (``x-first-death-…``). Texts of foreign errors
are left behind, because they may quote data; their classes are kept.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from outboxkit.dead_letters import cause
from outboxkit.dead_letters.letter import DeadLetter, Side, Stage, letter_of
from outboxkit.errors import DecodeError, ReplayError
from outboxkit.headers import from_wire, pack_headers
from outboxkit.message import Kind
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.brokers import Delivery
    from outboxkit.message import Headers

__all__ = ["as_record", "from_record", "of_foreign"]

_SPRING: Final = "kafka_dlt-"
_CONNECT: Final = "__connect.errors."
_RABBITMQ: Final = "x-first-death-"
_FOREIGN: Final = (_SPRING, _CONNECT, "x-death", "x-first-death-", "x-last-death-", "kafka_deliveryattempt")
_BYTES: Final = ("key", "headers", "payload")
_TIMES: Final = ("replaying_since", "first_failed_at", "died_at", "closed_at")
_IDS: Final = ("id", "parent_id")


def as_record(letter: DeadLetter) -> dict[str, Any]:
    """Returns a letter as JSON can hold it: bytes in base64, times as RFC 3339."""
    values = {field.name: getattr(letter, field.name) for field in fields(letter)}
    return {name: _written(value) for name, value in values.items()}


def from_record(record: Mapping[str, Any]) -> DeadLetter:
    """Returns the letter of a record that `as_record` made.

    Raises:
        ReplayError: it is no record of a letter; it says which field is wrong.
    """
    known = {field.name for field in fields(DeadLetter)}
    if missing := sorted(known - set(record)):
        raise ReplayError(f"this is no letter: it has no {missing[0]!r}")
    values = {name: record[name] for name in known}
    for name in (*_BYTES, *_TIMES, *_IDS):
        try:
            values[name] = None if values[name] is None else _READ[name](values[name])
        except (ValueError, TypeError, AttributeError) as error:
            raise ReplayError(f"this is no letter: {name} is {str(values[name])[:40]!r}") from error
    try:
        return letter_of(values)
    except ValueError as error:
        raise ReplayError(f"this is no letter: {error}") from error


def of_foreign(delivery: Delivery, *, consumer: str = "") -> DeadLetter | None:
    """Makes the letter of a message on a dead-letter topic or queue of another tool; None when no header says so.

    Args:
        delivery: as it lies on that topic or queue.
        consumer: who gave up, where the headers do not name one; a replay goes to it.
    """
    facts = {name.lower(): value for name, value in delivery.headers}
    told = _spring(facts) or _connect(facts) or _rabbitmq(facts)
    if told is None:
        return None
    kept: Headers = tuple(header for header in delivery.headers if not header[0].lower().startswith(_FOREIGN))
    topic, receiver, error_class = told["topic"] or delivery.topic, consumer or told["consumer"], told["error_class"]
    try:
        message = from_wire(topic, delivery.key, kept, delivery.payload or b"")
    except DecodeError:
        message = from_wire(topic, delivery.key, (), delivery.payload or b"")
    return DeadLetter(
        id=uuid4(),
        side=Side.CONSUMER,
        consumer=receiver,
        topic=topic,
        key=delivery.key,
        message_id=message.id,
        source=message.source,
        type=message.type,
        kind=Kind.EVENT.value,
        headers=pack_headers(kept),
        payload=delivery.payload,
        origin=f"{told['origin']} by way of {delivery.origin}",
        source_position=told["position"],
        failure=Failure.HANDLER,
        stage=Stage.HANDLER,
        error_class=error_class,
        error=error_class,
        attempts=told["attempts"],
        group=cause.group_of("foreign", error_class, message.type, receiver, topic),
        writer_schema=message.schema,
    )


def _spring(facts: Mapping[str, bytes]) -> dict[str, Any] | None:
    if f"{_SPRING}original-topic" not in facts:
        return None
    topic, offset = _text(facts, f"{_SPRING}original-topic"), _number(facts, f"{_SPRING}original-offset")
    error = _text(facts, f"{_SPRING}exception-cause-fqcn") or _text(facts, f"{_SPRING}exception-fqcn")
    return {
        "topic": topic,
        "origin": f"{topic}[{_number(facts, f'{_SPRING}original-partition')}]@{offset}",
        "position": offset,
        "consumer": _text(facts, f"{_SPRING}original-consumer-group"),
        "error_class": error or "unknown error",
        "attempts": _number(facts, "kafka_deliveryattempt") or 1,
    }


def _connect(facts: Mapping[str, bytes]) -> dict[str, Any] | None:
    if f"{_CONNECT}topic" not in facts:
        return None
    topic, offset = _text(facts, f"{_CONNECT}topic"), _text(facts, f"{_CONNECT}offset")
    return {
        "topic": topic,
        "origin": f"{topic}[{_text(facts, f'{_CONNECT}partition')}]@{offset}",
        "position": int(offset) if offset.isdecimal() else None,
        "consumer": _text(facts, f"{_CONNECT}connector.name"),
        "error_class": _text(facts, f"{_CONNECT}exception.class.name") or "unknown error",
        "attempts": 1,
    }


def _rabbitmq(facts: Mapping[str, bytes]) -> dict[str, Any] | None:
    if f"{_RABBITMQ}queue" not in facts:
        return None
    queue = _text(facts, f"{_RABBITMQ}queue")
    return {
        "topic": _text(facts, f"{_RABBITMQ}exchange") or queue,
        "origin": f"queue {queue}",
        "position": None,
        "consumer": "",
        "error_class": _text(facts, f"{_RABBITMQ}reason") or "unknown reason",
        "attempts": int(_text(facts, "x-delivery-count") or 1),
    }


def _text(facts: Mapping[str, bytes], name: str) -> str:
    return facts.get(name, b"").decode("utf-8", "replace")


def _number(facts: Mapping[str, bytes], name: str) -> int | None:
    return int.from_bytes(facts[name], "big", signed=True) if name in facts else None


def _written(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError from error


_READ: Final[dict[str, Any]] = {
    **dict.fromkeys(_BYTES, _bytes),
    **dict.fromkeys(_TIMES, datetime.fromisoformat),
    **dict.fromkeys(_IDS, UUID),
}
