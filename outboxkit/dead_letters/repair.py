"""Repair: the content of a dead message as text that a person can edit, and back to the bytes that its readers expect.

JSON is edited as JSON. Avro is edited as JSON, too, and written with its writer's schema, in the frame that it had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from outboxkit.avro.frames import body_of, frame_of, framed_body, name_of, write_frame
from outboxkit.avro.model.parse import parse
from outboxkit.codecs import codec_named
from outboxkit.errors import CodecError, ReplayError, SchemaError
from outboxkit.events import EventType

if TYPE_CHECKING:
    from outboxkit.dead_letters.letter import DeadLetter
    from outboxkit.message import Message

__all__ = ["editable", "encoded", "from_text"]

_SchemaText = Callable[[str], str]  # the schema text for a fingerprint or id


def editable(letter: DeadLetter, schema_text: _SchemaText) -> str:
    """Returns the content of a letter as JSON text in lines.

    Args:
        letter: whose payload.
        schema_text: finds the writer's schema.

    Raises:
        ReplayError: the payload is neither text nor Avro whose schema is known.
    """
    payload = letter.payload or b""
    try:
        message = letter.message
        if not _is_avro(message):
            return _pretty(payload)
        contract = EventType(name=letter.type, codec="avro")
        plain = codec_named("avro").decode(message, contract, schema_text)
        return json.dumps(plain, indent=2, default=str, ensure_ascii=False) + "\n"
    except (CodecError, SchemaError) as error:
        raise ReplayError(f"{letter.id} cannot be shown for editing: {error.message}") from error
    except UnicodeDecodeError as error:
        raise ReplayError(f"{letter.id} holds no text at byte {error.start}: give the bytes as a file") from error


def from_text(letter: DeadLetter, text: str, schema_text: _SchemaText) -> bytes:
    """Returns the payload for an edited text.

    Raises:
        ReplayError: it is not JSON, or its schema does not take it.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ReplayError(f"the edited text is not JSON at {where}: {error.msg}") from error
    return encoded(letter, value, schema_text)


def encoded(letter: DeadLetter, value: Any, schema_text: _SchemaText) -> bytes:
    """Returns the payload for a value: bytes as they are, text as UTF-8, others encoded as the message was.

    Raises:
        ReplayError: the content type, or the writer's schema, does not take it.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and not _is_avro(letter.message):
        return value.encode()
    try:
        if not _is_avro(letter.message):
            return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        return _as_avro(letter.message, value, schema_text)
    except (CodecError, SchemaError) as error:
        where = getattr(error, "path", "")
        raise ReplayError(
            f"the repaired content is not valid: {f'{where}: ' if where else ''}{error.message}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ReplayError(f"the repaired content is no JSON: {error}") from error


def _as_avro(message: Message, value: Any, schema_text: _SchemaText) -> bytes:
    frame = frame_of(message)
    text = schema_text(name_of(frame))
    writer = parse(text, lenient=True)
    made = codec_named("avro").encode(value, EventType(name=message.type, schema=json.loads(text), codec="avro"))
    own = replace(message, payload=made.payload, content_type=made.content_type, schema=made.schema, headers=())
    body = framed_body(frame.kind, body_of(frame_of(own), writer), writer)
    payload, _ = write_frame(
        frame.kind, body, schema_id=frame.schema_id, guid=frame.guid, fingerprint=frame.fingerprint
    )
    return payload


def _is_avro(message: Message) -> bool:
    return "json" not in message.content_type and bool(message.schema or "avro" in message.content_type)


def _pretty(payload: bytes) -> str:
    text = payload.decode()
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"
    except ValueError:
        return text  # that it is no JSON is what is to be repaired
