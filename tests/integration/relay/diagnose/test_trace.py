"""One timeline across all tables, asked by id, letter, key, correlation or trace; no payload is in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, insert
from sqlalchemy.orm import Session

from outboxkit import dead_letters, outbox, tables
from outboxkit.brokers import Delivery
from outboxkit.consumer import retries
from outboxkit.dead_letters import Filter, Stage, Terms, plan
from outboxkit.headers import wire_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from outboxkit.rows import Evidence, Part, Reading
from outboxkit_relay.diagnose.trace import Trace, trace

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SECRET = b'{"card": "CANARY-4711"}'


def _message(number: int, key: str = "42", **others: object) -> Message:
    values: dict[str, object] = {
        "id": str(uuid4()),
        "type": f"order.step{number}",
        "topic": "orders",
        "key": key.encode(),
        "payload": SECRET,
        "source": "shop",
        "content_type": "application/json",
        "correlation_id": "checkout-7",
        "occurred_at": datetime(2026, 11, 30, 12, 0, number, tzinfo=UTC),
        "headers": (("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode()), ("x-customer", b"CANARY-HEADER")),
    }
    return Message(**{**values, **others})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Told:
    """An order that was published and handled, what it caused, and a payment that died and is being replayed."""

    connection: Connection
    placed: Message
    paid: Message
    letter: str


@pytest.fixture
def told(engine: Engine) -> Iterator[Told]:
    placed = _message(1)
    paid, waiting = _message(2, causation_id=placed.id), _message(3, causation_id=placed.id)
    other = _message(4, key="43", correlation_id="checkout-8", headers=())
    with engine.begin() as connection:
        outbox.write(connection, [placed, other])
        _publish(connection)
        done = {"consumer": "shipping", "source": "shop", "message_id": placed.id, "outcome": b"CANARY-OUTCOME"}
        connection.execute(insert(tables.inbox_messages).values(done))
        letter = _bury(connection, paid)
        drafted = plan.draft(connection, [letter], Terms(force=True))
        replay = plan.freeze(connection, drafted, Terms(force=True), by="ana", why="OPS-9")
    with Session(engine) as session, session.begin():
        late = retries.FailedAttempt(timedelta(hours=1), 4, "KeyError: lines of code only")
        retries.defer(session, "mailing", _delivery(waiting), late)
    with engine.begin() as connection:
        plan.advance(connection, replay, limit=10)
    with engine.connect() as connection:
        yield Told(connection, placed, paid, str(letter))


def _publish(connection: Connection) -> None:
    everything = Part(frozenset(), only=False, seen=None)
    reading = Reading(shards=frozenset(range(tables.SHARDS)), parts=(everything,), limit=1)
    rows = outbox.read(connection, reading).rows
    evidence = Evidence(topic="orders", outcome="published", rows=rows, partitions=[3], offsets=[1881])
    outbox.remove(connection, uuid4(), [evidence])


def _delivery(message: Message) -> Delivery:
    origin = {"partition": 0, "offset": 1, "origin": "orders[0]@1"}
    headers = wire_headers(message)
    return Delivery(topic="orders", key=message.key, headers=headers, payload=SECRET, **origin)  # type: ignore[arg-type]


def _bury(connection: Connection, message: Message) -> UUID:
    how = {"consumer": "billing", "kind": "event", "failure": Failure.HANDLER, "stage": Stage.HANDLER, "attempts": 9}
    letter = dead_letters.of_delivery(_delivery(message), message, error=KeyError("currency"), **how)  # type: ignore[arg-type]
    assert dead_letters.bury(connection, letter) is not None
    return letter.id


def _words(found: Trace, message: Message) -> list[str]:
    return [step.what for step in found.steps if step.message_id == message.id]


def test_an_id_tells_the_whole_way_with_what_it_caused(told: Told) -> None:
    found = trace(told.connection, told.placed.id)

    assert _words(found, told.placed) == ["published", "handled"]
    words = _words(found, told.paid)
    assert words[:3] == ["emitted", "failed", "died"]
    assert set(words[3:]) == {"replay", "operator", "waits"}
    texts = "\n".join(step.text for step in found.steps)
    assert "acknowledged by the broker at orders[3]@1881" in texts
    assert "by shipping" in texts
    assert f"caused by {told.placed.id}" in texts
    assert "billing gave up after 9 attempts: KeyError" in texts
    assert "queued in the replay" in texts
    assert "of ana" in texts
    assert "in the outbox for orders" in texts
    assert "mailing tries it again" in texts
    assert "4 attempts so far" in texts
    assert found.is_whole


def test_it_is_asked_by_whatever_people_have(told: Told) -> None:
    for asked in ("42", "checkout-7", TRACE, told.letter, told.paid.id):
        found = trace(told.connection, asked)

        assert told.paid.id in {message.id for message in found.messages}, asked
        assert "43" not in {(message.key or b"").decode() for message in found.messages}, asked
        assert "died" in _words(found, told.paid), asked


def test_a_repaired_message_has_steps_of_its_own_and_the_old_one_names_it(engine: Engine) -> None:
    old = _message(1)
    with engine.begin() as connection:
        letter = _bury(connection, old)
        (decided,) = dead_letters.repair_and_replay(connection, {letter: b"{}"}, Terms(), by="ana", why="OPS-9")
        assert decided.action == "publish"
        (child,) = dead_letters.find(connection, Filter(state=None, parent_id=letter))

        before, after = trace(connection, old.id), trace(connection, child.message_id)

    assert f"repaired as {child.message_id} (letter {str(letter)[:8]})" in [step.text for step in before.steps]
    words = _words(after, child.message)
    assert not {"failed", "died"} & set(words)
    assert {"replay", "waits"} <= set(words)
    assert any(step.text.startswith(f"made of {old.id} by a repair") for step in after.steps)


def test_times_go_forward_and_what_is_so_now_comes_last(told: Told) -> None:
    times = [step.at for step in trace(told.connection, told.placed.id).steps]

    past = [at for at in times if at is not None]
    assert past == sorted(past)
    assert set(times[len(past) :]) == {None}


def test_what_is_stored_without_a_time_of_its_own_has_that_of_its_row(engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.write(connection, [_message(1, occurred_at=None)])

        emitted, waits = trace(connection, "42").steps

    assert emitted.what == "emitted"
    assert emitted.at is not None
    assert waits.what == "waits"


def test_no_payload_header_or_outcome_is_in_it(told: Told) -> None:
    found = trace(told.connection, "checkout-7")

    assert found.steps
    assert "CANARY" not in json.dumps([(step.text, dict(step.facts)) for step in found.steps], default=str)
    assert {message.payload for message in found.messages} == {b""}


def test_a_part_of_something_leads_nowhere(told: Told) -> None:
    for asked in ("1", "orders", "shop", str(uuid4()), "%", "", "\\xff", "a\udcff", "a\0b"):
        assert trace(told.connection, asked).steps == (), asked


def test_the_limit_is_said(told: Told) -> None:
    found = trace(told.connection, told.placed.id, limit=2)

    assert len({step.message_id for step in found.steps}) == 2
    assert not found.is_whole


def test_a_saga_is_found_by_its_key_and_by_its_conversation(told: Told) -> None:
    values = {"saga": "checkout", "key": "cart-9", "version": 1, "status": "running", "step": "pay", "at": 1}
    counts = {"number": 1, "tries": 0, "done": [], "undo": [], "state": b"CANARY", "history": []}
    told.connection.execute(insert(tables.outbox_sagas).values(**values, **counts, correlation_id="checkout-9"))

    for asked in ("cart-9", "checkout-9"):
        (step,) = trace(told.connection, asked).steps
        assert step.text == "the saga checkout of cart-9 is running at pay"
