"""The bytes that the wire page prints are what the adapters write; the golden file changes only with the page."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from pamqp import commands
from pamqp import frame as amqp
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from outboxkit.brokers.rabbitmq.properties import read_properties
from outboxkit.brokers.rabbitmq.wire import Unsendable, publish_frames
from outboxkit.headers import from_wire, outgoing_headers, pack_headers, wire_headers
from outboxkit.message import Headers, Kind, Message
from outboxkit.rows import Row

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "wire.golden.json").read_text())
PAGE = (HERE.parents[2] / "docs/reference/wire.md").read_text()

IDENTITY = UUID("0198c5d2-7f00-7000-8000-000000000001")
MESSAGE = Message(
    id=str(IDENTITY),
    type="order.placed",
    topic="orders",
    payload=b'{"order": 7}',
    key=b"order-7",
    source="urn:shop",
    content_type="application/json",
    schema="9f86d081884c7d65",
    dataschema="urn:shop:order.placed:1",
    occurred_at=datetime(2026, 11, 24, 8, 30, tzinfo=UTC),
    expires_at=datetime(2026, 11, 25, 8, 30, tzinfo=UTC),
    correlation_id="0198c5d2-7f00-7000-8000-0000000000aa",
    causation_id="0198c5d2-7f00-7000-8000-0000000000bb",
    headers=(
        ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ("tag", b"a"),
        ("tag", b"b"),
        ("raw", b"\xff\x00"),
    ),
)


def row(**changes: object) -> Row:
    plain = Row.of(
        position=4711,
        id=IDENTITY,
        topic=MESSAGE.topic,
        key=MESSAGE.key,
        type=MESSAGE.type,
        kind=Kind.EVENT.value,
        payload=MESSAGE.payload,
        headers=pack_headers(wire_headers(MESSAGE)),
        recorded_at=datetime(2026, 11, 24, 8, 30, 0, 250_000, tzinfo=UTC),
        expires_at=None,
    )
    return plain._replace(**changes)  # type: ignore[arg-type]


def parsed(data: bytes) -> list[object]:
    frames: list[object] = []
    while data:
        consumed, _, one = amqp.unmarshal(data)
        frames.append(one)
        data = data[consumed:]
    return frames


def headers_of(frames: bytes) -> Headers:
    """As a consumer reads them: the first frame is the method, the second one the header."""
    _, _, method_size = struct.unpack_from(">BHI", frames)
    at = 7 + method_size + 1
    _, _, size = struct.unpack_from(">BHI", frames, at)
    return read_properties(frames[at + 7 + 12 : at + 7 + size]).headers


def test_the_record_on_kafka_is_the_golden_one() -> None:
    headers = outgoing_headers(row())

    assert {
        "key": MESSAGE.key.hex() if MESSAGE.key else "",
        "value": MESSAGE.payload.hex(),
        "headers": [[name, value.hex()] for name, value in headers],
    } == GOLDEN["kafka"]


def test_the_frames_on_rabbitmq_are_the_golden_ones() -> None:
    assert publish_frames(row(), 1, 131_072).hex() == GOLDEN["rabbitmq"]


def test_the_page_shows_the_golden_bytes_and_every_name() -> None:
    text = PAGE.replace("\n", "")
    assert GOLDEN["rabbitmq"] in text
    for name, value in GOLDEN["kafka"]["headers"]:
        assert f"`{name}`" in PAGE
        assert value in PAGE
        if name.startswith("ce_"):
            assert f"`cloudEvents:{name[3:]}`" in PAGE


def test_an_independent_decoder_reads_the_frames() -> None:
    method, header, body = parsed(publish_frames(row(), 1, 131_072))

    assert isinstance(method, commands.Basic.Publish)
    assert (method.exchange, method.routing_key, method.mandatory) == ("orders", "order.placed", True)
    assert isinstance(header, ContentHeader)
    assert header.body_size == len(MESSAGE.payload)
    assert header.properties.delivery_mode == 2
    assert isinstance(body, ContentBody)
    assert body.value == MESSAGE.payload


def test_what_comes_back_is_the_message_that_went_out() -> None:
    headers = headers_of(publish_frames(row(), 1, 131_072))

    message = from_wire("orders", MESSAGE.key, headers, MESSAGE.payload)

    assert message == replace(MESSAGE, sequence=4711, recorded_at=row().recorded_at)


def test_a_command_goes_to_its_queue_through_the_default_exchange() -> None:
    method, *_ = parsed(publish_frames(row(kind=Kind.COMMAND.value, topic="billing"), 1, 131_072))

    assert isinstance(method, commands.Basic.Publish)
    assert (method.exchange, method.routing_key) == ("", "billing")


@pytest.mark.parametrize("size", [0, 1, 4088, 4089, 10_000])
def test_a_body_is_cut_to_the_frame_size(size: int) -> None:
    payload = bytes(size)

    _, _, *bodies = parsed(publish_frames(row(payload=payload), 1, 4096))

    assert b"".join(body.value for body in bodies if isinstance(body, ContentBody)) == payload
    assert len(bodies) == -(-size // 4088)


def test_a_value_too_long_for_a_property_stays_a_header() -> None:
    long_source = "urn:" + "x" * 300
    headers = pack_headers((("ce_source", long_source.encode()), ("content-type", b"y" * 300)))

    frames = publish_frames(row(headers=headers), 1, 131_072)
    _, header, *_ = parsed(frames)

    assert isinstance(header, ContentHeader)
    assert header.properties.app_id is None
    assert header.properties.content_type is None
    assert dict(headers_of(frames))["ce_source"] == long_source.encode()
    assert dict(headers_of(frames))["content-type"] == b"y" * 300


@pytest.mark.parametrize("changes", [{"type": "t" * 256}, {"headers": pack_headers((("n" * 256, b""),))}])
def test_a_name_too_long_for_amqp_cannot_be_sent(changes: dict[str, object]) -> None:
    with pytest.raises(Unsendable):
        publish_frames(row(**changes), 1, 131_072)


def test_headers_larger_than_a_frame_cannot_be_sent() -> None:
    with pytest.raises(Unsendable):
        publish_frames(row(headers=pack_headers((("wide", bytes(5_000)),))), 1, 4096)
