"""Stopped keys under an operator's hand, on real databases: asked for by anybody, carried out by the relay."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from sqlalchemy import Connection, Engine, select, update

from outboxkit import outbox, tables
from outboxkit.policy import Failure, Followers, Order, RetryPolicy, full_jitter
from outboxkit.rows import Request, Row
from outboxkit_relay.core.protocol import FailedHead
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.store import operator_requests, stopped_keys
from outboxkit_relay.store.stopped_keys import KeyStop
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write

QUICK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=2))
BLOCK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1), followers=Followers.BLOCK)
SHARDS = range(tables.SHARDS)


def _rules(retry: RetryPolicy = QUICK) -> RelayConfig:
    return RelayConfig(retry=retry, order=Order.STRICT)


def _stop(engine: Engine, *, key: str = "k", due: timedelta = timedelta(hours=1)) -> None:
    """A key with a head (0) that has failed twice, and two messages (1, 2) behind it."""
    write(engine, *(message(number, key=key) for number in range(3)))
    with engine.begin() as connection:
        rows = _hot(connection, key)
        held = FailedHead(
            row=rows[0], failure="rejected", text="no: thanks", attempts=2, delay=due, followers=tuple(rows[1:])
        )
        stopped_keys.stop_key(connection, held)


def _hot(connection: Connection, key: str) -> list[Row]:
    hot = tables.outbox_messages.c
    names = (
        "position",
        "message_id",
        "topic",
        "key",
        "type",
        "kind",
        "payload",
        "headers",
        "recorded_at",
        "expires_at",
    )
    found = connection.execute(
        select(*(hot[name] for name in names)).where(hot.key == key.encode()).order_by(hot.position)
    )
    return [Row.of(*row) for row in found]


def _ask(engine: Engine, what: Request, position: int | None = None) -> bool:
    with engine.begin() as connection:
        return stopped_keys.request(connection, "orders", b"k", what, by="ana@home", why="ticket 7", position=position)


def _stops(engine: Engine) -> list[KeyStop]:
    with engine.connect() as connection:
        return stopped_keys.list_stopped(connection)


def _carry_out(engine: Engine) -> None:
    with engine.begin() as connection:
        operator_requests.carry_out_requests(connection, SHARDS)


def numbers(rows: list[Row]) -> list[int]:
    return [int(row.payload) for row in rows]


# --- looking and asking ------------------------------------------------------------------------------------------


def test_a_stopped_key_tells_why_its_head_failed_and_what_waits(engine: Engine) -> None:
    _stop(engine)

    (stop,) = _stops(engine)

    assert (stop.topic, stop.key, stop.reason, stop.attempts, stop.followers) == ("orders", b"k", "retry", 2, 2)
    assert stop.error == "rejected: no: thanks"
    assert stop.due_at is not None
    assert (stop.request, stop.requested_by) == (None, None)


def test_of_a_parked_key_the_dead_letter_tells_why(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(engine, message(0), message(1))

    with relaying(engine, publisher, _rules()):
        until(lambda: count(engine, tables.dead_letters) == 1)

    (stop,) = _stops(engine)
    assert (stop.reason, stop.attempts, stop.followers, stop.due_at) == ("parked", 3, 1, None)
    assert stop.error == "rejected: refused as rejected"


def test_one_topic_or_one_key_can_be_looked_at(engine: Engine) -> None:
    _stop(engine, key="k")
    _stop(engine, key="l")

    with engine.connect() as connection:
        assert [stop.key for stop in stopped_keys.list_stopped(connection, topic="orders")] == [b"k", b"l"]
        assert [stop.key for stop in stopped_keys.list_stopped(connection, topic="orders", key=b"l")] == [b"l"]
        assert stopped_keys.list_stopped(connection, topic="payments") == []
        assert len(stopped_keys.list_stopped(connection, limit=1)) == 1
        assert (
            stopped_keys.count_stopped_keys(connection)
            == stopped_keys.count_stopped_keys(connection, topic="orders")
            == 2
        )
        assert stopped_keys.count_stopped_keys(connection, topic="payments") == 0


def test_a_request_is_recorded_with_who_and_why_and_changes_nothing_else(engine: Engine) -> None:
    _stop(engine)
    (before,) = _stops(engine)

    assert _ask(engine, Request.SKIP, before.position)

    (after,) = _stops(engine)
    assert (after.request, after.requested_by) == ("skip", "ana@home")
    assert (after.due_at, after.followers) == (before.due_at, before.followers)
    with engine.connect() as connection:
        entry = connection.execute(select(tables.outbox_audit)).one()
    assert (entry.who, entry.action, entry.target, entry.why) == (
        "ana@home",
        "quarantine.skip",
        "orders k",
        "ticket 7",
    )


def test_nothing_is_asked_of_a_free_key_another_head_or_one_that_is_being_replayed(engine: Engine) -> None:
    assert not _ask(engine, Request.RELEASE)
    _stop(engine)
    (stop,) = _stops(engine)
    assert not _ask(engine, Request.SKIP, stop.position + 1)
    with engine.begin() as connection:
        connection.execute(update(tables.outbox_stopped_keys).values(request="repair"))
    assert not _ask(engine, Request.SKIP, stop.position)

    assert count(engine, tables.outbox_audit) == 0


def test_a_key_of_any_bytes_can_be_asked_about(engine: Engine) -> None:
    stopped = {"topic": "orders", "key": b"\0\xff", "shard": 0, "position": 1, "reason": "parked"}
    with engine.begin() as connection:
        connection.execute(tables.outbox_stopped_keys.insert().values(**stopped))

        assert stopped_keys.request(connection, "orders", b"\0\xff", Request.RELEASE, by="ana")

        assert connection.execute(select(tables.outbox_audit.c.target)).scalar_one() == "orders \\x00\\xff"


# --- carrying out ------------------------------------------------------------------------------------------------


def test_a_release_tries_a_waiting_head_at_once_and_its_attempts_stay_counted(engine: Engine) -> None:
    _stop(engine)
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, _rules(), lease=timedelta(seconds=1)):
        assert _ask(engine, Request.RELEASE)
        until(lambda: len(publisher.accepted) == 3)
        until(lambda: not _stops(engine))

    assert numbers(publisher.accepted) == [0, 1, 2]
    assert publisher.accepted[0].attempts == 2
    assert count(engine, tables.dead_letters) == 0


def test_a_released_head_that_fails_again_waits_again(engine: Engine) -> None:
    _stop(engine)
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    later = RetryPolicy(delayed=full_jitter("1h", cap="1h", attempts=8))

    with relaying(engine, publisher, _rules(later), lease=timedelta(seconds=1)):
        assert _ask(engine, Request.RELEASE)
        until(lambda: _stops(engine)[0].attempts == 3)

    (stop,) = _stops(engine)
    assert (stop.reason, stop.request, stop.followers) == ("retry", None, 2)
    assert numbers(publisher.sent) == [0]


def test_a_skipped_head_becomes_a_dead_letter_and_its_followers_go_on(engine: Engine) -> None:
    _stop(engine)
    publisher = ScriptedPublisher()

    with relaying(engine, publisher, _rules(), lease=timedelta(seconds=1)):
        assert _ask(engine, Request.SKIP)
        until(lambda: len(publisher.accepted) == 2)
        write(engine, message(3))
        until(lambda: len(publisher.accepted) == 3)
        until(lambda: not _stops(engine))

    assert numbers(publisher.sent) == [1, 2, 3]
    assert count(engine, tables.outbox_waiting) == 0
    with engine.connect() as connection:
        letter = connection.execute(select(tables.dead_letters)).one()
    assert (letter.payload, letter.failure, letter.error, letter.attempts) == (b"0", "rejected", "no: thanks", 2)
    assert (letter.side, letter.state) == ("relay", "dead")


def test_a_skipped_head_without_followers_frees_its_key(engine: Engine) -> None:
    _stop(engine)
    with engine.begin() as connection:
        connection.execute(tables.outbox_waiting.delete().where(tables.outbox_waiting.c.reason == "follower"))
    assert _ask(engine, Request.SKIP)

    _carry_out(engine)

    assert not _stops(engine)
    assert count(engine, tables.outbox_waiting) == 0
    assert count(engine, tables.dead_letters) == 1


def test_a_head_that_may_be_at_the_broker_is_not_skipped(engine: Engine) -> None:
    _stop(engine, due=timedelta(0))
    assert _ask(engine, Request.SKIP)

    _carry_out(engine)

    (stop,) = _stops(engine)
    assert stop.request == "skip"
    assert count(engine, tables.dead_letters) == 0


def test_a_head_that_is_never_given_up_is_skipped_in_the_end_and_never_both_sent_and_dead(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(engine, *(message(number) for number in range(3)))

    with relaying(engine, publisher, _rules(BLOCK), lease=timedelta(seconds=1)):
        until(lambda: len(_stops(engine)) == 1)
        until(lambda: len(publisher.sent) > 3)
        assert _ask(engine, Request.SKIP)
        until(lambda: len(publisher.accepted) == 2)

    assert numbers(publisher.accepted) == [1, 2]
    assert count(engine, tables.dead_letters) == 1


def test_a_skip_outlives_the_failure_of_its_head_and_a_release_the_next_try_only(engine: Engine) -> None:
    for what, parked in (("skip", "skip"), ("release", None)):
        _stop(engine, key=what)
        with engine.begin() as connection:
            stopped_keys.request(connection, "orders", what.encode(), Request(what), by="ana")
            found = stopped_keys.head_of(connection, "orders", what.encode())
            assert found is not None
            hold = FailedHead(row=found[0], failure="rejected", text="x", attempts=3, delay=timedelta(hours=1))
            stopped_keys.stop_key(connection, hold)
            assert stopped_keys.list_stopped(connection, key=what.encode())[0].request == what

            stopped_keys.park(connection, found[0], ())

            assert stopped_keys.list_stopped(connection, key=what.encode())[0].request == parked


def test_a_request_is_forgotten_when_its_head_goes_out(engine: Engine) -> None:
    _stop(engine)
    assert _ask(engine, Request.SKIP)
    with engine.begin() as connection:
        found = stopped_keys.head_of(connection, "orders", b"k")
        assert found is not None
        stopped_keys.remove_dead(connection, found[0])  # as if it were published

        stopped_keys.resume_key(connection, [("orders", b"k")])

    _carry_out(engine)
    (stop,) = _stops(engine)
    assert (stop.request, stop.followers) == (None, 1)
    assert count(engine, tables.dead_letters) == 0


@pytest.mark.parametrize("what", Request)
def test_followers_of_a_dead_head_go_on(engine: Engine, what: Request) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(engine, *(message(number) for number in range(4)))

    with relaying(engine, publisher, _rules(), lease=timedelta(seconds=1)):
        until(lambda: count(engine, tables.dead_letters) == 1)
        assert _ask(engine, what)
        until(lambda: len(publisher.accepted) == 3)
        until(lambda: not _stops(engine))

    assert numbers(publisher.accepted) == [1, 2, 3]
    assert count(engine, tables.dead_letters) == 1


def test_a_row_that_joins_while_its_key_is_freed_is_never_left_alone(database_url: str) -> None:
    """The settler adds a row to a key at the same time as the reader finds none left of it."""
    engine = engine_for(database_url)
    write(engine, message(0), message(1))
    with engine.begin() as connection:
        stopped_keys.park(connection, _hot(connection, "k")[0], ())
    assert _ask(engine, Request.SKIP)
    reader, settler = engine.connect(), engine.connect()

    with reader.begin():
        operator_requests.carry_out_requests(reader, SHARDS)
        joined = threading.Thread(target=_join, args=(settler,))
        joined.start()
        joined.join(0.3)
    joined.join()

    (stop,) = _stops(engine)
    assert (stop.reason, count(engine, tables.outbox_waiting)) == ("retry", 1)
    reader.close()
    settler.close()
    engine.dispose()


def test_a_key_that_a_settlement_is_changing_is_left_for_the_next_time(database_url: str) -> None:
    engine = engine_for(database_url)
    write(engine, message(0), message(1))
    with engine.begin() as connection:
        stopped_keys.park(connection, _hot(connection, "k")[0], ())
    assert _ask(engine, Request.SKIP)
    settler = engine.connect()

    with settler.begin():
        stopped_keys.append_followers(settler, _hot(settler, "k"))
        _carry_out(engine)  # does not wait
        assert _stops(engine)[0].request == "skip"
    _carry_out(engine)

    (stop,) = _stops(engine)
    assert (stop.reason, stop.request, count(engine, tables.outbox_waiting)) == ("retry", None, 1)
    settler.close()
    engine.dispose()


def _join(settler: Connection) -> None:
    with settler.begin():
        stopped_keys.append_followers(settler, _hot(settler, "k"))


def test_one_transaction_holds_the_request_and_what_it_did(engine: Engine) -> None:
    _stop(engine)
    assert _ask(engine, Request.SKIP)

    with engine.connect() as connection, connection.begin() as transaction:
        operator_requests.carry_out_requests(connection, SHARDS)
        transaction.rollback()

    (stop,) = _stops(engine)
    assert (stop.request, stop.followers) == ("skip", 2)
    assert count(engine, tables.dead_letters) == 0


def test_only_keys_of_its_own_shards_are_touched(engine: Engine) -> None:
    _stop(engine)
    assert _ask(engine, Request.SKIP)
    with engine.connect() as connection:
        shards = outbox.shards_of(connection)
        own = connection.execute(select(tables.outbox_stopped_keys.c.shard)).scalar_one()

    with engine.begin() as connection:
        operator_requests.carry_out_requests(connection, set(range(shards)) - {own})

    assert _stops(engine)[0].request == "skip"
