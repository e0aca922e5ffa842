"""Messages of an earlier version reach the handler of a later one through pure functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from outboxkit import schema_store
from outboxkit.codecs import codec_named
from outboxkit.consumer import Consumer
from outboxkit.errors import CaptureError, ConfigurationError
from outboxkit.events import event, event_type
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, impatient, letters, order


@event("parcel.sent", version=1, codec="avro")
@dataclass(frozen=True)
class SentV1:
    carrier: str


def to_v2(old: SentV1) -> SentV2:
    return SentV2(carrier=old.carrier, express=old.carrier == "rocket")


@event("parcel.sent", version=2, codec="avro", upcast=to_v2)
@dataclass(frozen=True)
class SentV2:
    carrier: str
    express: bool


def to_v3(old: SentV2) -> SentV3:
    if old.carrier == "nobody":
        raise KeyError(old.carrier)
    return SentV3(carrier=old.carrier, class_="express" if old.express else "normal")


@event("parcel.sent", version=3, codec="avro", upcast=to_v3)
@dataclass(frozen=True)
class SentV3:
    carrier: str
    class_: str


def sent(value: object, codec: str) -> Any:
    """A message of an event, written by its own version."""
    contract = event_type(value)
    encoded = codec_named(codec).encode(value, contract)
    facts = {"content_type": encoded.content_type, "schema": encoded.schema, "dataschema": contract.dataschema}
    return order(1, type="parcel.sent", payload=encoded.payload, **facts)


def resolve(fingerprint: str) -> str:
    texts = [codec_named("avro").schema_text(event_type(cls)) or "" for cls in (SentV1, SentV2, SentV3)]
    return {schema_store.fingerprint_of(text): text for text in texts}[fingerprint]


@pytest.mark.parametrize("codec", ["json", "avro"])
@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (SentV1("rocket"), SentV3("rocket", "express")),
        (SentV2("post", express=False), SentV3("post", "normal")),
        (SentV3("post", "slow"), SentV3("post", "slow")),
    ],
)
async def test_a_handler_gets_every_earlier_version_as_its_own(
    world: ConsumerFixture, value: object, seen: object, codec: str
) -> None:
    shipping = Consumer("shipping", sessions=world.asynchronous, retry=impatient(), resolve=resolve)
    found: list[object] = []

    @shipping.on(SentV3, topic="orders")
    async def ship(parcel: SentV3) -> None:
        found.append(parcel)

    world.send(sent(value, codec))
    await world.run(shipping)

    assert found == [seen]


async def test_a_version_with_a_handler_of_its_own_goes_there(world: ConsumerFixture) -> None:
    shipping = Consumer("shipping", sessions=world.asynchronous, retry=impatient())
    found: list[object] = []

    @shipping.on(SentV1, topic="orders")
    async def old(parcel: SentV1) -> None:
        found.append(parcel)

    @shipping.on(SentV3, topic="orders")
    async def new(parcel: SentV3) -> None:
        found.append(parcel)

    world.send(sent(SentV1("post"), "json"), sent(SentV2("post", express=True), "json"))
    await world.run(shipping)

    assert found == [SentV1("post"), SentV3("post", "express")]


async def test_an_upcast_that_cannot_take_a_message_makes_a_dead_letter_at_once(world: ConsumerFixture) -> None:
    shipping = Consumer("shipping", sessions=world.asynchronous, retry=impatient())

    @shipping.on(SentV3, topic="orders")
    async def ship(parcel: SentV3) -> None:
        raise AssertionError

    world.send(sent(SentV1("nobody"), "json"))
    await world.run(shipping)

    (letter,) = letters(world)
    assert (letter.failure.value, letter.stage.value, letter.attempts) == ("poison", "decode", 1)
    assert letter.error == "the upcast to_v3 raised KeyError"  # and not what the message holds


async def test_a_replay_of_an_earlier_version_is_not_refused(world: ConsumerFixture) -> None:
    """The later schema alone cannot read it: `express` has no default."""
    with world.engine.begin() as connection:
        schema_store.record(connection, "shipping", event_type(SentV2).readable)
        schema_store.record(connection, "stranger", [event_type(SentV2)])
        message = sent(SentV1("post"), "avro")

        assert not schema_store.refusal(connection, "shipping", message, resolve)
        assert "express" in schema_store.refusal(connection, "stranger", message, resolve)


def not_annotated(old): ...  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
def of_two(old: SentV1, other: int) -> SentV2: ...  # type: ignore[empty-body]
def of_a_stranger(old: OrderPlaced) -> SentV2: ...  # type: ignore[empty-body]
def of_nothing_known(old: Unknown) -> SentV2: ...  # type: ignore[empty-body, name-defined]  # noqa: F821
def of_no_event(old: ConsumerFixture) -> SentV2: ...  # type: ignore[empty-body]
def of_a_later_one(old: SentV3) -> SentV2: ...  # type: ignore[empty-body]
async def slowly(old: SentV1) -> SentV2: ...  # type: ignore[empty-body]


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        (not_annotated, ConfigurationError, "not_annotated: annotate its parameter with the event class"),
        (of_two, ConfigurationError, "a plain function of one event of an earlier version, not of_two"),
        (slowly, ConfigurationError, "a plain function of one event of an earlier version, not slowly"),
        (5, ConfigurationError, "a plain function of one event of an earlier version, not 5"),
        (of_a_stranger, ConfigurationError, "previous version of parcel.sent 2 cannot be order.placed 1"),
        (of_a_later_one, ConfigurationError, "previous version of parcel.sent 2 cannot be parcel.sent 3"),
        (of_nothing_known, ConfigurationError, "of_nothing_known: annotate its parameter"),
        (of_no_event, CaptureError, "ConsumerFixture is not an event"),
    ],
)
def test_what_is_no_upcast_is_refused_where_it_is_declared(
    function: Callable[[Any], object], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        event("parcel.sent", version=2, upcast=function)
