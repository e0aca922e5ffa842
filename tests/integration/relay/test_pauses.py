"""Pauses by destination, type and key, on real databases: stored, obeyed, and ended in order."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine, select, update

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.errors import ConfigurationError
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit.policy import Order
from outboxkit.rows import PauseSet
from outboxkit_relay.core.state import RelayConfig
from tests.integration.relay.world import ScriptedPublisher, count, message, relaying, until, write

ORDERS, PLACED, K = (
    Target(Scope.DESTINATION, "orders"),
    Target(Scope.TYPE, "order.placed"),
    Target(Scope.KEY, "orders", b"k"),
)
LEASE = timedelta(milliseconds=900)  # relays look every third of it


def pause(engine: Engine, target: Target, lasts: timedelta | None = None) -> None:
    with engine.begin() as connection:
        pauses.pause(connection, target, by="ana@home", reason="ticket 7", lasts=lasts)


def resume(engine: Engine, target: Target) -> bool:
    with engine.begin() as connection:
        return pauses.resume(connection, target, by="ben@home", why="done")


def audit(engine: Engine) -> list[tuple[str, str, str, str]]:
    entries = tables.outbox_audit.c
    with engine.connect() as connection:
        columns = (entries.who, entries.action, entries.target, entries.why)
        return [tuple(row) for row in connection.execute(select(*columns).order_by(entries.id))]


def numbers(publisher: ScriptedPublisher) -> list[int]:
    return [int(row.payload) for row in publisher.accepted]


# --- stored ------------------------------------------------------------------------------------------------------


def test_a_pause_tells_who_why_and_until_when_and_leaves_a_trace(engine: Engine) -> None:
    pause(engine, ORDERS, timedelta(hours=1))

    with engine.connect() as connection:
        (found,) = pauses.pauses(connection)
    assert (found.target, found.reason, found.by) == (ORDERS, "ticket 7", "ana@home")
    assert found.until is not None
    assert abs(found.until - found.since - timedelta(hours=1)) < timedelta(minutes=1)  # two looks at one clock

    assert resume(engine, ORDERS)
    assert not resume(engine, ORDERS), "it is over"
    assert audit(engine) == [
        ("ana@home", "control.pause", "destination orders", "ticket 7"),
        ("ben@home", "control.resume", "destination orders", "done"),
    ]


def test_a_second_pause_of_the_same_replaces_the_first(engine: Engine) -> None:
    pause(engine, K)
    pause(engine, K, timedelta(hours=1))

    with engine.connect() as connection:
        (found,) = pauses.pauses(connection)
    assert found.until is not None


def test_a_pause_that_has_ended_holds_nothing(engine: Engine) -> None:
    for target in (ORDERS, PLACED, K):
        pause(engine, target, timedelta(hours=1))
    with engine.connect() as connection:
        assert pauses.pause_set(connection) == PauseSet(
            frozenset({"orders"}), frozenset({"order.placed"}), frozenset({("orders", b"k")})
        )

    with engine.begin() as connection:
        times = {"set_at": database_now(timedelta(hours=-1)), "until": database_now(timedelta(seconds=-1))}
        connection.execute(update(tables.outbox_control).values(**times))

    with engine.connect() as connection:
        assert pauses.pause_set(connection) == PauseSet()
        assert pauses.pauses(connection) == []


@pytest.mark.parametrize("key", [b"42", b"a b", b"\\x41", b"\x00\xff", "ключ".encode()])
@pytest.mark.parametrize("destination", ["orders", "orders of today", "a\\x20b"])
def test_any_key_of_any_destination_can_be_paused(engine: Engine, destination: str, key: bytes) -> None:
    target = Target(Scope.KEY, destination, key)
    pause(engine, target)

    with engine.connect() as connection:
        assert [found.target for found in pauses.pauses(connection)] == [target]
    assert resume(engine, target)


def test_a_target_says_what_it_is() -> None:
    with pytest.raises(ConfigurationError, match="names a destination and a key"):
        Target(Scope.KEY, "orders")
    with pytest.raises(ConfigurationError, match="names a destination and a key"):
        Target(Scope.TYPE, "order.placed", b"k")


# --- obeyed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [ORDERS, PLACED, K], ids=lambda target: target.scope.value)
@pytest.mark.parametrize("order", Order)
def test_what_is_paused_waits_and_goes_out_in_order_afterwards(engine: Engine, target: Target, order: Order) -> None:
    publisher = ScriptedPublisher()
    pause(engine, target)
    others = {"topic": "payments", "type": "payment.made", "key": "k"}

    with relaying(engine, publisher, RelayConfig(order=order), lease=LEASE):
        write(engine, message(1), message(2, type="order.shipped"), message(90, **others))
        write(engine, message(3), message(91, **others))
        until(lambda: numbers(publisher) == [90, 91], "what is not paused goes out, in order")
        if target is not ORDERS:
            until(lambda: count(engine, tables.outbox_waiting) == 3, "what is paused waits outside the hot table")

        resume(engine, target)
        until(lambda: len(publisher.accepted) == 5, "it is resumed")

    assert [number for number in numbers(publisher) if number < 90] == [1, 2, 3]
    assert count(engine, tables.outbox_messages) == count(engine, tables.outbox_waiting) == 0
    assert count(engine, tables.outbox_stopped_keys) == 0
    assert count(engine, tables.dead_letters) == 0
    assert all(row.attempts == 0 for row in publisher.accepted)


def test_a_relay_that_runs_obeys_within_a_third_of_its_lease(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    with relaying(engine, publisher, lease=LEASE) as relay:
        write(engine, message(1))
        until(lambda: numbers(publisher) == [1])
        pause(engine, ORDERS)
        until(lambda: relay.state.paused.destinations, "it knows")

        write(engine, message(2), message(90, topic="payments"))
        until(lambda: numbers(publisher) == [1, 90])

        with engine.begin() as connection:  # the pause ends by itself
            connection.execute(update(tables.outbox_control).values(until=database_now()))
        until(lambda: numbers(publisher) == [1, 90, 2])


def test_messages_without_a_key_wait_alone(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    pause(engine, PLACED)

    with relaying(engine, publisher, lease=LEASE):
        write(engine, message(1, key=None), message(2, key=None, type="order.shipped"), message(3, key=None))
        until(lambda: numbers(publisher) == [2])
        until(lambda: count(engine, tables.outbox_waiting) == 2)
        resume(engine, PLACED)
        until(lambda: len(publisher.accepted) == 3)

    assert count(engine, tables.outbox_waiting) == count(engine, tables.outbox_stopped_keys) == 0


def test_another_relay_obeys_the_same_pauses_and_keeps_the_order(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    pause(engine, PLACED)
    write(engine, message(1), message(2, type="order.shipped"))
    with relaying(engine, publisher, lease=LEASE):
        until(lambda: count(engine, tables.outbox_waiting) == 2)
    write(engine, message(3, type="order.shipped"))

    with relaying(engine, publisher, lease=LEASE):
        until(lambda: count(engine, tables.outbox_waiting) == 3)
        assert numbers(publisher) == []
        resume(engine, PLACED)
        until(lambda: numbers(publisher) == [1, 2, 3])


# --- how far behind ----------------------------------------------------------------------------------------------


def test_the_lag_is_the_age_of_the_oldest_message_and_how_many_there_are(engine: Engine) -> None:
    with engine.connect() as connection:
        assert outbox.lag(connection) == outbox.Lag(oldest=timedelta(0), depth=0)

    write(engine, message(1), message(2), message(3))
    with engine.begin() as connection:
        hot = tables.outbox_messages
        first = select(hot.c.position).order_by(hot.c.position).limit(1).scalar_subquery()
        old = database_now(timedelta(minutes=-2))
        connection.execute(update(hot).where(hot.c.position == first).values(recorded_at=old))

    with engine.connect() as connection:
        found = outbox.lag(connection)
    assert found.depth == 3
    assert timedelta(minutes=2) <= found.oldest < timedelta(minutes=3)
