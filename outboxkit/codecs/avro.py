"""Avro: events written and read under a schema, by fastavro behind a guard.

fastavro is fast and trusts its input: 5 kB of recursive bytes end the process, a negative index reads another symbol,
an int field takes 2^40. So it never sees a value or a message unchecked. On writing, `outboxkit.avro.binary.prepare`
checks every value first, inside the user's transaction. On reading, `outboxkit.avro.binary.guard` steps over the
bytes first, and differences between writer and reader are resolved by `outboxkit.avro.binary.resolution`, not by
fastavro.

Whatever the bytes are, `decode` returns a value or raises `DecodeError` with data path and byte offset.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import fastavro
from fastavro.read import LOGICAL_READERS

from outboxkit.avro import Frame, FrameKind, Schema, body_of, check, fingerprint, framed_body, read_frame, write_frame
from outboxkit.avro.binary.guard import Refused, scanner
from outboxkit.avro.binary.json_values import encode_default
from outboxkit.avro.binary.locate import explain, locate, offset_of
from outboxkit.avro.binary.prepare import Prepare, preparer
from outboxkit.avro.binary.promotions import Unreadable
from outboxkit.avro.binary.resolution import Leaves, Resolution, resolve
from outboxkit.avro.classes import schema_of
from outboxkit.avro.frames import FRAMED, frame_of, name_of
from outboxkit.avro.model.canonical import wire_form
from outboxkit.avro.model.nodes import Enum, Field, Fixed, Node, Primitive, Record
from outboxkit.avro.model.parse import parse
from outboxkit.avro.model.sizes import recursive_names, zero_width_weights
from outboxkit.codecs import Codec, Encoded
from outboxkit.errors import ConfigurationError, DecodeError, EncodeError, IncompatibleSchema, SchemaError

if TYPE_CHECKING:
    from outboxkit.events import EventType
    from outboxkit.message import Message

__all__ = ["CONTENT_TYPE", "AvroCodec", "codec", "decode", "encode"]

CONTENT_TYPE: Final = "avro/binary"
_WRITTEN: Final = (FrameKind.CONFLUENT_ID, FrameKind.SINGLE_OBJECT)
MAX_PROBLEMS: Final = 20
"""Lines of a compatibility report that travel with an error into the dead letters."""

_ROOT: Final = "_"
_CACHED: Final = 1_024
"""Compiled schemas and pairs that are kept: far above what one process reads, far below what fills its memory."""
_NAMES: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def codec() -> Codec:
    """The codec as the entry point gives it: bare bodies, the writer's fingerprint in a header."""
    return AvroCodec()


def encode(schema: Schema, value: object) -> bytes:
    """Encode a value.

    Raises:
        EncodeError: the value does not fit, with its path.
    """
    writing = _writing(schema)
    try:
        made = writing.prepare(value)
        out = io.BytesIO()
        fastavro.schemaless_writer(out, writing.library, {_ROOT: made} if writing.wrapped else made)
        data = out.getvalue()
        if writing.scan is not None:
            writing.scan(data)
    except EncodeError as error:
        where = f" (at {error.path})" if error.path else ""
        raise EncodeError(f"{error.message}{where}", path=error.path) from None
    except Refused as error:
        raise EncodeError(f"no reader accepts the value: {error}") from error
    except Exception as error:
        raise _unwritable(schema, value, error) from error
    return data


def _unwritable(schema: Schema, value: object, error: Exception) -> EncodeError:
    """Find the field that the library refused, by the careful check."""
    try:
        preparer(schema, _default, quick=False)(value)
    except EncodeError as found:
        return EncodeError(f"{found.message} (at {found.path or 'the top'})", path=found.path)
    except Exception as other:
        raise EncodeError(f"the value cannot be written: {explain(other)}") from other
    return EncodeError(f"the value cannot be written: {explain(error)}")


def decode(writer: Schema, reader: Schema, data: bytes) -> Any:
    """Decode the body of a message that `writer` wrote, as `reader` wants it.

    Raises:
        DecodeError: with data path and byte offset; `Unreadable`, a subclass, when the bytes are fine and the reader
            cannot take this value of the writer's.
    """
    reading = _reading(writer, reader)
    try:
        reading.scan(data)
        value: Any = fastavro.schemaless_reader(io.BytesIO(data), reading.library)
        if reading.wrapped:
            value = value[_ROOT]
        return value if reading.project is None else reading.project(value)
    except Unreadable as error:
        raise reading.unreadable(error, data) from None
    except Exception as error:
        raise reading.fault(error, data) from error


