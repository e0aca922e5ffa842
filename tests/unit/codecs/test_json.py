"""The JSON codec: round trips by annotation, stable bytes, refusals with a path, hostile bytes."""

from __future__ import annotations

import base64
import contextlib
import enum
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboxkit.codecs import codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import DecodeError, EncodeError
from outboxkit.events import EventType, event, event_type
from outboxkit.message import Message

CODEC = codec_named("json")
PLAIN = EventType(name="facts")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Line:
    sku: str
    price: Decimal


@event("everything")
@dataclass(frozen=True)
class Everything:
    number: int
    ratio: float
    flag: bool
    text: str
    at: datetime
    day: date
    hour: time
    span: timedelta
    id: UUID
    price: Decimal
    raw: bytes
    colour: Colour
    maybe: int | None
    either: Literal["a", "b"]
    lines: list[Line]
    pair: tuple[int, str]
    many: tuple[int, ...]
    tags: frozenset[str]
    by: dict[str, Line]
    spare: list[int] = field(default_factory=list)


EVERYTHING = Everything(
    number=2**70,
    ratio=0.1,
    flag=True,
    text="käse\u2028\x00",
    at=datetime(2026, 11, 24, 8, 30, 1, 5, tzinfo=timezone(timedelta(hours=1))),
    day=date(2026, 11, 24),
    hour=time(8, 30),
    span=timedelta(days=-1, microseconds=7),
    id=UUID(int=7),
    price=Decimal("1.50"),
    raw=b"\x00\xff",
    colour=Colour.BLUE,
    maybe=None,
    either="a",
    lines=[Line("a", Decimal("0.10"))],
    pair=(1, "x"),
    many=(1, 2, 3),
    tags=frozenset({"b", "a"}),
    by={"k": Line("b", Decimal(2))},
)


def decode(data: bytes, declared: EventType = PLAIN) -> Any:
    message = Message(id="1", type="t", topic="t", payload=data)
    return from_plain(declared.cls, CODEC.decode(message, declared, lambda _: ""))


def encode(value: object, declared: EventType = PLAIN) -> bytes:
    return CODEC.encode(value, declared).payload


def test_every_kind_of_field_comes_back_as_it_was_annotated() -> None:
    declared = event_type(EVERYTHING)

    assert decode(encode(EVERYTHING, declared), declared) == EVERYTHING


def test_the_bytes_are_pinned() -> None:
    facts = {
        "b": 1,
        "a": [Decimal("1.0"), None, True],
        "s": {"y", "x"},
        "t": datetime(2026, 1, 2, tzinfo=UTC),
        "r": b"\0",
    }

    assert encode(facts) == b'{"b":1,"a":["1.0",null,true],"s":["x","y"],"t":"2026-01-02T00:00:00+00:00","r":"AA=="}'
    assert CODEC.encode(facts, PLAIN).content_type == "application/json"
    assert CODEC.schema_text(PLAIN) is None


@event("struct")
class Struct(msgspec.Struct, frozen=True):
    id: UUID
    lines: list[int]


@event("model")
class Model(pydantic.BaseModel):
    id: UUID
    at: datetime


@pytest.mark.parametrize(
    "value", [Struct(UUID(int=1), [1, 2]), Model(id=UUID(int=1), at=datetime(2026, 1, 1, tzinfo=UTC))], ids=["s", "m"]
)
def test_classes_of_other_libraries_come_back(value: Any) -> None:
    declared = event_type(value)

    assert decode(encode(value, declared), declared) == value


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (math.nan, ""),
        ({"a": [1.0, math.inf]}, "a[1]"),
        ({"a": {"b": Decimal("NaN")}}, "a.b"),
        ({"a": {1: 2}}, "a"),
        ({"a": {None: 2}}, "a"),
        ({"a": object()}, "a"),
        ({"a": {1, object}}, "a[]"),
        ({"a": ["\udc80"]}, "a[0]"),
        ({"a": {"\ud800": 1}}, "a.\\ud800"),
        ([Line("x", object())], "[0].price"),  # type: ignore[arg-type]
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_path(value: object, path: str) -> None:
    with pytest.raises(EncodeError) as caught:
        encode(value)

    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    knot: list[Any] = []
    knot.append(knot)

    with pytest.raises(EncodeError, match="contains itself"):
        encode(knot)


@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xff", 0),
        ('{"é": }'.encode(), 7),
        (b'{"a": NaN}', None),
        (b"-Infinity", None),
        (b"1e999", None),
        (b"1" * 10_000, None),
        (b"[" * 100_000, None),
        (b"[" * 102 + b"]" * 102, None),
        (b"", 0),
        (b"{} {}", 3),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", 3),
        (b"\xef\xbb\xbf\xff", 3),
        (b'{"a": 1, "a": 2}', None),
        (b'[{"b": {"a": 1, "\\u0061": 1}}]', None),
    ],
    ids=[
        "utf-8",
        "json",
        "nan",
        "infinity",
        "overflow",
        "digits",
        "depth",
        "limit",
        "empty",
        "two",
        "boms",
        "bom",
        "twice",
        "twice-inside",
    ],
)
def test_hostile_bytes_are_a_decode_error_and_nothing_else(data: bytes, offset: int | None) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data)

    assert caught.value.offset == offset


