"""Edges E33-E40: ids, the three times, due instants, sequences, transaction ids, a commit of unknown outcome."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outboxkit import CaptureError, correlation, publish, send
from outboxkit.capture import draft
from outboxkit.context import handling, producing
from outboxkit.headers import unpack_headers
from outboxkit.message import Message
from tests.integration.capture.model import Noted, Order, OrderPlaced
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


def test_e33_the_id_that_emit_returns_is_the_one_that_is_stored_and_owes_nothing_to_the_database(
    world: CaptureDatabase,
) -> None:
    def scenario(session: Session) -> list[str]:
        order = Order(total=1)
        ids = [order.emit(lambda: OrderPlaced(order.id)), publish(session, Noted("x"), topic="notes")]
        session.add(order)
        session.commit()
        return ids

    ids = world.run(scenario)

    assert sorted(str(row.message_id) for row in world.rows()) == ids
    assert {row.message_id.version for row in world.rows()} == {7}


def test_e34_ids_grow_within_a_process_and_are_unique(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        for at in range(500):
            publish(session, Noted(str(at)), topic="notes")
        session.commit()

    world.run(scenario)

    ids = [row.message_id for row in world.rows()]
    assert len(set(ids)) == 500
    assert ids == sorted(ids)


def test_e35_the_time_of_the_fact_and_the_time_of_the_record_are_two_things(postgres_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.execute(text("SELECT now()"))  # the transaction began before the other one
        with postgres_world.observer.begin() as other:
            other.execute(text("SELECT outboxkit_emit('notes', 'other', '{}')"))
        publish(session, Noted("later"), topic="notes")
        session.commit()

    before = datetime.now(UTC)
    postgres_world.run(scenario)

    first, second = postgres_world.rows()
    assert (first.type, second.type) == ("other", "order.noted")
    assert first.recorded_at < second.recorded_at
    assert before <= second.occurred_at <= datetime.now(UTC)


class SkewedClock(datetime):
    """An application whose clock is three days fast."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) + timedelta(days=3)


