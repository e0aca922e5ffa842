"""The schema of an event class, and whether a class and a schema file agree."""

from __future__ import annotations

import datetime as dt
import enum
import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType

import msgspec
import pydantic
import pytest

from outboxkit.avro import fingerprint
from outboxkit.avro.classes import Avro, disagreements, schema_of
from outboxkit.avro.model.parse import parse
from outboxkit.codecs import codec_named
from outboxkit.codecs.avro import decode, encode
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import SchemaError
from outboxkit.events import event, event_type
from outboxkit.message import Message

MONEY = {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}
OrderId = NewType("OrderId", int)


class State(enum.Enum):
    NEW = "NEW"
    PAID = "PAID"


@dataclass(frozen=True)
class Line:
    sku: str
    count: Annotated[int, Avro("int")] = 1


@dataclass(frozen=True)
class Order:
    order_id: OrderId
    total: Annotated[Decimal, Avro(MONEY)]
    placed_at: dt.datetime
    day: dt.date
    token: uuid.UUID
    weight: float
    blob: bytes
    lines: list[Line]
    more: tuple[Line, ...]
    tags: dict[str, bool]
    note: str | None = None
    channel: str | None = "web"
    state: State = State.NEW
    labels: list[str] = field(default_factory=list)
    made_at: dt.time = dt.time(9)


class LineStruct(msgspec.Struct):
    sku: str
    count: Annotated[int, Avro("int")] = 1


class OrderStruct(msgspec.Struct, kw_only=True):
    lines: list[LineStruct] = msgspec.field(default_factory=list)
    order_id: int
    note: str | None = None


class LineModel(pydantic.BaseModel):
    sku: str
    count: Annotated[int, Avro("int")] = 1


class OrderModel(pydantic.BaseModel):
    lines: list[LineModel] = pydantic.Field(default_factory=list)
    order_id: int
    note: str | None = None


@dataclass
class Tree:
    value: int
    children: list[Tree]


@dataclass
class Pair:
    left: Line
    right: Line


@dataclass
class Card:
    number: str


@dataclass
class Cash:
    amount: int


@dataclass
class Paid:
    by: Card | Cash


def test_a_dataclass_says_names_types_and_defaults() -> None:
    made = schema_of(Order, namespace="shop")

    line = {"name": "sku", "type": "string"}, {"name": "count", "type": "int", "default": 1}
    assert made["name"] == "shop.Order"
    assert {one["name"]: one["type"] for one in made["fields"]} == {
        "order_id": "long",
        "total": MONEY,
        "placed_at": {"type": "long", "logicalType": "timestamp-micros"},
        "day": {"type": "int", "logicalType": "date"},
        "token": {"type": "string", "logicalType": "uuid"},
        "weight": "double",
        "blob": "bytes",
        "lines": {"type": "array", "items": {"type": "record", "name": "shop.Line", "fields": list(line)}},
        "more": {"type": "array", "items": "shop.Line"},
        "tags": {"type": "map", "values": "boolean"},
        "note": ["null", "string"],
        "channel": ["string", "null"],
        "state": {"type": "enum", "name": "shop.State", "symbols": ["NEW", "PAID"]},
        "labels": {"type": "array", "items": "string"},
        "made_at": {"type": "long", "logicalType": "time-micros"},
    }
    defaults = {one["name"]: one["default"] for one in made["fields"] if "default" in one}
    assert defaults == {"note": None, "channel": "web", "state": "NEW", "labels": []}


def test_an_event_is_written_and_read_by_the_schema_of_its_class() -> None:
    schema = parse(schema_of(Order))
    order = Order(
        order_id=OrderId(7),
        total=Decimal("12.50"),
        placed_at=dt.datetime(2026, 11, 24, 9, 30, tzinfo=dt.UTC),
        day=dt.date(2026, 11, 24),
        token=uuid.UUID(int=5),
        weight=0.5,
        blob=b"\x00",
        lines=[Line("a", 2)],
        more=(Line("b"),),
        tags={"x": True},
        state=State.PAID,
    )

    assert from_plain(Order, decode(schema, schema, encode(schema, order))) == order


@pytest.mark.parametrize(("cls", "line"), [(OrderStruct, "LineStruct"), (OrderModel, "LineModel")])
def test_msgspec_and_pydantic_say_the_same(cls: type, line: str) -> None:
    record = {
        "type": "record",
        "name": line,
        "fields": [{"name": "sku", "type": "string"}, {"name": "count", "type": "int", "default": 1}],
    }
    assert schema_of(cls) == {
        "type": "record",
        "name": cls.__name__,
        "fields": [
            {"name": "lines", "type": {"type": "array", "items": record}, "default": []},
            {"name": "order_id", "type": "long"},
            {"name": "note", "type": ["null", "string"], "default": None},
        ],
    }
    assert disagreements(cls, parse(schema_of(cls))) == []


@pytest.mark.parametrize("cls", [Order, Tree, Pair])
def test_a_class_agrees_with_its_own_schema(cls: type) -> None:
    assert disagreements(cls, parse(schema_of(cls))) == []


