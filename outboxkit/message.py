"""The message: the value that travels from capture to handler, and the bounds that it keeps. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from outboxkit.errors import ConfigurationError

__all__ = [
    "Headers",
    "Kind",
    "Message",
    "MessageLimits",
    "content_hash",
]

Headers = tuple[tuple[str, bytes], ...]


class Kind(StrEnum):
    """The meaning of a message to its receivers."""

    EVENT = "event"  #: something happened; any number of receivers, also none
    COMMAND = "command"  #: something is asked for; exactly one receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message, as it is captured and as a consumer sees it.

    Attributes:
        id: the identity that deduplicates; a UUIDv7 as text for our own messages, any text for foreign ones.
        type: the name of what happened (``order.placed``).
        topic: the destination (Kafka topic; RabbitMQ exchange, or queue for a command).
        payload: the encoded bytes, frozen at emit.
        key: messages of one (topic, key) keep their order; None has no order.
        kind: event or command.
        source: who produced it (CloudEvents source), empty when a foreign message has none.
        content_type: how the payload is encoded.
        schema: fingerprint of the writer's schema, empty when the codec has none.
        dataschema: CloudEvents URI of the schema version.
        occurred_at: application time of the fact, aware.
        recorded_at: database time of the insert, aware; None before it was stored.
        expires_at: not worth delivering after this instant.
        correlation_id: names the whole conversation.
        causation_id: id of the message whose handling caused this one.
        sequence: position in the producer's outbox; grows within (topic, key), gaps are normal.
        headers: every other header, in order, duplicates kept.
    """

    id: str
    type: str
    topic: str
    payload: bytes
    key: bytes | None = None
    kind: Kind = Kind.EVENT
    source: str = ""
    content_type: str = ""
    schema: str = ""
    dataschema: str = ""
    occurred_at: datetime | None = None
    recorded_at: datetime | None = None
    expires_at: datetime | None = None
    correlation_id: str = ""
    causation_id: str = ""
    sequence: int | None = None
    headers: Headers = ()

    def header(self, name: str) -> str | None:
        """The first header of that name as text, or None."""
        return next((value.decode("utf-8", "replace") for key, value in self.headers if key == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageLimits:
    """Bounds that every message must keep, so that no broker refuses it later. Sizes are bytes.

    Raises:
        ConfigurationError: a bound is not a whole number from 0.
    """

    payload: int = 900_000  # below Kafka's default of 1 MiB with headers and framing on top
    header_count: int = 64
    header_bytes: int = 16 * 1024
    key: int = 1024

    def __post_init__(self) -> None:
        for name in ("payload", "header_count", "header_bytes", "key"):
            bound: object = getattr(self, name)
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
                raise ConfigurationError(f"MessageLimits({name}=…) takes a whole number from 0, got {bound!r}")


def content_hash(message: Message) -> bytes:
    """Hashes type and payload by SHA-256: tells a redelivery from another message that came under the same id."""
    return hashlib.sha256(message.type.encode() + b"\0" + message.payload).digest()
