"""Messages of ours read by others and the reverse: confluent-kafka's serializers and Avro Java."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroDeserializer, AvroSerializer
from confluent_kafka.serialization import MessageField, SerializationContext

from outboxkit.avro import FrameKind, fingerprint, read_frame, write_frame
from outboxkit.avro.model.parse import parse
from outboxkit.codecs.avro import AvroCodec, decode, encode
from outboxkit.events import EventType
from outboxkit.message import Message
from outboxkit.registries.confluent import ConfluentRegistry
from tests.oracle.java import ask
from tests.servers import registry as server

_NAME = f"Order{uuid.uuid4().hex[:10]}"
_SOURCE: dict[str, Any] = {
    "type": "record",
    "name": _NAME,
    "namespace": "shop",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "count", "type": "int"},
        {"name": "total", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "note", "type": ["null", "string"], "default": None},
        {"name": "state", "type": {"type": "enum", "name": "State", "symbols": ["NEW", "PAID"]}},
        {"name": "lines", "type": {"type": "array", "items": "long"}},
        {"name": "tags", "type": {"type": "map", "values": "double"}},
    ],
}
_VALUE: dict[str, Any] = {
    "id": "größer 🙂",
    "count": -7,
    "total": decimal.Decimal("1299.00"),
    "at": dt.datetime(2026, 11, 24, 9, 30, 0, 123_000, tzinfo=dt.UTC),
    "note": None,
    "state": "PAID",
    "lines": [1, -1, 2**40],
    "tags": {"a": 0.5},
}
_SUBJECT = f"{_NAME}-value"
_SCHEMA = parse(_SOURCE)


@pytest.fixture(scope="module")
def client() -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": server.find().url}) as made:
        yield made


@pytest.fixture(scope="module")
def schema_id() -> int:
    made = ConfluentRegistry(server.find().url).register(_SUBJECT, json.dumps(_SOURCE))
    assert made.schema_id is not None
    return made.schema_id


def test_confluents_deserializer_reads_our_message(client: SchemaRegistryClient, schema_id: int) -> None:
    message, headers = write_frame(FrameKind.CONFLUENT_ID, encode(_SCHEMA, _VALUE), schema_id=schema_id)

    read = AvroDeserializer(client)(message, SerializationContext(_NAME, MessageField.VALUE))

    assert headers == ()
    assert read == _VALUE


def test_we_read_the_message_of_confluents_serializer(client: SchemaRegistryClient, schema_id: int) -> None:
    serializer = AvroSerializer(
        client, json.dumps(_SOURCE), conf={"auto.register.schemas": False, "use.latest.version": True}
    )
    message = serializer(_VALUE, SerializationContext(_NAME, MessageField.VALUE))
    assert message is not None

    frame = read_frame(message)
    writer = parse(ConfluentRegistry(server.find().url).resolve(str(frame.schema_id)))

    assert (frame.kind, frame.schema_id) == (FrameKind.CONFLUENT_ID, schema_id)
    assert decode(writer, _SCHEMA, frame.payload) == _VALUE


def test_raw_bytes_go_both_ways_as_confluent_writes_them(client: SchemaRegistryClient) -> None:
    context = SerializationContext(f"{_NAME}Raw", MessageField.VALUE)
    payload = b"\x04ab and no length before it"
    theirs = AvroSerializer(client, '"bytes"')(payload, context)
    assert theirs is not None
    schema_id = read_frame(theirs).schema_id
    assert schema_id is not None
    codec = AvroCodec(frame=FrameKind.CONFLUENT_ID, schema_id=lambda _: schema_id)
    blob = EventType(name="blob", schema={"type": "bytes"}, codec="avro")

    ours = codec.encode(payload, blob)

    assert ours.payload == theirs
    assert AvroDeserializer(client)(ours.payload, context) == payload
    message = Message(id="1", type="blob", topic="blobs", payload=theirs)
    assert codec.decode(message, blob, ConfluentRegistry(server.find().url).resolve) == payload


def test_java_reads_our_body_and_our_single_object() -> None:
    body = encode(_SCHEMA, _VALUE)
    single, _ = write_frame(FrameKind.SINGLE_OBJECT, body, fingerprint=fingerprint(_SCHEMA))
    framed, _ = write_frame(FrameKind.CONFLUENT_ID, body, schema_id=41)

    answers = ask([
        ("DECODE", _SOURCE, _SOURCE, framed[5:].hex()),
        ("SINGLE", _SOURCE, single.hex()),
    ])

    assert [decode(_SCHEMA, _SCHEMA, bytes.fromhex(one)) for one in answers] == [_VALUE, _VALUE]


def test_we_read_what_java_writes() -> None:
    value = {
        "id": "größer 🙂",
        "count": -7,
        "total": (129_900).to_bytes(4, "big").decode("latin-1"),
        "at": 1_795_512_600_123,
        "note": None,
        "state": "PAID",
        "lines": [1, -1, 2**40],
        "tags": {"a": 0.5},
    }

    (answer,) = ask([("ENCODE", _SOURCE, json.dumps(value))])

    body, single = (bytes.fromhex(one) for one in answer.split("\t"))
    assert decode(_SCHEMA, _SCHEMA, body) == _VALUE
    frame = read_frame(single)
    assert (frame.kind, frame.fingerprint) == (FrameKind.SINGLE_OBJECT, fingerprint(_SCHEMA))
    assert decode(_SCHEMA, _SCHEMA, frame.payload) == _VALUE