def test_a_class_that_chose_avro_needs_no_file() -> None:
    @event("line.added", codec="avro")
    @dataclass
    class Added:
        sku: str
        count: int = 1

    codec, contract = codec_named("avro"), event_type(Added)
    made = codec.encode(Added("a"), contract)
    message = Message(id="1", type="line.added", topic="t", payload=made.payload, schema=made.schema)

    assert made.schema == fingerprint(parse(schema_of(Added))).hex()
    assert codec.decode(message, contract, lambda _: codec.schema_text(contract) or "") == {"sku": "a", "count": 1}


def _with(**types: Any) -> type:
    return dataclass(type("Wrong", (), {"__annotations__": types}))


@pytest.mark.parametrize(
    ("hint", "why"),
    [
        (Decimal, r"Wrong\.x: Avro has no type for Decimal; say one: Annotated"),
        (dt.timedelta, r"Wrong\.x: Avro has no type for timedelta"),
        (dict[int, str], r"Wrong\.x: the keys of an Avro map are text"),
        (list[Decimal], r"Wrong\.x\[\]: Avro has no type"),
        (tuple[int, str], r"Wrong\.x: Avro has no type"),
        (Any, r"Wrong\.x: Avro has no type for Any"),
    ],
)
def test_what_avro_does_not_have_is_refused_with_its_field(hint: Any, why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        schema_of(_with(x=hint))


def test_two_classes_of_one_name_are_refused() -> None:
    other: type = dataclass(type("Line", (), {"__annotations__": {"x": int}}))

    with pytest.raises(SchemaError, match="two classes are called Line"):
        schema_of(_with(a=Line, b=other))
    with pytest.raises(SchemaError, match="int is no dataclass"):
        schema_of(int)


AGREEING: list[tuple[Any, Any]] = [
    (int, "int"),
    (float, "float"),
    (str, {"type": "enum", "name": "E", "symbols": ["A"]}),
    (dt.datetime, {"type": "long", "logicalType": "timestamp-millis"}),
    (Decimal, {"type": "fixed", "name": "F", "size": 8, "logicalType": "decimal", "precision": 9}),
    (bytes, {"type": "fixed", "name": "F", "size": 2}),
    (uuid.UUID | None, ["null", {"type": "string", "logicalType": "uuid"}]),
    (set[int], {"type": "array", "items": "long"}),
    (dict[str, Any], {"type": "map", "values": "long"}),
    (Any, "null"),
    (Literal["a", "b"], "string"),
    (int | str, ["string", "long"]),
]


@pytest.mark.parametrize(("hint", "avro"), AGREEING)
def test_what_fits_is_not_disputed(hint: Any, avro: Any) -> None:
    schema = parse({"type": "record", "name": "Wrong", "fields": [{"name": "x", "type": avro}]})

    assert disagreements(_with(x=hint), schema) == []


DISPUTED: list[tuple[Any, Any, str]] = [
    (int, "string", "Wrong.x: the class has int, the schema string"),
    (str, ["null", "string"], "Wrong.x: the schema may hold null, which the class does not take"),
    (str | None, "string", "Wrong.x: the class has None, the schema string"),
    (list[int], {"type": "array", "items": "string"}, "Wrong.x[]: the class has int, the schema string"),
    (dict[str, int], {"type": "map", "values": "bytes"}, "Wrong.x{}: the class has int, the schema bytes"),
    (str, {"type": "string", "logicalType": "uuid"}, "Wrong.x: the class has str, the schema uuid"),
    (dt.datetime, "long", "Wrong.x: the class has datetime, the schema long"),
    (Decimal, "double", "Wrong.x: the class has Decimal, the schema double"),
    (
        State,
        {"type": "enum", "name": "State", "symbols": ["NEW", "GONE"]},
        "Wrong.x: the schema lacks the symbol PAID; Wrong.x: the class lacks the symbol GONE",
    ),
    (
        Line,
        {"type": "record", "name": "L", "fields": [{"name": "sku", "type": "string"}, {"name": "n", "type": "int"}]},
        (
            "Wrong.x.count: the schema has no such field; "
            "Wrong.x.n: the class has no such field, and the schema no default for it"
        ),
    ),
]


@pytest.mark.parametrize(("hint", "avro", "said"), DISPUTED)
def test_what_does_not_fit_is_told_with_its_path(hint: Any, avro: Any, said: str) -> None:
    schema = parse({"type": "record", "name": "Wrong", "fields": [{"name": "x", "type": avro}]})

    assert "; ".join(disagreements(_with(x=hint), schema)) == said


def test_of_several_records_the_one_of_the_name_is_meant() -> None:
    made = schema_of(Paid)
    assert disagreements(Paid, parse(made)) == []

    made["fields"][0]["type"][1]["fields"][0]["type"] = "string"
    assert disagreements(Paid, parse(made)) == ["Paid.by.amount: the class has int, the schema string"]


def test_a_field_that_only_the_schema_has_is_fine_with_a_default() -> None:
    fields = [{"name": "x", "type": "int"}, {"name": "y", "type": "int", "default": 0}]

    assert disagreements(_with(x=int), parse({"type": "record", "name": "Wrong", "fields": fields})) == []
