"""A saga over two services, on SQLite: commands leave through the outbox, answers come in through the inbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, create_engine, delete, select
from sqlalchemy.orm import Session, sessionmaker

from outboxkit import Consumer, DeadLetter, dead_letters, event, migrations, outbox_tables, publish, tables
from outboxkit.errors import ConfigurationError
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.message import Message
from outboxkit.saga import Saga, Status, compensate, find, get, pause, register, resume, started_by, step, wait
from outboxkit.testing.delivery import ConsumerHarness
from tests.consumer_fixture import Base, impatient
from tests.sqlite_template import copied


@event("order.placed")
@dataclass(frozen=True)
class OrderPlaced:
    order_id: int
    total: int


@event("stock.reserve")
@dataclass(frozen=True)
class ReserveStock:
    order_id: int


@event("stock.release")
@dataclass(frozen=True)
class ReleaseStock:
    order_id: int
    shelf: str


@event("stock.reserved")
@dataclass(frozen=True)
class StockReserved:
    order_id: int
    shelf: str


@event("stock.rejected")
@dataclass(frozen=True)
class StockRejected:
    order_id: int


@event("card.charge")
@dataclass(frozen=True)
class ChargeCard:
    order_id: int
    total: int


@event("card.refund")
@dataclass(frozen=True)
class RefundCard:
    order_id: int


@event("card.charged")
@dataclass(frozen=True)
class CardCharged:
    order_id: int


@event("card.declined")
@dataclass(frozen=True)
class CardDeclined:
    order_id: int


@event("order.approved")
@dataclass(frozen=True)
class Approved:
    order_id: int


@event("order.ended")
@dataclass(frozen=True)
class OrderEnded:
    order_id: int
    how: str


@dataclass
class State:
    order_id: int
    total: int
    shelf: str = ""


class Checkout(Saga[State], name="checkout", key="order_id"):
    start = started_by(OrderPlaced, topic="orders")
    reserve = step(
        ReserveStock,
        to="inventory",
        done=StockReserved,
        failed=StockRejected,
        replies="stock",
        keep=["shelf"],
        compensate=ReleaseStock,
        timeout="2m",
    )
    charge = step(
        ChargeCard,
        to="payments",
        done=CardCharged,
        failed=CardDeclined,
        replies="cards",
        compensate=RefundCard,
        timeout="1m",
        tries=2,
    )

    def on_completed(self, state: State, session: Session) -> None:
        publish(session, OrderEnded(state.order_id, "completed"), topic="ends", key=str(state.order_id))

    def on_compensated(self, state: State, session: Session) -> None:
        publish(session, OrderEnded(state.order_id, "compensated"), topic="ends", key=str(state.order_id))


class World:
    """The saga's database, its consumer, and the messages that left."""

    def __init__(self, engine: Engine, *sagas: type[Saga[State]]) -> None:
        self.engine = engine
        self.consumer = Consumer("checkout", sessions=sessionmaker(engine), retry=impatient(delayed=1))
        register(self.consumer, *sagas)
        self.harness = ConsumerHarness(engine)
        self.sent: list[Message] = []

    async def say(self, event: object, topic: str, *, times: int = 1) -> list[str]:
        await self.harness.deliver(event, consumer=self.consumer, topic=topic, times=times)
        return self.left()

    def left(self) -> list[str]:
        """What left since the last look: ``type`` of each message that was not for the saga itself."""
        with self.engine.begin() as connection:
            rows = connection.execute(select(tables.outbox_messages).order_by(tables.outbox_messages.c.position)).all()
            connection.execute(delete(tables.outbox_messages))
        found = [from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload) for row in rows]
        self.sent += found
        return [message.type for message in found]

    async def time_passes(self) -> list[str]:
        """Ends every wait that was begun, the earliest first."""
        with self.engine.begin() as connection:
            waiting = tables.outbox_waiting
            rows = connection.execute(select(waiting).order_by(waiting.c.id)).all()
            connection.execute(delete(waiting))
        for row in rows:
            message = from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)
            await self.harness.deliver(message, consumer=self.consumer)
        return self.left()

    def letters(self) -> list[DeadLetter]:
        with self.engine.connect() as connection:
            return dead_letters.find(connection, dead_letters.Filter())

    def status(self, key: str = "1") -> Status:
        with self.engine.connect() as connection:
            found = get(connection, "checkout", key)
        assert found is not None
        return found.instance.status


