"""Reveal: the content of a dead letter as text. Who has seen it is in the audit log."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Final

from outboxkit import schema_store
from outboxkit.codecs import codec_named
from outboxkit.dead_letters.replay import audit
from outboxkit.errors import CodecError, ConfigurationError, SchemaError
from outboxkit.events import EventType

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Connection

    from outboxkit.dead_letters.letter import DeadLetter

__all__ = ["reveal"]

_MAX_SHOWN: Final = 4_096  # characters, or bytes of what is no text


def reveal(
    connection: Connection, letter: DeadLetter, *, by: str, resolve: Callable[[str], str] | None = None, why: str = ""
) -> str:
    """Returns the payload as text, as far as it can be read.

    Transaction: joins the caller's; does not commit. Writes: the audit.

    Args:
        connection: the caller's.
        letter: whose payload.
        by: who sees it.
        resolve: finds the schema text for a fingerprint that ``outbox_schemas`` does not know.
        why: the reason, for the audit.
    """
    audit(connection, "dlq.reveal", [letter.id], by=by, why=why)
    if letter.payload is None:
        return "(none: a tombstone)"
    return _decoded(letter, letter.payload, partial(schema_store.schema_text, connection, resolve=resolve))[:_MAX_SHOWN]


def _decoded(letter: DeadLetter, payload: bytes, schema_text: Callable[[str], str]) -> str:
    """Returns a payload as text: JSON, Avro by its writer's schema, else its first bytes."""
    try:
        message = letter.message
        if "json" in message.content_type:
            return payload.decode("utf-8", "backslashreplace")
        plain = codec_named("avro").decode(message, EventType(name=letter.type, codec="avro"), schema_text)
        return json.dumps(plain, default=str, ensure_ascii=False)
    except (CodecError, SchemaError, ConfigurationError, ValueError):
        return payload[:_MAX_SHOWN].hex(" ")