@dataclass(frozen=True, slots=True)
class AvroCodec:
    """Events as Avro, by the schema that they declare, else by one made of the class (`outboxkit.avro.classes`).

    It is the codec ``avro``, or ``@event(…, codec=AvroCodec(frame=…))`` for another way to name schemas.

    Attributes:
        frame: how a message names its schema. With the default the fingerprint travels in the header
            ``outboxkit-schema``; messages of others are read in every frame. Any other kind is pinned: nothing else is
            read, and ``confluent-id`` and ``single-object`` are also written.
        schema_id: gives the registry's id of a schema (`outboxkit.registries.ids_of`); Confluent id frames need it.
    """

    frame: FrameKind = FrameKind.FINGERPRINT_HEADER
    schema_id: Callable[[Schema], int] | None = field(default=None)

    def encode(self, value: object, event_type: EventType) -> Encoded:
        """Encode an event under its declared schema."""
        schema = _declared(event_type)
        body, digest = encode(schema, value), fingerprint(schema)
        if self.frame is FrameKind.FINGERPRINT_HEADER:
            return Encoded(body, CONTENT_TYPE, digest.hex())
        if self.frame not in _WRITTEN:
            raise ConfigurationError(f"{self.frame.value} frames are read, not written: an event has no headers yet")
        number = self.schema_id(schema) if self.schema_id and self.frame is FrameKind.CONFLUENT_ID else None
        made, _ = write_frame(self.frame, framed_body(self.frame, body, schema), schema_id=number, fingerprint=digest)
        return Encoded(made, f"{CONTENT_TYPE}{FRAMED}{self.frame.value}", digest.hex())

    def decode(self, message: Message, event_type: EventType, resolve: Callable[[str], str]) -> object:
        """Decode a message under its writer's schema and the event's own."""
        frame = self._frame(message)
        writer = _parsed(resolve(name_of(frame)))
        reader = _declared(event_type) if _has_schema(event_type) else writer
        body = body_of(frame, writer)
        before = frame.offset + len(frame.payload) - len(body)
        try:
            return decode(writer, reader, body)
        except Unreadable as error:
            lines = tuple(str(one) for one in check(reader, writer) if one.is_error)[:MAX_PROBLEMS]
            raise IncompatibleSchema(
                error.message, problems=lines, path=error.path, offset=_moved(error.offset, before)
            ) from error
        except DecodeError as error:
            error.offset = _moved(error.offset, before)
            raise

    def schema_text(self, event_type: EventType) -> str | None:
        """The declared schema, whole: with defaults, aliases and docs."""
        return json.dumps(_declared(event_type).source) if _has_schema(event_type) else None

    def _frame(self, message: Message) -> Frame:
        if self.frame is not FrameKind.FINGERPRINT_HEADER:
            return read_frame(message.payload, message.headers, pinned=self.frame)
        return frame_of(message)


def _moved(offset: int | None, before: int) -> int | None:
    return None if offset is None else max(0, offset + before)


def _has_schema(event_type: EventType) -> bool:
    """True if it declares a schema, or chose Avro for a class that says enough to make one."""
    return event_type.schema is not None or (event_type.codec != "json" and event_type.cls is not dict)


def _declared(event_type: EventType) -> Schema:
    declared = event_type.schema
    if not _has_schema(event_type):
        raise ConfigurationError(f"the event {event_type.name} uses Avro but declares no schema")
    if declared is None:
        return _derived(event_type.cls)
    if isinstance(declared, Mapping):
        return _parsed(json.dumps(declared))
    return _loaded(Path(declared))


@functools.lru_cache(_CACHED)
def _derived(cls: type) -> Schema:
    return parse(schema_of(cls))


@functools.lru_cache(_CACHED)
def _loaded(path: Path) -> Schema:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"the schema file {path} cannot be read: {error.strerror}") from error


@functools.lru_cache(_CACHED)
def _parsed(text: str) -> Schema:
    # Lenient: a writer's defaults are never used, so bad ones are no reason to refuse its messages.
    return parse(text, lenient=True)


@dataclass(frozen=True, slots=True)
class _Writing:
    """A schema compiled for writing."""

    prepare: Prepare
    library: Any
    wrapped: bool
    scan: Callable[[bytes], None] | None


@functools.lru_cache(_CACHED)
def _writing(schema: Schema) -> _Writing:
    library, wrapped = _library(schema)
    # Only such values can be refused for their shape; for all others the check of the value says everything.
    deep = recursive_names(schema.names) or zero_width_weights(schema.names)
    return _Writing(preparer(schema, _default), library, wrapped, scanner(schema) if deep else None)