def create_tables(connection: Connection) -> None:
    outbox_tables(Base.metadata)
    Base.metadata.create_all(connection)
    migrations.upgrade(connection)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = create_engine(copied(tmp_path / "saga.db", create_tables))
    yield engine
    engine.dispose()


@pytest.fixture
def world(engine: Engine) -> World:
    return World(engine, Checkout)


async def test_a_saga_whose_steps_succeed_is_completed(world: World) -> None:
    assert await world.say(OrderPlaced(1, 5), "orders") == ["stock.reserve"]
    assert await world.say(StockReserved(1, "B7"), "stock") == ["card.charge"]
    assert await world.say(CardCharged(1), "cards") == ["order.ended"]

    assert world.status() is Status.COMPLETED
    assert b'"completed"' in world.sent[-1].payload


async def test_a_refused_step_undoes_the_steps_before_it(world: World) -> None:
    await world.say(OrderPlaced(1, 5), "orders")
    await world.say(StockReserved(1, "B7"), "stock")

    assert await world.say(CardDeclined(1), "cards") == ["stock.release", "order.ended"]

    assert world.status() is Status.COMPENSATED
    assert b'"shelf":"B7"' in world.sent[-2].payload


async def test_a_step_without_an_answer_is_tried_again_and_then_undone_too(world: World) -> None:
    await world.say(OrderPlaced(1, 5), "orders")
    await world.say(StockReserved(1, "B7"), "stock")

    assert await world.time_passes() == ["card.charge"]
    assert await world.time_passes() == ["card.refund", "stock.release", "order.ended"]

    assert world.status() is Status.COMPENSATED
    keys = [message.header("idempotency-key") for message in world.sent if message.type.startswith("card.")]
    assert keys == ["checkout/1/charge", "checkout/1/charge", "checkout/1/charge/undo"]


async def test_a_key_that_no_index_can_hold_is_a_dead_letter_with_the_reason(world: World) -> None:
    assert await world.say(OrderPlaced(10**1_050, 5), "orders") == []

    (letter,) = world.letters()
    assert (letter.failure, letter.state) == ("poison", "dead")
    assert letter.error == "order_id, which names an instance of checkout, has 1,051 bytes, at most 1,024 are kept"


async def test_answers_that_come_twice_late_or_out_of_turn_change_nothing(world: World) -> None:
    assert await world.say(OrderPlaced(1, 5), "orders") == ["stock.reserve"]
    assert await world.say(OrderPlaced(1, 7), "orders") == []
    assert await world.say(CardCharged(1), "cards") == []
    assert await world.say(StockReserved(1, "B7"), "stock", times=3) == ["card.charge"]
    assert await world.say(StockReserved(1, "C9"), "stock") == []
    assert await world.say(CardDeclined(1), "cards") == ["stock.release", "order.ended"]
    assert await world.say(CardCharged(1), "cards") == []

    assert world.status() is Status.COMPENSATED


async def test_an_answer_for_nobody_becomes_a_dead_letter_and_holds_up_no_other(world: World) -> None:
    await world.say(OrderPlaced(1, 5), "orders")

    await world.say(StockReserved(99, "B7"), "stock")

    (letter,) = world.harness.dead
    assert letter.error.startswith("there is no instance 99 of the saga checkout")
    assert await world.say(StockReserved(1, "B7"), "stock") == ["card.charge"]


