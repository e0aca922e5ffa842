"""The relay on real databases, with a publisher that fails as told."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Engine, select, update

from outboxkit import outbox, tables
from outboxkit._sql import database_now
from outboxkit.policy import Failure, Followers, Order, RetryPolicy, full_jitter
from outboxkit.rows import Row
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.core.state import RelayConfig
from tests.integration.relay.world import ScriptedPublisher, count, message, relaying, until, write

QUICK = RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=2))


def numbers(rows: list[Row]) -> list[int]:
    return [int(row.payload) for row in rows]


def test_what_is_committed_is_published_in_order_removed_and_evidenced(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    write(engine, *(message(number, key=str(number % 3)) for number in range(50)))

    with relaying(engine, publisher):
        write(engine, *(message(number, key=str(number % 3)) for number in range(50, 80)))
        until(lambda: len(publisher.accepted) >= 80 and count(engine, tables.outbox_messages) == 0)

    assert numbers(publisher.accepted) == list(range(80))
    with engine.connect() as connection:
        ledger = connection.execute(select(tables.outbox_ledger)).all()
    assert sum(len(row.ids) for row in ledger) == 80
    assert [offset for row in ledger for offset in row.offsets] == list(range(80))
    assert count(engine, tables.outbox_relays) == 0, "a clean stop gives its lease back"


def test_a_rolled_back_transaction_publishes_nothing(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    with engine.connect() as connection, connection.begin() as transaction:
        outbox.write(connection, [message(1)])
        with connection.begin_nested() as savepoint:
            outbox.write(connection, [message(2)])
            savepoint.rollback()
        transaction.rollback()
    write(engine, message(3))

    with relaying(engine, publisher, RelayConfig(once=True)):
        until(lambda: publisher.accepted)

    assert numbers(publisher.accepted) == [3]


def test_a_destination_in_trouble_is_paused_and_spends_no_attempt_while_others_flow(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    down = {"orders"}
    publisher.refuse = lambda row: Failure.BROKER_DOWN if row.topic in down else None
    write(engine, *(message(number) for number in range(5)), *(message(number, topic="bills") for number in range(5)))

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: sum(row.topic == "bills" for row in publisher.accepted) == 5)
        until(lambda: sum(row.topic == "orders" for row in publisher.sent) > 20, "many tries")
        assert count(engine, tables.outbox_messages) == 5
        assert count(engine, tables.outbox_waiting) == count(engine, tables.dead_letters) == 0
        down.clear()
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert numbers([row for row in publisher.accepted if row.topic == "orders"]) == list(range(5))


def test_a_rejected_head_stops_only_its_key_and_the_key_leaves_in_order(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    rejections = iter([Failure.REJECTED] * 2)
    publisher.refuse = lambda row: next(rejections, None) if row.payload == b"0" else None
    write(engine, *(message(number, key="bad" if number % 2 == 0 else "good") for number in range(10)))

    with relaying(engine, publisher, RelayConfig(retry=QUICK, order=Order.STRICT)):
        until(lambda: len(publisher.accepted) == 10)
        write(engine, message(10, key="bad"))
        until(lambda: len(publisher.accepted) == 11)
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert numbers([row for row in publisher.accepted if row.key == b"bad"]) == [0, 2, 4, 6, 8, 10]
    assert count(engine, tables.outbox_stopped_keys) == count(engine, tables.outbox_waiting) == 0
    assert count(engine, tables.dead_letters) == 0


def test_spent_attempts_bury_the_head_and_park_its_followers_until_a_release(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" else None
    write(engine, *(message(number) for number in range(4)))

    with relaying(engine, publisher, RelayConfig(retry=QUICK, order=Order.STRICT), lease=timedelta(seconds=1)):
        until(lambda: count(engine, tables.dead_letters) == 1)
        write(engine, message(4))
        until(lambda: count(engine, tables.outbox_waiting) == 4, "followers wait, fresh ones too")
        assert publisher.accepted == []
        with engine.begin() as connection:
            connection.execute(update(tables.outbox_stopped_keys).values(request="release", requested_by="ana"))
        until(lambda: len(publisher.accepted) == 4)
        until(lambda: count(engine, tables.outbox_stopped_keys) == 0)

    assert numbers(publisher.accepted) == [1, 2, 3, 4]
    with engine.connect() as connection:
        letter = connection.execute(select(tables.dead_letters)).one()
    assert (letter.payload, letter.failure, letter.side, letter.attempts) == (b"0", "rejected", "relay", 3)


def test_followers_of_a_dead_head_go_on_when_told_to_skip(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.TOO_LARGE if row.payload == b"0" else None
    write(engine, *(message(number) for number in range(3)))
    skip = RetryPolicy(delayed=QUICK.delayed, followers=Followers.SKIP)

    with relaying(engine, publisher, RelayConfig(retry=skip, order=Order.STRICT)):
        until(lambda: len(publisher.accepted) == 2)

    assert numbers(publisher.accepted) == [1, 2]
    assert [row.payload for row in publisher.sent].count(b"0") == 2, "one retry alone before it dies"
    assert count(engine, tables.dead_letters) == 1


def test_messages_without_a_key_wait_alone(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    rejections = iter([Failure.REJECTED])
    publisher.refuse = lambda row: next(rejections, None) if row.payload == b"0" else None
    write(engine, *(message(number, key=None) for number in range(3)))

    with relaying(engine, publisher, RelayConfig(retry=QUICK)):
        until(lambda: len(publisher.accepted) == 3)

    assert numbers(publisher.accepted) == [1, 2, 0]
    assert count(engine, tables.outbox_stopped_keys) == 0


def test_an_unanswered_batch_is_given_up_and_sent_again_in_order(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.hold = True
    write(engine, *(message(number) for number in range(3)))

    with relaying(engine, publisher, RelayConfig(patience=timedelta(milliseconds=200))):
        until(lambda: publisher.resets >= 1)
        publisher.release()
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert numbers(publisher.accepted)[-3:] == [0, 1, 2]


def test_a_scheduled_message_goes_out_when_it_is_due_and_an_expired_one_never(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    with engine.begin() as connection:
        outbox.schedule(connection, [(message(1), timedelta(milliseconds=300)), (message(2), timedelta(hours=1))])
    old = message(3)
    write(engine, message(4, expires_at=old.occurred_at - timedelta(seconds=1)))  # type: ignore[operator]

    with relaying(engine, publisher):
        until(lambda: publisher.accepted)

    assert numbers(publisher.accepted) == [1]
    assert count(engine, tables.outbox_waiting) == 1
    assert count(engine, tables.outbox_ledger, tables.outbox_ledger.c.outcome == "expired") == 1


def test_shards_are_spread_evenly_and_taken_over_when_a_relay_leaves(engine: Engine) -> None:
    first, second = ScriptedPublisher(), ScriptedPublisher()
    owner = tables.outbox_shards.c.owner

    def shares() -> list[int]:
        with engine.connect() as connection:
            owners = connection.execute(select(owner)).scalars().all()
        return sorted(owners.count(one) for one in set(owners) if one is not None)

    with relaying(engine, first, lease=timedelta(seconds=1)):
        until(lambda: shares() == [64])
        with relaying(engine, second, lease=timedelta(seconds=1)):
            until(lambda: shares() == [32, 32])
            write(engine, *(message(number, key=str(number)) for number in range(200)))
            until(lambda: len(first.accepted) + len(second.accepted) == 200)
            assert first.accepted
            assert second.accepted
        until(lambda: shares() == [64])


def test_a_dead_relays_shards_are_taken_over_after_its_lease(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    with engine.begin() as connection:
        ghost = message(0).id
        relays = tables.outbox_relays
        connection.execute(
            relays.insert().values(
                id=outbox.stored_id(ghost),
                host="gone",
                version="",
                expires_at=database_now(timedelta(seconds=1)),
            ),
        )
        connection.execute(update(tables.outbox_shards).values(owner=outbox.stored_id(ghost)))
    write(engine, message(1))

    with relaying(engine, publisher, lease=timedelta(seconds=1)):
        until(lambda: numbers(publisher.accepted) == [1])


def test_a_fenced_relay_changes_nothing_forgets_and_joins_again(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    publisher.hold = True
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"0" and not publisher.resets else None
    write(engine, *(message(number) for number in range(3)))

    with relaying(engine, publisher, RelayConfig(retry=QUICK, order=Order.STRICT)) as relay:
        until(lambda: publisher.sent)
        with engine.begin() as connection:
            connection.execute(tables.outbox_relays.delete())
        publisher.release()
        until(lambda: publisher.resets == 1)
        until(lambda: numbers(publisher.accepted)[-3:] == [0, 1, 2])
        assert relay.state.lanes.shards

    assert count(engine, tables.dead_letters) == 0


def test_memory_does_not_depend_on_the_size_of_the_backlog(engine: Engine) -> None:
    publisher, size, mebibyte = ScriptedPublisher(), 300_000, 1 << 20
    publisher.hold = True
    for number in range(40):
        write(engine, replace(message(number, key=str(number)), payload=b"%d " % number + b"x" * size))

    with relaying(engine, publisher, RelayConfig(max_bytes=2 * mebibyte)) as relay:
        until(lambda: "orders" in relay.state.lanes.topics, "it reads no more of it")
        until(lambda: relay.state.empty_rounds > 1, "and goes on with others")
        assert 0 < sum(len(row.payload) for row in publisher.sent) <= mebibyte + size
        publisher.release()
        until(lambda: count(engine, tables.outbox_messages) == 0)

    assert sorted(int(row.payload.split()[0]) for row in publisher.accepted) == list(range(40))


def test_a_rate_is_kept_and_holds_no_other_destination(engine: Engine) -> None:
    publisher = ScriptedPublisher()
    sent: list[tuple[float, str]] = []
    publisher.refuse = lambda row: sent.append((time.monotonic(), row.topic))
    config = RelayConfig(destinations={"orders": DestinationLimits(rate=100.0)})
    write(engine, *(message(number) for number in range(40)), *(message(number, topic="bills") for number in range(40)))

    with relaying(engine, publisher, config):
        until(lambda: count(engine, tables.outbox_messages) == 0)

    slow = [at for at, topic in sent if topic == "orders"]
    assert numbers([row for row in publisher.accepted if row.topic == "orders"]) == list(range(40))
    assert all(index + 1 <= 11 + 100 * (at - slow[0]) for index, at in enumerate(slow)), "10 at once, then 100/s"
    assert max(at for at, topic in sent if topic == "bills") < slow[-1]
