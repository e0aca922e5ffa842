"""The codec as the rest of outboxkit uses it: event types in, messages out, one class of error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from outboxkit.avro import FrameKind, Schema, fingerprint
from outboxkit.avro.model.parse import parse
from outboxkit.codecs import codec_named
from outboxkit.codecs.avro import AvroCodec, decode, encode
from outboxkit.errors import (
    ConfigurationError,
    DecodeError,
    EncodeError,
    IncompatibleSchema,
    SchemaError,
    SchemaNotFound,
)
from outboxkit.events import EventType, event, event_type
from outboxkit.message import Message
from outboxkit.registries.memory import MemoryRegistry

ORDER: dict[str, Any] = {"type": "record", "name": "shop.Order", "fields": [{"name": "id", "type": "string"}]}
NEWER = ORDER | {"fields": [*ORDER["fields"], {"name": "n", "type": "int"}]}
DIGEST = fingerprint(parse(ORDER)).hex()


@event("order.placed", schema=ORDER)
@dataclasses.dataclass
class Order:
    id: str


def _message(payload: bytes, **more: Any) -> Message:
    return Message(id="1", type="order.placed", topic="orders", payload=payload, **more)


def _resolve(name: str) -> str:
    if name not in (DIGEST, "41"):
        raise SchemaNotFound(name)
    return json.dumps(ORDER)


READER = EventType(name="order.placed", schema=NEWER, codec="avro")


def test_an_event_goes_there_and_back() -> None:
    codec = codec_named("avro")

    made = codec.encode(Order("o-1"), event_type(Order))

    assert (made.content_type, made.schema) == ("avro/binary", DIGEST)
    assert codec.decode(_message(made.payload, schema=made.schema), event_type(Order), _resolve) == {"id": "o-1"}


def test_an_event_that_does_not_fit_is_refused_with_its_field() -> None:
    with pytest.raises(EncodeError) as caught:
        codec_named("avro").encode({"id": 7}, event_type(Order))

    assert caught.value.path == "id"


def test_a_schema_may_be_a_file_and_a_missing_one_is_a_matter_of_configuration(tmp_path: Path) -> None:
    path = tmp_path / "order.avsc"
    path.write_text(json.dumps(ORDER))
    codec = AvroCodec()

    assert codec.encode({"id": "x"}, EventType(name="o", schema=path)).schema == DIGEST
    assert json.loads(codec.schema_text(EventType(name="o", schema=str(path))) or "") == ORDER
    with pytest.raises(ConfigurationError, match="cannot be read"):
        codec.encode({"id": "x"}, EventType(name="o", schema=tmp_path / "nowhere.avsc"))
    with pytest.raises(ConfigurationError, match="declares no schema"):
        codec.encode({"id": "x"}, EventType(name="o", codec="avro"))


def test_a_reader_that_cannot_read_the_writer_says_so_with_problems_path_and_offset() -> None:
    body = encode(parse(ORDER), {"id": "o-1"})

    with pytest.raises(IncompatibleSchema) as caught:
        AvroCodec().decode(_message(b"\x00\x00\x00\x00\x29" + body), READER, _resolve)

    assert caught.value.path == "n"
    assert caught.value.offset == 5
    assert caught.value.problems[0].startswith("READER_FIELD_MISSING_DEFAULT_VALUE at Order.n (/fields/1)")


def test_a_broken_message_says_where_in_the_whole_message() -> None:
    with pytest.raises(DecodeError) as caught:
        AvroCodec().decode(_message(b"\x00\x00\x00\x00\x29\x06ab"), event_type(Order), _resolve)

    assert (caught.value.path, caught.value.offset) == ("id", 5)


def test_an_unknown_writer_is_not_found_and_a_message_without_a_name_is_refused() -> None:
    with pytest.raises(SchemaNotFound):
        AvroCodec().decode(_message(b"\x00\x00\x00\x00\x07\x00"), event_type(Order), _resolve)
    with pytest.raises(DecodeError, match="no schema is named"):
        AvroCodec().decode(_message(b'{"id": "JSON"}'), event_type(Order), _resolve)


@pytest.mark.parametrize("kind", [FrameKind.CONFLUENT_ID, FrameKind.SINGLE_OBJECT])
def test_a_configured_frame_is_written_and_nothing_else_is_read(kind: FrameKind) -> None:
    registry = MemoryRegistry()
    text = json.dumps(ORDER)

    def number(schema: Schema) -> int:
        made = registry.register(schema.name, text)
        return made.schema_id or 0

    codec = AvroCodec(frame=kind, schema_id=number)
    registry.register("shop.Order", text)

    made = codec.encode(Order("o-1"), event_type(Order))

    message = _message(made.payload, schema=made.schema)
    assert codec.decode(message, event_type(Order), registry.resolve) == {"id": "o-1"}
    with pytest.raises(DecodeError):
        codec.decode(_message(encode(parse(ORDER), {"id": "o-1"})), event_type(Order), registry.resolve)


@pytest.mark.parametrize("kind", [FrameKind.CONFLUENT_ID, FrameKind.SINGLE_OBJECT])
def test_a_framed_message_of_ours_is_read_by_a_codec_that_expects_nothing(kind: FrameKind) -> None:
    made = AvroCodec(frame=kind, schema_id=lambda _: 41).encode(Order("o-1"), event_type(Order))

    message = _message(made.payload, schema=made.schema, content_type=made.content_type)

    assert made.content_type == f"avro/binary; frame={kind.value}"
    assert codec_named("avro").decode(message, event_type(Order), _resolve) == {"id": "o-1"}


def test_a_frame_that_needs_a_header_is_not_written() -> None:
    with pytest.raises(ConfigurationError, match="read, not written"):
        AvroCodec(frame=FrameKind.CONFLUENT_ID_HEADER).encode(Order("o-1"), event_type(Order))


def test_confluents_raw_bytes_are_read_and_written_without_a_length() -> None:
    blob = EventType(name="blob", schema={"type": "bytes"}, codec="avro")
    codec = AvroCodec(frame=FrameKind.CONFLUENT_ID, schema_id=lambda _: 7)
    frame = b"\x00\x00\x00\x00\x07"

    assert codec.encode(b"\x04ab", blob).payload == frame + b"\x04ab"
    for raw in (b"", b"\x04ab", bytes(200)):
        assert codec.encode(raw, blob).payload == frame + raw
        assert codec.decode(_message(frame + raw), blob, lambda _: '"bytes"') == raw
        assert (
            AvroCodec().decode(_message(raw, headers=(("__value_schema_id", frame),)), blob, lambda _: '"bytes"') == raw
        )


def test_bytes_keep_their_length_in_every_other_frame_and_inside_other_types() -> None:
    blob = EventType(name="blob", schema={"type": "bytes"}, codec="avro")
    single = AvroCodec(frame=FrameKind.SINGLE_OBJECT).encode(b"ab", blob)

    assert single.payload[10:] == b"\x04ab"
    assert codec_named("avro").encode(b"ab", blob).payload == b"\x04ab"
    maybe = EventType(name="blob", schema={"type": "array", "items": "bytes"}, codec="avro")
    assert AvroCodec(frame=FrameKind.CONFLUENT_ID, schema_id=lambda _: 7).encode([b"ab"], maybe).payload[5:] == (
        b"\x02\x04ab\x00"
    )


def test_a_fault_in_raw_bytes_is_told_inside_the_message() -> None:
    money = {"type": "bytes", "logicalType": "decimal", "precision": 4, "scale": 2}
    blob = EventType(name="blob", schema=money, codec="avro")

    with pytest.raises(DecodeError) as caught:
        AvroCodec().decode(_message(b"\x00\x00\x00\x00\x07" + b"\x7f" * 3), blob, lambda _: json.dumps(money))

    assert caught.value.offset is not None
    assert caught.value.offset <= 8


def test_a_writers_bad_default_is_no_reason_to_refuse_its_messages() -> None:
    bad = ORDER | {"fields": [ORDER["fields"][0] | {"default": 7}]}

    found = AvroCodec().decode(_message(b"\x06o-1", schema=DIGEST), event_type(Order), lambda _: json.dumps(bad))

    assert found == {"id": "o-1"}


def test_names_with_letters_of_other_scripts_are_read_as_java_writes_them() -> None:
    text = """{"type": "record", "name": "shop.Größe", "fields": [
        {"name": "länge", "type": "int"},
        {"name": "art", "type": {"type": "enum", "name": "Ärt", "symbols": ["groß", "klein"]}},
        {"name": "zweite", "type": ["null", "shop.Ärt"]}]}"""
    writer = parse(text, lenient=True)
    reader = parse(
        """{"type": "record", "name": "shop.Size", "aliases": ["shop.Größe"], "fields": [
        {"name": "length", "aliases": ["länge"], "type": "long"}]}""",
        lenient=True,
    )
    body = bytes([84, 0, 2, 2])

    assert decode(writer, writer, body) == {"länge": 42, "art": "groß", "zweite": "klein"}
    assert decode(writer, reader, body) == {"length": 42}
    with pytest.raises(SchemaError, match="is not a name"):
        parse(text)
    for name in ("1st", "a b", "a-b", "", "½"):
        with pytest.raises(SchemaError, match="is not a name"):
            parse({"type": "record", "name": "R", "fields": [{"name": name, "type": "int"}]}, lenient=True)
