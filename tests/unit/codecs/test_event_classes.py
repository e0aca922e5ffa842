"""Event classes of every kind: what is written is what the class itself says, and what is read is what was written."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID

import msgspec
import pydantic
import pydantic.alias_generators
import pydantic.dataclasses
import pytest

from outboxkit.codecs import codec_named
from outboxkit.codecs.plain import from_plain
from outboxkit.errors import DecodeError, EncodeError
from outboxkit.events import event, event_type
from outboxkit.message import Message

CODEC = codec_named("json")
ID = UUID(int=7)
T = TypeVar("T")


def written(value: object) -> Any:
    return json.loads(CODEC.encode(value, event_type(value)).payload)


def read(cls: type, payload: bytes | str) -> Any:
    data = payload.encode() if isinstance(payload, str) else payload
    message = Message(id="1", type="t", topic="t", payload=data)
    return from_plain(cls, CODEC.decode(message, event_type(cls), lambda _: ""))


def back(value: Any) -> Any:
    return read(type(value), CODEC.encode(value, event_type(value)).payload)


# --- pydantic ----------------------------------------------------------------------------------------------------


class Card(pydantic.BaseModel):
    number: str

    @pydantic.field_serializer("number", when_used="json")
    def mask(self, number: str) -> str:
        return f"****{number[-4:]}"


@event("customer.changed")
class Customer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(alias_generator=pydantic.alias_generators.to_camel, validate_by_name=True)

    customer_id: int
    password: str = pydantic.Field(default="", exclude=True)
    card: Card | None = None
    raw: bytes = b""
    took: timedelta = timedelta(days=1, seconds=2)

    @pydantic.computed_field
    def display_name(self) -> str:
        return f"customer {self.customer_id}"


def test_a_pydantic_model_is_written_by_its_own_dump() -> None:
    found = written(Customer(customer_id=1, password="secret", card=Card(number="4111111111111234"), raw=b"\x01"))

    assert found == {
        "customerId": 1,
        "card": {"number": "****1234"},
        "raw": "AQ==",
        "took": "P1DT2S",
        "displayName": "customer 1",
    }


def test_bytes_that_are_no_text_are_written_beside_a_serialiser_for_json_or_refused() -> None:
    with pytest.raises(EncodeError, match="Customer"):
        written(Customer(customer_id=1, raw=b"\xff"))


def test_a_pydantic_model_comes_back_by_its_aliases() -> None:
    told = Customer(customer_id=1, raw=b"\x01", took=timedelta(minutes=3))

    assert back(told) == told
    assert read(Customer, '{"customer_id": 4}').customer_id == 4


@event("two.names")
class TwoNames(pydantic.BaseModel):
    total: int = pydantic.Field(serialization_alias="amountOut", validation_alias="amount_in")
    other: int = pydantic.Field(default=0, validation_alias=pydantic.AliasChoices("first", "second"))


@event("sealed")
class Sealed(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    total: int

    @pydantic.computed_field(alias="doubled")
    def double(self) -> int:
        return 2 * self.total


@event("strict")
class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    at: datetime
    price: Decimal
    id: UUID


@event("wrapped")
class Wrapped(pydantic.BaseModel):
    total: int

    @pydantic.model_serializer(mode="wrap")
    def more(self, handler: Any) -> dict[str, Any]:
        return {**handler(self), "unit": "EUR"}


@event("pydantic.dataclass")
@pydantic.dataclasses.dataclass
class Own:
    total: Decimal
    password: str = pydantic.Field(default="", exclude=True)
    name: str = pydantic.Field(default="x", alias="fullName")


@event("urls")
class Linked(pydantic.BaseModel):
    url: pydantic.AnyUrl
    tags: set[str] = set()


@pytest.mark.parametrize(
    "told",
    [
        TwoNames(amount_in=4, first=2),
        Sealed(total=3),
        Strict(at=datetime(2026, 1, 1, tzinfo=UTC), price=Decimal("1.10"), id=ID),
        Wrapped(total=1),
        Own(total=Decimal("1.10"), fullName="y"),
        Linked(url=pydantic.AnyUrl("https://example.org/a")),
    ],
    ids=lambda told: type(told).__name__,
)
def test_what_a_pydantic_class_writes_it_reads(told: Any) -> None:
    assert back(told) == told


def test_a_pydantic_dataclass_keeps_its_exclusions_and_aliases() -> None:
    assert written(Own(total=Decimal(1), password="secret", fullName="y")) == {"total": "1", "fullName": "y"}
    assert written(Wrapped(total=1)) == {"total": 1, "unit": "EUR"}


def test_a_pydantic_model_inside_a_dataclass_is_written_by_its_own_dump() -> None:
    @event("order.paid")
    @dataclass
    class Paid:
        customer: Customer

    assert "password" not in written(Paid(Customer(customer_id=1, password="secret")))["customer"]
    assert back(Paid(Customer(customer_id=1))) == Paid(Customer(customer_id=1))


def test_what_a_pydantic_class_excludes_is_not_written_as_avro_either() -> None:
    @event("account.made", codec="avro")
    class Account(pydantic.BaseModel):
        number: int
        password: str = pydantic.Field(default="", exclude=True)

    codec, contract = codec_named("avro"), event_type(Account)
    encoded = codec.encode(Account(number=1, password="secret"), contract)

    assert b"secret" not in encoded.payload
    assert "password" not in (codec.schema_text(contract) or "")


@event("with.secret")
class WithSecret(pydantic.BaseModel):
    token: pydantic.SecretStr


@event("lost")
class Lost(pydantic.BaseModel):
    password: str = pydantic.Field(exclude=True)


@event("not.a.number")
class NotANumber(pydantic.BaseModel):
    ratio: float
    url: pydantic.AnyUrl = pydantic.AnyUrl("https://example.org")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (WithSecret(token=pydantic.SecretStr("x")), "SecretStr"),
        (Lost(password="x"), "password is excluded"),
        (NotANumber(ratio=float("nan")), "nan"),
    ],
)
def test_what_a_pydantic_class_could_not_read_back_is_refused_at_emit(value: object, why: str) -> None:
    with pytest.raises(EncodeError, match=why):
        written(value)


def test_numbers_of_others_come_into_decimals_by_their_text() -> None:
    class Money(pydantic.BaseModel):
        amount: Decimal
        ratio: float = 0.0

    event("money")(Money)

    assert read(Money, '{"amount": 0.10, "ratio": 0.5}') == Money(amount=Decimal("0.10"), ratio=0.5)
    assert str(read(Money, '{"amount": 0.12345678901234567890123}').amount) == "0.12345678901234567890123"


# --- msgspec -----------------------------------------------------------------------------------------------------


@event("shipped")
class Shipped(msgspec.Struct, rename="camel", tag="shipped", omit_defaults=True):
    order_id: int
    raw: bytes = b""
    took: timedelta = timedelta(0)
    price: Decimal = Decimal(0)


class Circle(msgspec.Struct, tag=True):
    size: int


class Square(msgspec.Struct, tag=True):
    size: int


@event("drawn")
class Drawn(msgspec.Struct):
    shape: Circle | Square


def test_a_struct_is_written_by_its_own_names_and_tag() -> None:
    assert written(Shipped(7, price=Decimal("1.10"))) == {"type": "shipped", "orderId": 7, "price": "1.10"}


@pytest.mark.parametrize(
    "told",
    [
        Shipped(7, b"\xff", timedelta(days=-1, microseconds=7), Decimal("1.10")),
        Drawn(Square(3)),
        Drawn(Circle(3)),
    ],
    ids=repr,
)
def test_what_a_struct_writes_it_reads(told: Any) -> None:
    assert back(told) == told


def test_another_tag_is_another_class() -> None:
    with pytest.raises(DecodeError, match="tag"):
        read(Shipped, '{"type": "returned", "orderId": 7}')
    assert read(Shipped, '{"type": "shipped", "orderId": 7, "price": 1.10}').price == Decimal("1.10")


# --- dataclasses and what stands in their fields -----------------------------------------------------------------


class Pair(NamedTuple):
    left: UUID
    right: int = 0


class Typed(TypedDict):
    id: UUID
    note: typing.NotRequired[str]


OrderId = NewType("OrderId", UUID)


class When(Enum):
    FIRST = date(2026, 1, 1)
    LAST = date(2026, 12, 31)


class Colour(Enum):
    RED = UUID(int=1)


@dataclass(frozen=True)
class Envelope(Generic[T]):
    body: T


@event("unusual")
@dataclass(frozen=True, slots=True)
class Unusual:
    pair: Pair
    typed: Typed
    number: OrderId
    when: When
    colour: Colour
    envelope: Envelope[UUID]
    anything: Any
    many: list[Any]
    by: dict[str, Any]
    marked: typing.Annotated[Decimal, "EUR"]
    either: Literal["a", "b"] = "a"
    kept: str = field(default="default", init=False)


def test_unusual_fields_come_back_as_they_are_annotated() -> None:
    told = Unusual(
        pair=Pair(ID, 1),
        typed={"id": ID},
        number=OrderId(ID),
        when=When.LAST,
        colour=Colour.RED,
        envelope=Envelope(ID),
        anything={"a": [1, None]},
        many=[1, "b", None],
        by={"a": 1.5},
        marked=Decimal("1.10"),
    )
    object.__setattr__(told, "kept", "changed")

    assert back(told) == told


@dataclass(frozen=True)
class Cash:
    amount: int


@dataclass(frozen=True)
class CreditCard:
    amount: int
    number: str = ""


class Voucher(pydantic.BaseModel):
    amount: int
    code: str = pydantic.Field(alias="voucherCode")


@event("paid.by")
@dataclass(frozen=True)
class PaidBy:
    means: Cash | CreditCard | Voucher | dict[str, Any] | None


@pytest.mark.parametrize(
    "means", [Cash(1), CreditCard(1, "4111"), Voucher(amount=1, voucherCode="x"), {"iban": "DE", "amount": 1}, None]
)
def test_one_of_several_classes_comes_back_as_the_one_that_was_written(means: Any) -> None:
    assert back(PaidBy(means)) == PaidBy(means)


def test_a_class_that_a_decorator_above_made_anew_comes_back_as_that_class() -> None:
    @dataclass(slots=True)
    @event("slotted")
    class Slotted:
        total: int

    assert type(back(Slotted(1))) is Slotted


def test_a_dataclass_that_needs_what_is_not_written_is_refused_at_emit() -> None:
    @event("needs")
    @dataclass
    class Needs:
        total: int
        factor: dataclasses.InitVar[int]

    with pytest.raises(EncodeError, match="factor"):
        written(Needs(1, 2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("P1DT2S", timedelta(days=1, seconds=2)),
        ("PT1H30M", timedelta(hours=1, minutes=30)),
        ("-P0DT0.000007S", timedelta(microseconds=-7)),
        ("P2D", timedelta(days=2)),
        ("PT0.5S", timedelta(milliseconds=500)),
    ],
)
def test_durations_of_others_are_read(text: str, expected: timedelta) -> None:
    @event("took")
    @dataclass
    class Took:
        long: timedelta

    assert read(Took, json.dumps({"long": text})).long == expected


@pytest.mark.parametrize("text", ["P", "PT", "P1Y", "P1DT", "1 day", "P٣D"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    @event("took")
    @dataclass
    class Took:
        long: timedelta

    with pytest.raises(DecodeError, match="long"):
        read(Took, json.dumps({"long": text}))


# --- decimals ----------------------------------------------------------------------------------------------------


@event("price")
@dataclass
class Price:
    amount: Decimal


@pytest.mark.parametrize("number", ["12.5", "0.10", "20", "1e3", "-0.12345678901234567890123", '"1.50"', '"1E+3"'])
def test_a_decimal_is_read_digit_for_digit(number: str) -> None:
    assert str(read(Price, f'{{"amount": {number}}}').amount) == str(Decimal(number.strip('"')))


ABSURD: dict[str, Callable[[], object]] = {
    "1e-999999999": lambda: read(Price, '{"amount": 1e-999999999}'),
    "text 1E+999999": lambda: read(Price, '{"amount": "1E+999999"}'),
    "text NaN": lambda: read(Price, '{"amount": "NaN"}'),
    "text Infinity": lambda: read(Price, '{"amount": "Infinity"}'),
    "text 1_000": lambda: read(Price, '{"amount": "1_000"}'),
    "text with spaces": lambda: read(Price, '{"amount": " 1 "}'),
    "long text": lambda: read(Price, json.dumps({"amount": "1" * 5000})),
    "bool": lambda: read(Price, '{"amount": true}'),
}


@pytest.mark.parametrize("absurd", ABSURD.values(), ids=ABSURD)
def test_an_absurd_decimal_is_refused_on_the_way_in(absurd: Callable[[], object]) -> None:
    with pytest.raises(DecodeError):
        absurd()


@pytest.mark.parametrize("amount", [Decimal("1E+999999"), Decimal("1E-5000"), Decimal("sNaN"), Decimal("-Infinity")])
def test_an_absurd_decimal_is_refused_on_the_way_out(amount: Decimal) -> None:
    with pytest.raises(EncodeError, match="amount"):
        written(Price(amount))


def test_two_keys_that_become_one_are_refused_on_the_way_out() -> None:
    class Region(Enum):
        EU = "eu"

    @event("by.region")
    @dataclass
    class ByRegion:
        total: dict[Any, int]

    with pytest.raises(EncodeError, match="'eu'"):
        written(ByRegion({Region.EU: 1, "eu": 2}))


def test_a_number_with_too_many_digits_is_an_encode_error() -> None:
    @event("huge")
    @dataclass
    class Huge:
        number: int

    with pytest.raises(EncodeError, match="digits"):
        written(Huge(10**5000))


def test_what_json_cannot_hold_is_told_in_plain_words() -> None:
    with pytest.raises(EncodeError, match=r"^amount is of type object, which JSON cannot hold"):
        written(Price(object()))  # type: ignore[arg-type]
