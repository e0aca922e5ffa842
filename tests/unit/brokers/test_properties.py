"""Whatever a foreign client writes into the properties of a message, it is read, or kept in its bytes."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.exceptions import UnmarshalingException
from pamqp.frame import unmarshal

from outboxkit.brokers.rabbitmq.properties import RAW_PROPERTIES, read_properties

NANOSECONDS = 1_790_000_000_123_456_789


def raw(**properties: object) -> bytes:
    """As an independent encoder writes them."""
    return Basic.Properties(**properties).marshal()  # type: ignore[arg-type]


def with_table(entries: bytes) -> bytes:
    return struct.pack(">HI", 1 << 13, len(entries)) + entries


def entry(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + value


def long(tag: bytes, value: bytes) -> bytes:
    return tag + struct.pack(">I", len(value)) + value


def refuses(properties: bytes) -> bool:
    """Whether the client library gives the connection up over them."""
    body = struct.pack(">HHQ", 60, 0, 0) + properties
    try:
        unmarshal(struct.pack(">BHI", 2, 1, len(body)) + body + b"\xce")
    except (UnmarshalingException, ArithmeticError, RecursionError, ValueError):
        return True
    return False


def test_every_property_that_has_a_header_becomes_one() -> None:
    properties = read_properties(
        raw(
            content_type="text/plain",
            content_encoding="gzip",
            correlation_id="c",
            reply_to="answers",
            expiration="1000",
            message_id="m",
            timestamp=datetime(2026, 1, 1, tzinfo=UTC),
            message_type="t",
            user_id="u",
            app_id="a",
            delivery_mode=2,
            priority=3,
        )
    )

    assert dict(properties.headers) == {
        "content-type": b"text/plain",
        "ce_correlationid": b"c",
        "ce_id": b"m",
        "ce_type": b"t",
        "ce_source": b"a",
        "content-encoding": b"gzip",
        "reply-to": b"answers",
        "expiration": b"1000",
        "user-id": b"u",
    }
    assert properties.timestamp == datetime(2026, 1, 1, tzinfo=UTC)
    assert (properties.reply_to, properties.content_encoding) == ("answers", "gzip")
    assert properties.fault is None


def test_values_of_every_type_are_bytes() -> None:
    table = {
        "text": "ü",
        "blob": bytearray(b"\xff"),
        "on": True,
        "small": -3,
        "large": 1 << 40,
        "half": 0.5,
        "price": Decimal("12.50"),
        "none": None,
        "when": datetime(2026, 1, 1, tzinfo=UTC),
        "list": ["a", 2],
        "table": {"a": {"b": [1, True, "x"]}},
        "cloudEvents:type": "ours",
        "cloudEvents_source": "theirs",
    }

    headers = read_properties(raw(headers=table)).headers

    assert sorted(headers) == sorted((
        ("text", "ü".encode()),
        ("blob", b"\xff"),
        ("on", b"true"),
        ("small", b"-3"),
        ("large", b"1099511627776"),
        ("half", b"0.5"),
        ("price", b"12.50"),
        ("none", b""),
        ("when", b"2026-01-01T00:00:00+00:00"),
        ("list", b"a"),
        ("list", b"2"),
        ("table", b'{"a": {"b": [1, true, "x"]}}'),
        ("ce_type", b"ours"),
        ("ce_source", b"theirs"),
    ))


@pytest.mark.parametrize(
    ("properties", "header"),
    [
        (with_table(entry(b"at", b"T" + struct.pack(">Q", NANOSECONDS))), ("at", str(NANOSECONDS).encode())),
        (
            with_table(entry(b"n", long(b"F", entry(b"at", b"T" + b"\xff" * 8)))),
            ("n", b'{"at": 18446744073709551615}'),
        ),
        (with_table(entry(b"n", long(b"A", b"T" + b"\xff" * 8))), ("n", b"18446744073709551615")),
        (with_table(entry(b"gr\xf6\xdfe", long(b"S", b"x"))), ("gr\\xf6\\xdfe", b"x")),
        (struct.pack(">H", 1 << 7) + b"\x02\xff\xfe", ("ce_id", b"\xff\xfe")),
        (struct.pack(">H", 1 << 5) + b"\x01\xff", ("ce_type", b"\xff")),
    ],
)
def test_what_the_client_library_cannot_express_is_read_all_the_same(
    properties: bytes, header: tuple[str, bytes]
) -> None:
    assert refuses(properties)

    read = read_properties(properties)

    assert read.headers == (header,)
    assert read.fault is None


def test_a_timestamp_that_is_no_time_is_left_out() -> None:
    properties = struct.pack(">HQ", 1 << 6, NANOSECONDS)
    assert refuses(properties)

    assert read_properties(properties).timestamp is None
    assert read_properties(properties).fault is None


def test_a_timestamp_in_milliseconds_is_a_time() -> None:
    assert read_properties(struct.pack(">HQ", 1 << 6, 1_767_225_600_000)).timestamp == datetime(2026, 1, 1, tzinfo=UTC)


def test_a_table_in_a_thousand_tables_stays_bytes() -> None:
    value = b"V"
    for _ in range(2_000):
        value = long(b"F", entry(b"a", value))
    properties = with_table(entry(b"deep", value))
    assert refuses(properties)

    read = read_properties(properties)

    assert read.fault is None
    assert [name for name, _ in read.headers] == ["deep"]


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\x20",
        with_table(entry(b"a", b"?")),
        with_table(entry(b"a", long(b"S", b"xy"))[:-1])[:-1],
        struct.pack(">H", 1 << 7) + b"\x05ab",
        struct.pack(">HI", 1 << 13, 99),
    ],
)
def test_what_cannot_be_read_is_kept_in_its_bytes_and_says_why(broken: bytes) -> None:
    read = read_properties(broken)

    assert read.fault is not None
    assert read.headers == ((RAW_PROPERTIES, broken),)


@given(st.binary(max_size=200))
def test_reading_never_raises(data: bytes) -> None:
    read = read_properties(data)

    assert read.fault is None or read.headers == ((RAW_PROPERTIES, data),)


@given(st.binary(max_size=120))
def test_reading_a_table_never_raises(data: bytes) -> None:
    read_properties(with_table(data))