async def test_an_operator_compensates_or_resumes_through_the_outbox(world: World) -> None:
    await world.say(OrderPlaced(1, 5), "orders")
    await world.say(StockReserved(1, "B7"), "stock")

    async def ask(verb: Callable[..., None]) -> list[str]:
        with Session(world.engine) as session, session.begin():
            verb(session.connection(), "checkout", "1", by="ana", why="ticket 7")
        with world.engine.begin() as connection:
            row = connection.execute(select(tables.outbox_messages)).one()
        world.left()
        message = from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)
        await world.harness.deliver(message, consumer=world.consumer)
        return world.left()

    assert await ask(resume) == ["card.charge"]
    assert await ask(compensate) == ["card.refund", "stock.release", "order.ended"]
    assert world.status() is Status.COMPENSATED


async def test_the_history_says_what_happened_and_listings_find_it(world: World) -> None:
    await world.say(OrderPlaced(1, 5), "orders")
    await world.say(OrderPlaced(2, 5), "orders")
    await world.say(StockRejected(2), "stock")

    with world.engine.connect() as connection:
        (running,) = find(connection, status=Status.RUNNING)
        (ended,) = find(connection, saga="checkout", status=Status.COMPENSATED)

    assert (running.key, running.step, running.due_at is not None) == ("1", "reserve", True)
    assert [text for _, text in ended.history] == [
        "started by order.placed",
        "reserve: sent to inventory",
        "stock.rejected",
        "compensated",
    ]


async def test_an_instance_goes_on_with_the_version_that_began_it(engine: Engine) -> None:
    class Longer(Saga[State], name="checkout", key="order_id", version=2):
        start = started_by(OrderPlaced, topic="orders")
        reserve = step(ReserveStock, to="inventory", done=StockReserved, replies="stock", keep=["shelf"])
        approve = wait(Approved, replies="approvals")
        rest = pause("1h")
        charge = step(ChargeCard, to="payments")

    old = World(engine, Checkout)
    await old.say(OrderPlaced(1, 5), "orders")
    new = World(engine, Checkout, Longer)
    await new.say(OrderPlaced(2, 5), "orders")

    assert await new.say(StockReserved(1, "B7"), "stock") == ["card.charge"]
    assert await new.say(StockReserved(2, "B7"), "stock") == []
    assert await new.say(Approved(2), "approvals") == []
    assert await new.time_passes() == ["card.charge", "card.charge"]  # the old one's second try, and the new one's end
    assert new.status("2") is Status.COMPLETED


async def test_a_version_that_is_not_registered_is_said(engine: Engine) -> None:
    class Newer(Saga[State], name="checkout", key="order_id", version=2):
        start = started_by(OrderPlaced, topic="orders")
        reserve = step(ReserveStock, to="inventory", done=StockReserved, replies="stock")

    await World(engine, Checkout).say(OrderPlaced(1, 5), "orders")
    world = World(engine, Newer)
    await world.say(StockReserved(1, "B7"), "stock")

    assert "begun by version 1 of the saga, and only 2 is registered" in world.harness.dead[0].error


@pytest.mark.parametrize(
    ("declare", "why"),
    [
        (lambda: step(ReserveStock, to="x", failed=StockRejected), "needs done"),
        (lambda: step(ReserveStock, to="x", done=StockReserved), "needs replies"),
        (lambda: step(ReserveStock, to="x", tries=3), "needs timeout"),
        (lambda: step(ReserveStock, to="x", tries=0), "from 1 to 100"),
        (lambda: pause("soon"), "soon"),
    ],
)
def test_a_step_that_contradicts_itself_is_refused(declare: Callable[[], object], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        declare()


def test_a_saga_without_steps_or_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):

        class Empty(Saga[State], name="empty", key="order_id"):
            start = started_by(OrderPlaced, topic="orders")

    with pytest.raises(ConfigurationError, match="no field 'number'"):

        class Keyless(Saga[State], name="keyless", key="number"):
            start = started_by(OrderPlaced, topic="orders")
            reserve = step(ReserveStock, to="inventory")
