"""Every message is counted once; what no run leaves behind is named, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, Engine, delete, insert, select, update

from outboxkit import dead_letters, inbox, outbox, tables
from outboxkit._sql import database_now
from outboxkit.dead_letters import DeadLetter
from outboxkit.inbox.rows import DEAD
from outboxkit.policy import Failure
from outboxkit.rows import Evidence, Part, Reading, Row
from outboxkit_relay.core.protocol import FailedHead
from outboxkit_relay.diagnose.audit import audit
from outboxkit_relay.diagnose.contradictions import RULES
from outboxkit_relay.store import stopped_keys
from tests.consumer_fixture import order
from tests.integration.relay.diagnose.world import dead_letter_of_billing
from tests.integration.relay.world import message

HOT, WAITING, STOPPED = tables.outbox_messages, tables.outbox_waiting, tables.outbox_stopped_keys
LETTERS, LEDGER, INBOX = tables.dead_letters, tables.outbox_ledger, tables.inbox_messages


@dataclass(frozen=True)
class Held:
    """A connection in a transaction that is rolled back, and what its tables hold."""

    connection: Connection
    pending: Row
    published: Row
    head: Row
    dead: DeadLetter
    billed: DeadLetter


@pytest.fixture
def held(engine: Engine) -> Iterator[Held]:
    """One message in each account."""
    with engine.connect() as connection:
        outbox.write(connection, [message(number, key=f"k{number}") for number in range(5)])
        outbox.write(connection, [message(5, key="k2")])
        outbox.schedule(connection, [(message(6), timedelta(hours=1))])
        pending, published, head, dead, discarded, follower = _rows(connection)
        _publish(connection, published)
        told = {"failure": Failure.REJECTED, "text": "no", "attempts": 1, "delay": timedelta(hours=1)}
        stopped_keys.stop_key(connection, FailedHead(row=head, followers=(follower,), **told))  # type: ignore[arg-type]
        letters = [_bury(connection, one) for one in (dead, discarded)]
        dead_letters.discard(connection, [letters[1].id], by="ana", why="x")
        billed = dead_letter_of_billing(connection)
        yield Held(connection, pending, published, head, letters[0], billed)
        connection.rollback()


def _rows(connection: Connection) -> list[Row]:
    everything = Part(frozenset(), only=False, seen=None)
    reading = Reading(shards=frozenset(range(tables.SHARDS)), parts=(everything,), limit=100)
    return list(outbox.read(connection, reading).rows)


def _publish(connection: Connection, row: Row) -> None:
    evidence = Evidence(topic="orders", outcome="published", rows=[row], partitions=[0], offsets=[7])
    outbox.remove(connection, uuid4(), [evidence])


def _bury(connection: Connection, row: Row) -> DeadLetter:
    letter = dead_letters.bury(connection, dead_letters.of_row(row, Failure.REJECTED, "no", 3))
    stopped_keys.remove_dead(connection, row)
    assert letter is not None
    return letter


def test_every_message_is_in_one_account_and_nothing_contradicts_itself(held: Held) -> None:
    found = audit(held.connection)

    assert found.contradictions == ()
    names = ("pending", "retry", "follower", "scheduled", "published", "dead", "discarded")
    assert {name: number for name, number in found.accounts.items() if number} == dict.fromkeys(names, 1)
    assert found.emitted == 7
    assert found.inbox == {"billing": {"handled": 0, "dead": 1, "open": 0, "waiting": 0}}
    assert found.since is not None


# --- contradictions, planted one by one --------------------------------------------------------------------------


def _copy_of(connection: Connection, row: Row, **changes: Any) -> dict[str, Any]:
    """The columns of a stored row, for another row of the waiting room or of the outbox."""
    columns = [*stopped_keys.COPIED]
    for table in (HOT, WAITING):
        found = connection.execute(select(*(table.c[name] for name in columns)).where(table.c.message_id == row.id))
        if (one := found.mappings().first()) is not None:
            return {**one, **changes}
    raise AssertionError(row)


def _evidence(message_id: UUID, **changes: Any) -> dict[str, Any]:
    ids = {"min_id": message_id, "max_id": message_id, "ids": [message_id.bytes]}
    there = {"relay": uuid4(), "topic": "orders", "outcome": "published", "partitions": [0], "offsets": [1]}
    return {**ids, **there, **changes}


def _published_and_pending(held: Held) -> None:
    held.connection.execute(insert(LEDGER).values(_evidence(held.pending.id)))


def _pending_and_waiting(held: Held) -> None:
    values = _copy_of(held.connection, held.pending, key=None, reason="retry", due_at=database_now())
    held.connection.execute(insert(WAITING).values(values))


def _pending_twice(held: Held) -> None:
    held.connection.execute(insert(HOT).values(_copy_of(held.connection, held.pending)))


def _waiting_twice(held: Held) -> None:
    values = _copy_of(held.connection, held.head, key=None, reason="retry", due_at=database_now())
    held.connection.execute(insert(WAITING).values(values))


def _dead_and_unpublished(held: Held) -> None:
    values = _copy_of(held.connection, held.pending, message_id=UUID(held.dead.message_id))
    held.connection.execute(insert(HOT).values(values))


def _stopped_without_head(held: Held) -> None:
    held.connection.execute(delete(WAITING).where(WAITING.c.reason != "scheduled"))


def _parked_without_letter(held: Held) -> None:
    values = {"topic": "orders", "key": b"other", "shard": 0, "position": 1, "reason": "parked"}
    held.connection.execute(insert(STOPPED).values(values))


def _follower_without_stop(held: Held) -> None:
    held.connection.execute(delete(STOPPED))


def _ahead_of_head(held: Held) -> None:
    held.connection.execute(update(WAITING).where(WAITING.c.reason == "follower").values(position=0))


def _waits_for_nothing(held: Held) -> None:
    held.connection.execute(update(WAITING).where(WAITING.c.reason == "scheduled").values(due_at=None))


def _shard_unknown(held: Held) -> None:
    held.connection.execute(delete(tables.outbox_shards).where(tables.outbox_shards.c.shard == _shard(held)))


def _shard(held: Held) -> int:
    return int(held.connection.execute(select(HOT.c.shard)).scalars().first() or 0)


def _evidence_torn(held: Held) -> None:
    held.connection.execute(insert(LEDGER).values(_evidence(uuid4(), offsets=[1, 2])))


def _dead_without_inbox_row(held: Held) -> None:
    held.connection.execute(delete(INBOX))


def _dead_and_handled(held: Held) -> None:
    held.connection.execute(update(INBOX).where(INBOX.c.outcome == DEAD).values(outcome=None))


def _freed_without_replay(held: Held) -> None:
    other = {"consumer": "billing", "source": "shop", "message_id": "other", "outcome": DEAD}
    held.connection.execute(insert(INBOX).values(other))
    inbox.unblock(held.connection, [("billing", "shop", "other")])


def _replay_lost(held: Held) -> None:
    dead_letters.replay(held.connection, [held.billed.id], by="ana", why="x")
    held.connection.execute(delete(HOT).where(HOT.c.message_id == UUID(held.billed.message_id)))


def _letter_torn(held: Held) -> None:
    this = LETTERS.c.state == "discarded"
    held.connection.execute(update(LETTERS).where(this).values(closed_at=None))


def _replay_torn(held: Held) -> None:
    values = {"replay_id": uuid4(), "number": 1, "letter_id": uuid4()}
    held.connection.execute(insert(tables.dead_letter_replay_items).values(values))


PLANTS: dict[str, Callable[[Held], None]] = {
    name.removeprefix("_").replace("_", "-"): plant
    for name, plant in list(globals().items())
    if name.startswith("_") and name.removeprefix("_").replace("_", "-") in {rule.name for rule in RULES}
}


def test_every_rule_has_a_plant() -> None:
    assert set(PLANTS) == {rule.name for rule in RULES}


def test_each_contradiction_is_named_and_no_other(held: Held) -> None:
    for name, plant in PLANTS.items():
        savepoint = held.connection.begin_nested()
        plant(held)
        found = audit(held.connection).contradictions
        savepoint.rollback()

        assert {one.name for one in found} == {name}
        assert found[0].count == len(found[0].examples) > 0
    assert audit(held.connection).contradictions == ()


def test_what_comes_twice_on_purpose_is_counted_once_and_contradicts_nothing(held: Held) -> None:
    unique = order(9, message_id="9b2e6f3a-3d0f-5c11-8f1e-0a6a1d6f7c55")  # of version 5: made of a name
    before = audit(held.connection).emitted
    outbox.write(held.connection, [unique, unique])
    dead_letters.replay(held.connection, [held.billed.id], by="ana", why="x")

    found = audit(held.connection)

    assert found.contradictions == ()
    assert found.emitted == before + 2  # the one with a name, and the other application's message that is replayed
    assert found.inbox["billing"]["open"] == 1
    assert json.dumps(found.accounts)
