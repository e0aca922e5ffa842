"""Letters travel byte for byte, and those of other tools become letters of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outboxkit import dead_letters
from outboxkit.brokers import Delivery
from outboxkit.dead_letters import DeadLetter, Filter, Stage
from outboxkit.dead_letters.transfer import as_record, from_record, of_foreign
from outboxkit.errors import ReplayError
from outboxkit.headers import unpack_headers, wire_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, order


def stored(world: ConsumerFixture, message: Message | None = None) -> DeadLetter:
    sent = message or order(1, key=None, payload=b"\x00\xff", headers=(("tenant", b"\xff\x00"),))
    delivery = Delivery(topic="orders", key=b"\x00k", headers=wire_headers(sent), payload=sent.payload, origin="o")
    letter = dead_letters.of_delivery(
        delivery, sent, consumer="billing", kind="event", failure=Failure.HANDLER, stage=Stage.HANDLER,
        error=KeyError("x"), attempts=3,
    )  # fmt: skip
    with world.engine.begin() as connection:
        dead_letters.bury(connection, letter)
        (found,) = dead_letters.find(connection, Filter())
    return found


def test_a_letter_is_the_same_after_a_journey_as_json(world: ConsumerFixture) -> None:
    letter = stored(world)

    assert from_record(json.loads(json.dumps(as_record(letter)))) == letter


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"payload": "not base64!"}, "payload is 'not base64!'"),
        ({"id": "7"}, "id is '7'"),
        ({"died_at": "yesterday"}, "died_at is 'yesterday'"),
        ({"state": "asleep"}, "asleep"),
        ({"key": 7}, "key is '7'"),
    ],
)
def test_what_is_no_letter_is_refused_by_its_field(world: ConsumerFixture, change: dict[str, Any], told: str) -> None:
    record = as_record(stored(world))

    with pytest.raises(ReplayError, match=told):
        from_record({**record, **change})
    with pytest.raises(ReplayError, match="it has no 'attempts'"):
        from_record({name: value for name, value in record.items() if name != "attempts"})


def foreign(*headers: tuple[str, bytes]) -> DeadLetter | None:
    ours = (("ce_id", b"7"), ("ce_type", b"order.placed"), ("content-type", b"application/json"), ("tenant", b"a"))
    return of_foreign(
        Delivery(topic="orders-dlt", key=b"k", headers=(*ours, *headers), payload=b"{}", origin="orders-dlt[0]@3")
    )


SPRING = (
    ("kafka_dlt-original-topic", b"orders"),
    ("kafka_dlt-original-partition", (2).to_bytes(4, "big")),
    ("kafka_dlt-original-offset", (1881).to_bytes(8, "big")),
    ("kafka_dlt-original-consumer-group", b"billing"),
    ("kafka_dlt-exception-fqcn", b"org.springframework.kafka.listener.ListenerExecutionFailedException"),
    ("kafka_dlt-exception-cause-fqcn", b"java.lang.IllegalStateException"),
    ("kafka_dlt-exception-message", b"card 4711 is not valid"),
)
CONNECT = (
    ("__connect.errors.topic", b"orders"),
    ("__connect.errors.partition", b"2"),
    ("__connect.errors.offset", b"1881"),
    ("__connect.errors.connector.name", b"billing"),
    ("__connect.errors.exception.class.name", b"java.lang.IllegalStateException"),
    ("__connect.errors.exception.message", b"card 4711 is not valid"),
)


@pytest.mark.parametrize("headers", [SPRING, CONNECT], ids=["spring", "connect"])
def test_a_message_that_another_tool_gave_up_is_a_letter(headers: tuple[tuple[str, bytes], ...]) -> None:
    letter = foreign(*headers)

    assert letter is not None
    assert (letter.topic, letter.consumer, letter.source_position) == ("orders", "billing", 1881)
    assert letter.origin == "orders[2]@1881 by way of orders-dlt[0]@3"
    assert (letter.message_id, letter.type, letter.error_class) == (
        "7",
        "order.placed",
        "java.lang.IllegalStateException",
    )
    assert dict(unpack_headers(letter.headers))["tenant"] == b"a"
    assert "kafka_dlt" not in str(letter.headers)
    assert "connect.errors" not in str(letter.headers)
    assert "4711" not in letter.error


def test_a_message_that_rabbitmq_dead_lettered_is_a_letter() -> None:
    letter = foreign(
        ("x-first-death-queue", b"orders.billing"), ("x-first-death-exchange", b"orders"),
        ("x-first-death-reason", b"delivery_limit"), ("x-delivery-count", b"20"),
    )  # fmt: skip

    assert letter is not None
    assert (letter.topic, letter.attempts) == ("orders", 20)
    assert letter.origin == "queue orders.billing by way of orders-dlt[0]@3"
    assert letter.error_class == "delivery_limit"


def test_a_message_that_nobody_dead_lettered_is_none() -> None:
    assert foreign() is None