def test_a_hundred_levels_are_readable() -> None:
    assert decode(b"[" * 100 + b"]" * 100) is not None


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    with contextlib.suppress(DecodeError):  # any other error fails the test
        decode(data)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
)


@given(JSON)
def test_what_json_can_hold_comes_back(value: Any) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"number": "7"}, "number"),
        ({"number": True}, "number"),
        ({"text": 7}, "text"),
        ({"at": "yesterday"}, "at"),
        ({"id": "no"}, "id"),
        ({"price": "much"}, "price"),
        ({"raw": "*"}, "raw"),
        ({"colour": "green"}, "colour"),
        ({"maybe": "x"}, "maybe"),
        ({"lines": [{"sku": "a", "price": []}]}, "lines[0].price"),
        ({"lines": {}}, "lines"),
        ({"pair": [1]}, "pair"),
        ({"by": {"k": {"sku": 1, "price": "1"}}}, "by.k.sku"),
        ({"by": []}, "by"),
        ({"span": "P1Y"}, "span"),
    ],
)
def test_data_that_does_not_fit_the_class_is_refused_with_its_path(change: dict[str, Any], path: str) -> None:
    declared = event_type(Everything)
    plain: Any = CODEC.decode(
        Message(id="1", type="t", topic="t", payload=encode(EVERYTHING, declared)), declared, lambda _: ""
    )

    with pytest.raises(DecodeError) as caught:
        from_plain(Everything, {**plain, **change})

    assert caught.value.path == path
    assert path in str(caught.value)


def test_a_missing_field_is_named_and_a_new_one_is_ignored() -> None:
    with pytest.raises(DecodeError, match="sku") as caught:
        from_plain(Line, {"price": "1"})
    assert caught.value.path == "sku"

    assert from_plain(Line, {"sku": "a", "price": "1", "new": {}}) == Line("a", Decimal(1))


# --- pydantic ----------------------------------------------------------------------------------------------------


class Attachment(pydantic.BaseModel):
    content: bytes


@event("upload.finished")
class UploadFinished(pydantic.BaseModel):
    raw: bytes
    maybe: bytes | None = None
    many: list[bytes] = []
    pair: tuple[str, bytes] = ("", b"")
    by: dict[str, bytes] = {}
    attachment: Attachment | None = None
    attachments: list[Attachment] = []
    own: pydantic.Base64Bytes = b""
    limited: Annotated[bytes, pydantic.Field(max_length=4)] = b""
    either: str | bytes = ""
    name: str = pydantic.Field("", alias="fileName")
    at: datetime = datetime(2026, 11, 24, 8, 30, tzinfo=UTC)
    took: timedelta = timedelta(days=1, microseconds=7)
    price: Decimal = Decimal("1.50")


@given(raw=st.binary(max_size=20), text=st.text(max_size=5))
def test_bytes_of_a_pydantic_model_come_back_wherever_they_are(raw: bytes, text: str) -> None:
    told = UploadFinished(
        raw=raw,
        maybe=raw,
        many=[raw, b""],
        pair=(text, raw),
        by={text: raw},
        attachment=Attachment(content=raw),
        attachments=[Attachment(content=raw)],
        own=base64.b64encode(raw),
        limited=raw[:4],
        either=text,
        fileName=text,
    )
    declared = event_type(told)

    data = encode(told, declared)

    assert decode(data, declared) == told
    assert json.loads(data)["raw"] == base64.b64encode(raw).decode()


@pytest.mark.parametrize("raw", ["not base64", "YQ", "a===", "ä"])
def test_bytes_of_a_pydantic_model_that_are_no_base64_are_refused_with_their_path(raw: str) -> None:
    with pytest.raises(DecodeError, match="raw") as found:
        decode(json.dumps({"raw": raw}).encode(), event_type(UploadFinished))

    assert found.value.path == "raw"


def test_a_byte_order_mark_before_the_text_is_skipped() -> None:
    assert decode(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    with pytest.raises(DecodeError) as caught:
        decode(b"\xef\xbb\xbf{,}")
    assert caught.value.offset == 4


def test_finding_a_key_that_is_there_twice_is_not_slow() -> None:
    many = ",".join(f'"{number}":0' for number in range(100_000))

    with pytest.raises(DecodeError, match="'99999'"):
        decode(f'{{{many},"99999":1}}'.encode())