@dataclass(frozen=True, slots=True)
class _Reading:
    """A pair of schemas compiled for reading."""

    scan: Callable[[bytes], None]
    library: Any
    wrapped: bool
    project: Callable[[Any], Any] | None
    resolution: Resolution

    def fault(self, error: Exception, data: bytes) -> DecodeError:
        """Find the place of a failure by walking the bytes again."""
        try:
            found = locate(self.resolution.wire, data, _decode_leaf)
        except RecursionError:
            found = None
        if found is None:
            why = str(error) if isinstance(error, Refused) else explain(error)
            return DecodeError(why)
        path = self._named(found.path)  # the walk knows the fields that are stepped over by a name of ours
        place = f"at {path or 'the top'}, byte {found.offset}"
        return DecodeError(f"{found.message} ({place})", path=path, offset=found.offset)

    def unreadable(self, error: Unreadable, data: bytes) -> Unreadable:
        """Complete the report of a value that the reader cannot take."""
        where = error.path or "the top"
        offset = offset_of(self.resolution.wire, data, error.path)
        return Unreadable(f"{error.message} (at {where}, byte {offset})", path=error.path, offset=offset)

    def _named(self, path: str) -> str:
        original = self.resolution.original
        named = _NAMES.sub(lambda found: original.get(found[0], found[0]), path)
        return re.sub(r"\.(?=\.|\[|\{|$)", "", named).lstrip(".")


@functools.lru_cache(_CACHED)
def _reading(writer: Schema, reader: Schema) -> _Reading:
    try:
        resolution = resolve(reader, writer, _LEAVES)
        library, wrapped = _library(resolution.wire)
        return _Reading(scanner(resolution.wire), library, wrapped, resolution.project, resolution)
    except RecursionError:
        raise SchemaError("the types of the schema use each other in too long a chain") from None


def _library(schema: Schema) -> tuple[Any, bool]:
    """Return fastavro's form of a schema; other roots than records are put into one, which takes no bytes."""
    form = wire_form(schema)
    wrapped = not isinstance(schema.follow(schema.root), Record)
    if wrapped:
        form = {"type": "record", "name": "Root_", "fields": [{"name": _ROOT, "type": form}]}
    return _parsed_by_library(form), wrapped


def _parsed_by_library(form: Any) -> Any:
    """Other letters in symbols than ASCII are names in Java, and refused by the library; it only needs their number."""
    symbols: list[tuple[list[str], list[str]]] = []

    def renamed(part: Any) -> Any:
        if isinstance(part, list):
            return [renamed(one) for one in part]
        if not isinstance(part, dict):
            return part
        made = {key: value if key == "default" else renamed(value) for key, value in part.items()}
        if part.get("type") == "enum" and not "".join(part["symbols"]).isascii():
            made["symbols"] = [f"s{number}" for number in range(len(part["symbols"]))]
            made.pop("default", None)
            symbols.append((made["symbols"], part["symbols"]))
        return made

    parsed = fastavro.parse_schema(renamed(form))
    for own, meant in symbols:
        own[:] = meant
    return parsed


def _default(schema: Schema, one: Field) -> Callable[[], Any]:
    """Return a maker of fresh defaults: the default's bytes are decoded anew unless the value cannot be changed."""
    try:
        data = encode_default(schema, one.node, one.default)
    except EncodeError as error:
        raise SchemaError(f"the default of {one.name} is invalid: {error}") from error
    own = Schema(root=one.node, names=schema.names, source=None)
    first = decode(own, own, data)
    if isinstance(first, dict | list):
        return lambda: decode(own, own, data)
    return lambda: first


def _convert(node: Primitive, value: object) -> object:
    if node.logical is None:
        return value
    convert = LOGICAL_READERS.get(f"{node.type}-{node.logical.name}")
    if convert is None:
        return value
    try:
        return convert(value, {"precision": node.logical.precision, "scale": node.logical.scale}, None)
    except (ArithmeticError, ValueError, TypeError) as error:
        raise DecodeError(explain(error)) from error


def _decode_leaf(node: Primitive | Enum | Fixed, data: bytes) -> None:
    wrapped, _ = _library(_alone(node))
    fastavro.schemaless_reader(io.BytesIO(data), wrapped)


def _alone(node: Node) -> Schema:
    return Schema(root=node, names={}, source=None)


_LEAVES: Final = Leaves(convert=_convert, default=_default)
