"""A mistyped destination is mended: what a relay may have at the broker is refused, all else goes where it should."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, insert, select

from outboxkit import dead_letters, outbox, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters import Filter, State
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit_relay.diagnose.audit import audit
from outboxkit_relay.observe.sentences import to_text
from outboxkit_relay.observe.stats import Unavailable
from tests.consumer_fixture import order
from tests.unit.relay.cli.conftest import Outboxkit


def _pending(engine: Engine, count: int = 3, topic: str = "orderz") -> list[str]:
    messages = [order(number, topic=topic) for number in range(count)]
    with engine.begin() as connection:
        outbox.write(connection, messages)
    return [message.id for message in messages]


def _topics(engine: Engine) -> list[tuple[str, str]]:
    hot = tables.outbox_messages.c
    with engine.connect() as connection:
        rows = connection.execute(select(hot.topic, hot.message_id).order_by(hot.position))
        return [(topic, str(message_id)) for topic, message_id in rows]


def _relay(engine: Engine, state: str | None = None) -> None:
    lease = {"id": uuid4(), "host": "h", "version": "1", "expires_at": database_now(timedelta(minutes=1))}
    with engine.begin() as connection:
        connection.execute(insert(tables.outbox_relays).values(**lease, state=state))


def _missing(topic: str, failure: str = "unknown-topic") -> str:
    return to_text([Unavailable(topic=topic, failure=failure, reason="no topic", since=datetime.now(UTC), tries=3)])


def _paused(engine: Engine, since: timedelta) -> None:
    with engine.begin() as connection:
        pauses.pause(connection, Target(Scope.DESTINATION, "orderz"), by="ana", reason="mistyped")
        connection.execute(tables.outbox_control.update().values(set_at=database_now(-since)))


def test_all_messages_of_a_mistyped_destination_go_to_the_right_one_in_their_order(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    ids = _pending(engine)
    (later,) = _pending(engine, 1, "orders")

    dry = outboxkit("messages", "redirect", "--topic", "orderz", "--to", "orders", "--why", "x", "--dry-run")
    assert dry.code == 0
    assert dry.out.count("would be redirected to orders") == 3
    assert _topics(engine)[0][0] == "orderz"

    done = outboxkit("messages", "redirect", "--topic", "orderz", "--to", "orders", "--why", "OPS-9", "--yes", "--json")

    assert done.code == 0
    assert [json.loads(line)["outcome"] for line in done.out.splitlines()] == ["redirected to orders"] * 3
    assert _topics(engine) == [("orders", later), *(("orders", one) for one in ids)]
    (entry,) = map(json.loads, outboxkit("log", "--json").out.splitlines())
    assert (entry["action"], entry["why"]) == ("messages.redirect", "to orders: OPS-9")
    with engine.connect() as connection:
        assert audit(connection).contradictions == ()


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        ("alive", "relay pause orderz"),
        ("just paused", "ask again in"),
        ("long paused", ""),
        ("reported missing", ""),
        ("reported away", "relay pause orderz"),
        ("missing for one of two", "relay pause orderz"),
    ],
)
def test_what_a_relay_may_have_at_the_broker_is_refused(
    outboxkit: Outboxkit, engine: Engine, situation: str, reason: str
) -> None:
    (name,) = _pending(engine, 1)
    states = {"reported missing": _missing("orderz"), "reported away": _missing("orderz", "broker-down")}
    _relay(engine, states.get(situation))
    if situation == "missing for one of two":
        _relay(engine, _missing("orderz"))
    if "paused" in situation:
        _paused(engine, timedelta(seconds=5) if situation == "just paused" else timedelta(minutes=5))

    done = outboxkit("messages", "redirect", name, "--to", "orders", "--why", "x", "--yes")

    assert (done.code == 0) is (reason == "")
    assert reason in done.out
    assert _topics(engine)[0][0] == ("orderz" if reason else "orders")


def test_what_is_given_up_is_a_discarded_letter_and_stays_accounted_for(outboxkit: Outboxkit, engine: Engine) -> None:
    first, second = _pending(engine, 2)
    with engine.begin() as connection:
        outbox.schedule(connection, [(scheduled := order(7), timedelta(hours=1))])

    done = outboxkit("messages", "discard", first, scheduled.id, str(uuid4()), "--why", "a test order", "--yes")

    assert done.code == 4
    assert "outboxkit trace" in done.out
    assert [one for _, one in _topics(engine)] == [second]
    with engine.connect() as connection:
        letters = dead_letters.find(connection, Filter(state=State.DISCARDED))
        found = audit(connection)
    assert {letter.message_id for letter in letters} == {first, scheduled.id}
    assert all(letter.closed_at for letter in letters)
    assert found.contradictions == ()
    assert (found.emitted, found.accounts["discarded"], found.accounts["pending"]) == (3, 2, 1)


def test_what_waits_behind_a_failed_head_is_for_the_quarantine(outboxkit: Outboxkit, engine: Engine) -> None:
    with engine.begin() as connection:
        outbox.schedule(connection, [(message := order(7), timedelta(hours=1))])
        connection.execute(tables.outbox_waiting.update().values(reason="follower"))

    done = outboxkit("messages", "discard", message.id, "--why", "x", "--yes")

    assert done.code == 1
    assert "quarantine skip" in done.out


@pytest.mark.parametrize("verb", [("redirect", "--to", "orders"), ("discard",)])
def test_a_destination_that_nothing_goes_to_is_told(
    outboxkit: Outboxkit, engine: Engine, verb: tuple[str, ...]
) -> None:
    done = outboxkit("messages", *verb, "--topic", "ordres", "--why", "x", "--yes")

    assert (done.code, done.out, done.err) == (0, "", "no unpublished message goes to ordres: nothing to do\n")


def test_ids_or_a_destination_are_wanted(outboxkit: Outboxkit, engine: Engine) -> None:
    assert outboxkit("messages", "discard", "--why", "x").code == 2
    assert outboxkit("messages", "discard", "a", "--topic", "b", "--why", "x").code == 2


def test_a_message_is_shown_without_its_payload_unless_somebody_takes_responsibility(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    message = order(4711, headers=(("x-customer", b"CANARY-HEADER"),))
    with engine.begin() as connection:
        outbox.write(connection, [message])

    masked, revealed = outboxkit("messages", "show", message.id), outboxkit("messages", "show", message.id, "--reveal")

    assert masked.code == revealed.code == 0
    assert "ce_type: order.placed" in masked.out
    assert "bytes; --reveal shows it" in masked.out
    assert not {"4711", "CANARY-HEADER"} & set(masked.out.split())
    assert "4711" in revealed.out
    assert "CANARY-HEADER" in revealed.out
    assert "messages.reveal" in outboxkit("log").out
    assert outboxkit("messages", "show", str(UUID(int=7))).code == 3
