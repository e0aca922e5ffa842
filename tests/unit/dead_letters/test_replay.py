"""Dead letters are replayed through the outbox, to the consumer that failed, when its reader can read them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from outboxkit import _failpoints, avro, dead_letters, tables
from outboxkit._failpoints import FailpointHit
from outboxkit._sql import database_now
from outboxkit.codecs import codec_named
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.dead_letters import DeadLetter, Decision, Filter, State
from outboxkit.errors import ReplayError
from outboxkit.events import EventType
from outboxkit.headers import LETTER, REPLAY_FOR, unpack_headers
from outboxkit.message import Message
from outboxkit.policy import Failure
from tests.consumer_fixture import ConsumerFixture, Effect, impatient, order, row_of

NUMBER = {"name": "number", "type": "int"}
WRITER = {"type": "record", "name": "OrderPlaced", "fields": [NUMBER]}
STRICT = WRITER | {"fields": [NUMBER, {"name": "vat", "type": "int"}]}
REPAIRED = WRITER | {"fields": [NUMBER, {"name": "vat", "type": "int", "default": 0}]}


def consumer(
    world: ConsumerFixture, name: str = "billing", *, schema: dict[str, Any] | None = None, fails: bool = False
) -> Consumer:
    found = Consumer(
        name, sessions=world.asynchronous, retry=impatient(delayed=1), resolve=lambda _: json.dumps(WRITER)
    )
    placed = EventType(name="order.placed", schema=schema, codec="avro" if schema else "json")

    @found.on(placed, topic="orders")
    async def handle(event: dict[str, Any], session: AsyncSession, ctx: MessageContext) -> None:
        session.add(Effect(message_id=f"{name} {ctx.id}", number=event["number"]))
        await session.flush()
        if fails:
            raise KeyError

    return found


def avro_order(number: int) -> Message:
    encoded = codec_named("avro").encode(
        {"number": number}, EventType(name="order.placed", schema=WRITER, codec="avro")
    )
    return order(number, payload=encoded.payload, content_type=encoded.content_type, schema=encoded.schema)


def letters(world: ConsumerFixture, **which: Any) -> list[DeadLetter]:
    with world.engine.connect() as connection:
        return sorted(
            dead_letters.find(connection, Filter(**{"state": None} | which)), key=lambda letter: letter.generation
        )


def replay(world: ConsumerFixture, ids: Sequence[UUID], **options: Any) -> list[Decision]:
    with world.engine.begin() as connection:
        return dead_letters.replay(connection, ids, **{"by": "ana", "why": "fixed"} | options)


async def dead(world: ConsumerFixture, message: Message | None = None) -> tuple[Message, DeadLetter]:
    message = message or order(1)
    world.send(message)
    await world.run(consumer(world, fails=True))
    (letter,) = letters(world, state=State.DEAD)
    return message, letter


async def test_a_replay_is_refused_with_the_field_until_the_reader_is_repaired(world: ConsumerFixture) -> None:
    sent = avro_order(5)
    world.send(sent)
    await world.run(consumer(world, schema=STRICT))
    (letter,) = letters(world)
    assert letter.failure is Failure.POISON
    assert letter.writer_schema == avro.fingerprint(avro.parse(WRITER)).hex()
    assert letter.reader_schema == avro.fingerprint(avro.parse(STRICT)).hex()
    assert [problem["field"] for problem in letter.problems] == ["OrderPlaced.vat"]

    with pytest.raises(ReplayError, match=r"billing cannot read order\.placed yet.*OrderPlaced\.vat"):
        replay(world, [letter.id])
    assert world.count(tables.outbox_messages) == 0

    repaired, shipping = consumer(world, schema=REPAIRED), consumer(world, "shipping", schema=REPAIRED)
    await world.run(repaired)
    replay(world, [letter.id])
    assert world.relay() == 1
    await world.run(repaired)
    assert world.effects() == [5]
    assert letters(world)[0].state is State.REPLAYED

    await world.run(shipping)
    assert shipping.counts == {"handled": 1, "ignored": 1}, "the first delivery was for everybody, the replay was not"


@pytest.mark.parametrize("broken", [{"payload": b"{"}, {"id": ""}])
async def test_what_could_not_be_read_is_refused_while_the_same_run_would_read_it_again(
    world: ConsumerFixture, broken: dict[str, Any]
) -> None:
    """JSON has no schema to check. It may be readable as soon as nobody runs who could not read it."""
    world.send(dataclasses.replace(order(5), **broken))
    await world.run(consumer(world))
    (letter,) = letters(world)
    (allowed,) = replay(world, [letter.id], dry_run=True)

    runs(world, started=timedelta(minutes=-1))
    with pytest.raises(ReplayError, match=r"billing, as it runs now, could not read .*: stop it and start"):
        replay(world, [letter.id])
    (forced,) = replay(world, [letter.id], force=True, dry_run=True)
    (repaired,) = replay(world, [letter.id], payload=b'{"number": 5}', dry_run=True)
    (renamed,) = replay(world, [letter.id], to="shipping", force=True, dry_run=True)

    runs(world, started=timedelta(seconds=1))
    (started_again,) = replay(world, [letter.id])
    assert {one.action for one in (allowed, forced, repaired, renamed, started_again)} == {"publish"}


def runs(world: ConsumerFixture, *, started: timedelta) -> None:
    """Says that a run of billing that began then is alive."""
    values = {"started_at": database_now(started), "expires_at": database_now(timedelta(minutes=1))}
    with world.engine.begin() as connection:
        connection.execute(
            tables.inbox_consumers.insert().values(id=uuid4(), consumer="billing", host="a/1/b", **values)
        )


async def test_the_replayed_message_has_its_own_id_and_bytes_and_says_for_whom(world: ConsumerFixture) -> None:
    sent, letter = await dead(world, order(1, headers=(("tenant", b"\xff"),)))

    replay(world, [letter.id])

    (row,) = world.rows(tables.outbox_messages)
    old, new = dict(unpack_headers(letter.headers)), dict(unpack_headers(row.headers))
    assert (str(row.message_id), row.payload, row.key, row.topic, row.type) == (
        sent.id,
        sent.payload,
        b"k",
        "orders",
        "order.placed",
    )
    ours = ("ce_sequence", "ce_recordedtime")  # the relay adds new ones
    assert new == {name: value for name, value in old.items() if name not in ours} | {
        REPLAY_FOR: b"billing",
        LETTER: str(letter.id).encode(),
    }


async def test_a_letter_is_replaying_until_its_consumer_has_handled_it(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    replay(world, [letter.id])
    assert letters(world)[0].state is State.REPLAYING
    world.relay()
    await world.run(consumer(world))

    (after,) = letters(world)
    assert after.state is State.REPLAYED
    assert after.closed_at is not None
    assert world.effects() == [1]


@pytest.mark.parametrize("fails", [False, True])
async def test_the_inbox_remembers_a_replay_from_its_own_end_on(world: ConsumerFixture, *, fails: bool) -> None:
    _, letter = await dead(world)
    long_ago = tables.inbox_messages.update().values(handled_at=database_now(-timedelta(days=10)))
    with world.engine.begin() as connection:
        connection.execute(long_ago)

    replay(world, [letter.id])
    world.relay()
    await world.run(consumer(world, fails=fails))

    (row,) = world.rows(tables.inbox_messages)
    assert row.handled_at > letter.died_at, "else it forgets days too early, and a redelivery has an effect"


async def test_a_replay_that_dies_again_is_a_child_of_the_first_letter(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    replay(world, [letter.id])
    world.relay()
    await world.run(consumer(world, fails=True))

    first, second = letters(world)
    assert (first.state, second.state) == (State.REPLAYED, State.DEAD)
    assert (second.parent_id, second.generation, second.message_id) == (first.id, 1, first.message_id)


async def test_replays_end_after_some_generations_unless_forced(world: ConsumerFixture) -> None:
    await dead(world)
    for _ in range(dead_letters.MAX_REPLAYS):
        (last,) = letters(world, state=State.DEAD)
        replay(world, [last.id])
        world.relay()
        await world.run(consumer(world, fails=True))
    (last,) = letters(world, state=State.DEAD)

    with pytest.raises(ReplayError, match="3 times"):
        replay(world, [last.id])
    replay(world, [last.id], force=True)

    assert world.count(tables.outbox_messages) == 1


async def test_replaying_twice_writes_one_row(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    first, second = replay(world, [letter.id]), replay(world, [letter.id])

    assert [first[0].action, second[0].action] == ["publish", "none"]
    assert "already" in second[0].reason
    assert world.count(tables.outbox_messages) == 1


@pytest.mark.parametrize("point", ["replay.written", "replay.claimed"])
async def test_a_crash_inside_a_replay_changes_nothing_and_it_can_go_on(world: ConsumerFixture, point: str) -> None:
    _, letter = await dead(world)
    _failpoints.enable(f"{point}=raise")

    with pytest.raises(FailpointHit):
        replay(world, [letter.id])
    assert world.count(tables.outbox_messages) == 0
    assert letters(world)[0].state is State.DEAD
    assert world.count(tables.inbox_messages) == 1, "still condemned"

    replay(world, [letter.id])
    assert world.count(tables.outbox_messages) == 1


async def test_a_dry_run_tells_the_same_and_writes_nothing(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    dry = replay(world, [letter.id], dry_run=True)

    assert world.count(tables.outbox_messages) + world.count(tables.outbox_audit) == 0
    assert letters(world)[0].state is State.DEAD
    assert replay(world, [letter.id]) == dry


async def test_several_letters_get_a_reason_each(world: ConsumerFixture) -> None:
    _, letter = await dead(world)
    unknown = uuid4()

    plans = {plan.id: plan for plan in replay(world, [letter.id, unknown])}

    assert plans[letter.id].action == "publish"
    assert plans[unknown].refused
    assert "no dead letter" in plans[unknown].reason


async def test_a_repaired_payload_is_a_new_message_and_the_original_stays(world: ConsumerFixture) -> None:
    sent, letter = await dead(world)

    replay(world, [letter.id], payload=b'{"number": 2}')
    world.relay()
    await world.run(consumer(world))

    first, second = letters(world)
    assert (first.payload, first.state, second.state) == (sent.payload, State.REPLAYED, State.REPLAYED)
    assert second.parent_id == first.id
    assert second.message_id != first.message_id
    assert world.effects() == [2]


async def test_what_the_inbox_may_have_forgotten_is_refused(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    with pytest.raises(ReplayError, match="older than the inbox remembers"):
        replay(world, [letter.id], inbox_retention=timedelta(microseconds=1))

    assert replay(world, [letter.id], inbox_retention=timedelta(microseconds=1), force=True)[0].action == "publish"


async def test_everything_is_audited(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    replay(world, [letter.id], why="vat has a default now; consumer=billing")
    with world.engine.begin() as connection:
        assert dead_letters.discard(connection, [letter.id], by="ben", why="no") == 0, "it is not dead any more"

    entries = [(row.who, row.action, row.target, row.why) for row in world.rows(tables.outbox_audit)]
    assert entries[0] == ("ana", "dlq.replay", str(letter.id), "vat has a default now; consumer=billing")
    assert [entry[:2] for entry in entries] == [("ana", "dlq.replay"), ("ben", "dlq.discard")]


async def test_a_discarded_letter_is_closed_and_cannot_be_replayed(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    with world.engine.begin() as connection:
        assert dead_letters.discard(connection, [letter.id], by="ana", why="test order") == 1

    with pytest.raises(ReplayError, match="is discarded"):
        replay(world, [letter.id])


async def test_letters_are_found_by_stable_fields(world: ConsumerFixture) -> None:
    _, letter = await dead(world)

    assert [found.id for found in letters(world, group=letter.group, error_class="KeyError", key=b"k")] == [letter.id]
    assert letters(world, consumer="shipping") == letters(world, since=letter.died_at + timedelta(seconds=1)) == []  # type: ignore[operator]
    with world.engine.connect() as connection:
        assert dead_letters.count(connection, Filter(consumer="billing")) == 1
        assert dead_letters.get(connection, letter.id) == letter
        assert dead_letters.get(connection, uuid4()) is None


def relay_letter(world: ConsumerFixture, key: bytes | None = b"k") -> DeadLetter:
    message = order(1, key=None if key is None else key.decode())
    letter = dead_letters.of_row(row_of(message, position=7), Failure.TOO_LARGE, "at most 1 MB", 2)
    with world.engine.begin() as connection:
        dead_letters.bury(connection, letter)
    return letter


def test_a_relays_letter_becomes_a_fresh_row_for_everybody(world: ConsumerFixture) -> None:
    letter = relay_letter(world)

    assert replay(world, [letter.id])[0].action == "publish"

    (row,) = world.rows(tables.outbox_messages)
    assert REPLAY_FOR not in dict(unpack_headers(row.headers))
    assert letters(world)[0].state is State.REPLAYED


def test_the_head_of_a_parked_key_is_brought_back_by_its_relay(world: ConsumerFixture) -> None:
    letter = relay_letter(world)
    stopped = tables.outbox_stopped_keys
    with world.engine.begin() as connection:
        connection.execute(stopped.insert().values(topic="orders", key=b"k", shard=0, position=7, reason="parked"))

    assert replay(world, [letter.id])[0].action == "repair"

    with world.engine.connect() as connection:
        assert connection.execute(select(stopped.c.request, stopped.c.requested_by)).one() == ("repair", "ana")
    assert world.count(tables.outbox_messages) == 0
    assert letters(world)[0].state is State.REPLAYING


@pytest.fixture(autouse=True)
def _disarmed() -> Any:
    yield
    _failpoints.disable()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit.consumer.run.IDLE", timedelta(milliseconds=5))