def test_e36_a_wrong_application_clock_moves_no_due_instant(
    world: CaptureDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "datetime", SkewedClock)

    def scenario(session: Session) -> None:
        publish(session, Noted("later"), topic="notes", delay=timedelta(hours=1))
        publish(session, Noted("now"), topic="notes")
        session.commit()

    world.run(scenario)

    (later,) = world.waiting()
    assert later.reason == "scheduled"
    assert abs(later.due_at - datetime.now(UTC) - timedelta(hours=1)) < timedelta(minutes=5)
    assert abs(world.rows()[0].recorded_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert later.occurred_at - datetime.now(UTC) > timedelta(days=2)


def test_e37_a_due_time_is_an_instant_in_whatever_zone_it_was_said(world: CaptureDatabase) -> None:
    zone = ZoneInfo("Europe/Berlin")
    twice = [datetime(2030, 10, 27, 2, 30, tzinfo=zone, fold=fold) for fold in (0, 1)]  # the hour that comes twice

    def scenario(session: Session) -> None:
        for at in twice:
            publish(session, Noted("dst"), topic="notes", at=at)
        session.commit()

    world.run(scenario)

    assert [row.due_at.astimezone(UTC) for row in world.waiting()] == [at.astimezone(UTC) for at in twice]
    assert world.waiting()[1].due_at - world.waiting()[0].due_at == timedelta(hours=1)


@pytest.mark.parametrize("option", ["at", "expires"])
def test_e37_a_time_without_a_zone_is_refused(world: CaptureDatabase, option: str) -> None:
    options: Any = {option: datetime(2030, 1, 1)}  # noqa: DTZ001 # exactly this is refused

    def scenario(session: Session) -> None:
        with pytest.raises(CaptureError, match="no time zone"):
            publish(session, Noted("when"), topic="notes", **options)
        with pytest.raises(CaptureError, match="both"):
            publish(session, Noted("when"), topic="notes", delay=timedelta(1), at=datetime.now(UTC))

    world.run(scenario)


def test_e38_positions_come_from_a_sequence_without_a_cache_and_gaps_mean_nothing(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        publish(session, Noted("lost"), topic="notes")
        session.flush()
        session.rollback()
        publish(session, Noted("kept"), topic="notes")
        session.commit()

    world.run(scenario)

    assert world.events() == [{"text": "kept"}]
    if world.observer.dialect.name == "postgresql":
        assert (
            world.scalar("SELECT cache_size FROM pg_sequences WHERE sequencename = 'outbox_messages_position_seq'") == 1
        )


def test_e39_a_row_written_in_a_savepoint_carries_the_transactions_own_id(postgres_world: CaptureDatabase) -> None:
    def scenario(session: Session) -> int:
        with session.begin_nested(), session.begin_nested():
            publish(session, Noted("nested"), topic="notes")
        own = session.connection().exec_driver_sql("SELECT pg_current_xact_id()::text").scalar_one()
        session.commit()
        return int(own)

    own = postgres_world.run(scenario)

    assert int(postgres_world.scalar("SELECT xid::text FROM outbox_messages")) == own


def test_e40_a_retry_after_a_commit_of_unknown_outcome_has_the_same_message_id(postgres_world: CaptureDatabase) -> None:
    ids = []

    def attempt(session: Session, *, cut: bool) -> None:
        ids.append(publish(session, Noted("pay"), topic="notes", unique_key="order-7"))
        session.flush()
        if cut:
            mine = session.connection().exec_driver_sql("SELECT pg_backend_pid()").scalar_one()

            @event.listens_for(session.connection(), "commit")
            def lose_the_connection(_connection: Any) -> None:
                with postgres_world.observer.begin() as killer:
                    killer.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": mine})

        session.commit()

    with pytest.raises((DBAPIError, OSError)):
        postgres_world.run(lambda session: attempt(session, cut=True))
    postgres_world.run(lambda session: attempt(session, cut=False))

    assert ids[0] == ids[1]
    assert {str(row.message_id) for row in postgres_world.rows()} == {ids[0]}


def headers(row: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in unpack_headers(row.headers)}


def test_a_command_has_one_receiver_and_may_wait_and_expire(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        send(session, Noted("charge"), to="payments", key="7", expires=timedelta(hours=1))
        send(session, Noted("remind"), to="payments", delay=timedelta(minutes=5))
        session.commit()

    world.run(scenario)

    (now,), (later,) = world.rows(), world.waiting()
    assert (now.kind, now.topic, now.key) == ("command", "payments", b"7")
    assert now.expires_at - now.occurred_at == timedelta(hours=1)
    assert headers(now)["ce_expirytime"].endswith("Z")
    assert (later.kind, later.position) == ("command", None)


def test_what_a_handler_emits_is_caused_by_its_message_and_joins_its_conversation(world: CaptureDatabase) -> None:
    trace = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    came = Message(id="m-1", type="t", topic="x", payload=b"", correlation_id="c-1", headers=(("traceparent", trace),))

    def scenario(session: Session) -> None:
        with producing("shop"), handling(came):
            publish(session, Noted("handled"), topic="notes")
        with correlation("checkout-42"):
            publish(session, Noted("own"), topic="notes", source="till", headers={"tenant": "a", "raw": b"\xff"})
        session.commit()

    world.run(scenario)

    first, second = world.rows()
    assert headers(first) | {"ce_causationid": "m-1", "ce_correlationid": "c-1", "ce_source": "shop"} == headers(first)
    assert headers(first)["traceparent"].encode() == trace
    assert ("raw", b"\xff") in unpack_headers(second.headers)
    known = dict(unpack_headers(second.headers))
    assert (known["ce_correlationid"], known["ce_source"], known["tenant"]) == (b"checkout-42", b"till", b"a")
    assert "ce_causationid" not in known
    assert "traceparent" not in known
