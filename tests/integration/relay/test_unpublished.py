"""Messages of a mistyped destination go to the right one, exactly once, while relays run; a repairer may do it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from uuid import uuid4

from sqlalchemy import Connection, Engine, select, text

from outboxkit import outbox, tables
from outboxkit.migrations import roles
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit.policy import Failure
from outboxkit.rows import Row
from outboxkit_relay.store import unpublished
from tests.integration.relay.world import ScriptedPublisher, count, message, relaying, until, write

REST = timedelta(seconds=30)


@contextmanager
def _as_repairer(engine: Engine) -> Iterator[Connection]:
    """A transaction with the rights of a repairer, where there are rights."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            prefix = f"t{uuid4().hex[:8]}_"
            roles.create_roles(connection, prefix)
            connection.execute(text(f"SET LOCAL ROLE {prefix}repairer"))
        yield connection
        if engine.dialect.name == "postgresql":
            connection.execute(text("RESET ROLE"))


def _refuse(row: Row) -> Failure | None:
    return Failure.UNKNOWN_TOPIC if row.topic == "orderz" else None


def test_what_a_running_relay_cannot_publish_goes_elsewhere_once_and_in_order(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = _refuse
    write(engine, *(message(number, topic="orderz") for number in range(5)))
    with relaying(engine, publisher):
        until(lambda: _found(engine) == [""] * 5, "it tells that there is no such destination")
        with _as_repairer(engine) as connection:
            found = unpublished.find(connection, topic="orderz", rest=REST, limit=100)
            done = unpublished.redirect(connection, [one.id for one in found], "orders", by="ana", why="mistyped")
        until(lambda: count(engine, tables.outbox_messages) == 0, "all published")

    assert len(done) == 5
    assert [row.payload for row in publisher.accepted] == [b"0", b"1", b"2", b"3", b"4"]
    assert {row.topic for row in publisher.accepted} == {"orders"}


def _found(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return [one.refusal for one in unpublished.find(connection, topic="orderz", rest=REST, limit=100)]


def test_what_is_published_in_between_is_not_there_any_more(engine: Engine) -> None:
    write(engine, message(1))
    with engine.connect() as connection:
        (found,) = unpublished.find(connection, topic="orders", rest=REST, limit=1)
    with relaying(engine, ScriptedPublisher()):
        until(lambda: count(engine, tables.outbox_messages) == 0, "published")
    with engine.begin() as connection:
        assert unpublished.redirect(connection, [found.id], "elsewhere", by="ana", why="x") == set()
        assert unpublished.discard(connection, [found.id], by="ana", why="x") == set()
        assert connection.execute(select(tables.outbox_audit)).all() == []


def test_a_scheduled_message_is_redirected_where_it_waits_and_one_of_a_paused_destination_is_given_up(
    engine: Engine,
) -> None:
    later, paused = message(1, topic="orderz"), message(2, topic="orderz")
    with engine.begin() as connection:
        outbox.schedule(connection, [(later, timedelta(hours=1))])
        pauses.pause(connection, Target(Scope.DESTINATION, "orderz"), by="ana", reason="mistyped")
    write(engine, paused)
    with relaying(engine, ScriptedPublisher()), _as_repairer(engine) as connection:
        found = unpublished.find(connection, ids=[later.id, paused.id], rest=timedelta(0), limit=9)
        assert [(one.place, one.refusal) for one in found] == [("pending", ""), ("scheduled", "")]
        redirected = unpublished.redirect(connection, [found[1].id], "orders", by="ana", why="x")
        given_up = unpublished.discard(connection, [found[0].id], by="ana", why="x")

    assert [str(one) for one in (*redirected, *given_up)] == [later.id, paused.id]
    with engine.connect() as connection:
        assert connection.execute(select(tables.outbox_waiting.c.topic)).scalars().all() == ["orders"]
        assert connection.execute(select(tables.dead_letters.c.state)).scalars().all() == ["discarded"]
