"""``relay run --once``: it leaves when nothing is left, and not before."""

from __future__ import annotations

import threading
from datetime import timedelta
from uuid import uuid4

from sqlalchemy import Engine, update

from outboxkit import outbox, tables
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit.policy import Failure, Followers, Order, RetryPolicy, full_jitter
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.relay import RelayDaemon
from outboxkit_relay.store import leases
from tests.integration.relay.world import ScriptedPublisher, count, message, write

RETRY = RetryPolicy(delayed=full_jitter("300ms", cap="400ms", attempts=3))


def run_once(engine: Engine, publisher: ScriptedPublisher, retry: RetryPolicy = RETRY) -> list[int]:
    """Runs to the end; what was accepted."""
    RelayDaemon(
        engine, publisher, RelayConfig(once=True, order=Order.STRICT, retry=retry, lease=timedelta(seconds=2))
    ).run(threading.Event())
    return [int(row.payload) for row in publisher.accepted]


def test_it_publishes_what_is_there_and_leaves(engine: Engine) -> None:
    write(engine, *(message(number) for number in range(3)))

    assert run_once(engine, ScriptedPublisher()) == [0, 1, 2]
    assert count(engine, tables.outbox_relays) == 0


def test_a_message_that_waits_for_its_next_try_is_waited_for(engine: Engine) -> None:
    publisher, refused = ScriptedPublisher(), [0, 0]
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" and refused and refused.pop() == 0 else None
    write(engine, *(message(number) for number in range(3)), message(9, key=None))

    assert sorted(run_once(engine, publisher)) == [0, 1, 2, 9]
    assert count(engine, tables.outbox_waiting) == count(engine, tables.outbox_stopped_keys) == 0


def test_what_is_parked_paused_or_scheduled_for_later_is_not(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(
        engine,
        message(0),
        message(1),
        message(2, key="other"),
        message(3, topic="bills"),
        message(4, "p", type="paused"),
    )
    with engine.begin() as connection:
        outbox.schedule(connection, [(message(5, key="later"), timedelta(hours=1))])
        for target in (Target(Scope.DESTINATION, "bills"), Target(Scope.TYPE, "paused")):
            pauses.pause(connection, target, by="ana", reason="test")
    quick = RetryPolicy(delayed=full_jitter("1ms", cap="1ms", attempts=1), followers=Followers.PARK)

    assert run_once(engine, publisher, quick) == [2]
    assert count(engine, tables.dead_letters) == 1


def test_the_shards_of_a_dead_relay_are_waited_for(engine: Engine) -> None:
    dead = uuid4()
    with engine.begin() as connection:
        leases.register(connection, dead, host="gone", version="", lease=timedelta(seconds=1))
        connection.execute(update(tables.outbox_shards).values(owner=dead))
    write(engine, *(message(number) for number in range(3)))

    assert run_once(engine, ScriptedPublisher()) == [0, 1, 2]
