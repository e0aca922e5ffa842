"""Capture follows the flush: what it deletes, where it writes, in which order, and what a helper must not undo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Delete, Engine, ForeignKey, Update, create_engine, delete, insert, select, text, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, scoped_session, sessionmaker

from outboxkit import CaptureError, ChangeCapture, Outbox, OutboxMixin, bulk, migrations, publish, tables
from outboxkit.capture import begin_sqlite_transactions
from outboxkit.errors import ConfigurationError
from tests.integration.capture.model import Noted, Order, OrderPlaced
from tests.integration.capture.world import CaptureDatabase

pytestmark = pytest.mark.sqlalchemy_lines


class Base(DeclarativeBase):
    pass


class Cart(OutboxMixin, Base):
    __tablename__ = "carts"
    __outbox__ = Outbox(topic="carts", key="id", changes=ChangeCapture())

    id: Mapped[int] = mapped_column(primary_key=True)
    lines: Mapped[list[CartLine]] = relationship(cascade="all, delete-orphan", back_populates="cart")
    box: Mapped[Box | None] = relationship(cascade="all, delete-orphan", uselist=False)


class Box(OutboxMixin, Base):
    __tablename__ = "boxes"
    __outbox__ = Outbox(topic="boxes", key="id", changes=ChangeCapture(coalesce="flush"))

    id: Mapped[int] = mapped_column(primary_key=True)
    cart_id: Mapped[int] = mapped_column(ForeignKey("carts.id"))


class CartLine(OutboxMixin, Base):
    __tablename__ = "cart_lines"
    __outbox__ = Outbox(topic="lines", key="id", changes=ChangeCapture())

    id: Mapped[int] = mapped_column(primary_key=True)
    cart_id: Mapped[int] = mapped_column(ForeignKey("carts.id"))
    sku: Mapped[str] = mapped_column(default="")
    cart: Mapped[Cart] = relationship(back_populates="lines")
    gifts: Mapped[list[Gift]] = relationship(cascade="all, delete-orphan")


class Gift(OutboxMixin, Base):
    __tablename__ = "gifts"
    __outbox__ = Outbox(topic="gifts", key="id", changes=ChangeCapture())

    id: Mapped[int] = mapped_column(primary_key=True)
    line_id: Mapped[int] = mapped_column(ForeignKey("cart_lines.id"))


@pytest.fixture
def carts(world: CaptureDatabase) -> Iterator[CaptureDatabase]:
    Base.metadata.create_all(world.observer)
    yield world
    Base.metadata.drop_all(world.observer)


def filled(session: Session) -> Cart:
    cart = Cart(lines=[CartLine(sku="a", gifts=[Gift(), Gift()]), CartLine(sku="b")], box=Box())
    session.add(cart)
    session.commit()
    session.execute(delete(tables.outbox_messages))
    session.commit()
    return cart


def told(world: CaptureDatabase) -> list[str]:
    return sorted(row.type for row in world.rows())


# --- what the flush deletes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("expire", [True, False], ids=["expired", "loaded"])
def test_an_orphan_and_its_own_children_are_told_with_their_values(carts: CaptureDatabase, *, expire: bool) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        line = cart.lines[0]
        cart.lines.remove(line)
        if expire:
            session.expire(line, ["sku"])
        session.commit()

    carts.run(scenario)

    assert told(carts) == ["cartline.deleted", "gift.deleted", "gift.deleted"]
    (line,) = [found for found in carts.events() if "sku" in found["old"]]
    assert line["old"]["sku"] == "a"


def test_a_collection_that_is_replaced_tells_what_left_and_what_came(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        cart.lines = [CartLine(sku="c"), cart.lines[1]]
        session.commit()

    carts.run(scenario)

    assert told(carts) == ["cartline.created", "cartline.deleted", "gift.deleted", "gift.deleted"]


def test_a_scalar_child_that_is_replaced_or_emptied_is_told(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        cart.box = Box()
        session.flush()
        cart.box = None
        session.commit()

    carts.run(scenario)

    assert told(carts) == ["box.created", "box.deleted", "box.deleted"]


def test_a_deleted_parent_tells_its_whole_tree_once(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        session.delete(filled(session))
        session.commit()

    carts.run(scenario)

    assert told(carts) == [
        "box.deleted",
        "cart.deleted",
        "cartline.deleted",
        "cartline.deleted",
        "gift.deleted",
        "gift.deleted",
    ]


def test_an_orphan_that_was_changed_first_is_told_as_deleted_only(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        line = cart.lines[1]
        line.sku = "changed"
        cart.lines.remove(line)
        session.commit()

    carts.run(scenario)

    assert told(carts) == ["cartline.deleted"]


def test_a_child_that_moves_to_another_parent_is_no_orphan(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        other = Cart()
        session.add(other)
        other.lines.append(cart.lines[1])
        session.commit()

    carts.run(scenario)

    assert told(carts) == ["cart.created", "cartline.updated"]


def test_a_new_child_that_leaves_before_the_flush_was_never_there(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        line = CartLine(sku="c")
        cart.lines.append(line)
        cart.lines.remove(line)
        session.commit()

    carts.run(scenario)

    assert told(carts) == []


def test_an_orphans_own_event_is_made_before_its_row_is_gone(carts: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        cart = filled(session)
        line = cart.lines[1]
        line.emit(lambda: {"sku": line.sku}, type="line.left")
        session.expire(line, ["sku"])
        cart.lines.remove(line)
        session.commit()

    carts.run(scenario)

    assert {"sku": "b"} in carts.events()


# --- in which order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["order", "line", "both"])
def test_one_flush_keeps_the_order_of_emission_however_objects_join_the_session(
    world: CaptureDatabase, first: str
) -> None:
    from tests.integration.capture.model import Line

    def scenario(session: Session) -> None:
        order, line = Order(), Line(sku="a")
        order.lines.append(line)
        order.emit(Noted("1"), topic="one", key="k")
        line.emit(Noted("2"), topic="one", key="k")
        order.emit(Noted("3"), topic="one", key="k")
        joining: dict[str, list[object]] = {"order": [order], "line": [line], "both": [line, order]}
        session.add_all(joining[first])
        publish(session, Noted("4"), topic="one", key="k")
        line.emit(Noted("5"), topic="one", key="k")
        session.commit()

    world.run(scenario)

    assert [found["text"] for found in world.events()] == ["1", "2", "3", "4", "5"]


# --- where it is written -----------------------------------------------------------------------------------------


class RoutingSession(Session):
    """SQLAlchemy's recipe: writes go to the leader, everything else to a follower."""

    leader: Engine
    follower: Engine

    def get_bind(self, *_: Any, clause: Any = None, **__: Any) -> Any:
        return self.leader if self._flushing or isinstance(clause, Update | Delete) else self.follower


@pytest.fixture
def leader_and_follower(tmp_path: Path) -> Iterator[tuple[Engine, Engine]]:
    engines = [create_engine(f"sqlite:///{tmp_path}/{name}.db") for name in ("leader", "follower")]
    for engine in engines:
        begin_sqlite_transactions(engine)
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            migrations.upgrade(connection)
    RoutingSession.leader, RoutingSession.follower = engines
    yield engines[0], engines[1]
    for engine in engines:
        engine.dispose()


def flush_then_commit(session: Session) -> None:
    session.add(Cart())
    session.flush()
    session.commit()


def flush_then_savepoint(session: Session) -> None:
    session.add(Cart())
    session.flush()
    with session.begin_nested():
        session.add(Cart())
    session.commit()


def publish_alone(session: Session) -> None:
    publish(session, Noted("x"), topic="notes")
    session.commit()


def publish_before_a_savepoint(session: Session) -> None:
    publish(session, Noted("x"), topic="notes")
    with session.begin_nested():
        publish(session, Noted("y"), topic="notes")
    session.commit()


def publish_after_a_flush(session: Session) -> None:
    from sqlalchemy import event

    event.listen(session, "after_flush", lambda *_: publish(session, Noted("late"), topic="notes"), once=True)
    session.add(Cart())
    session.commit()


def read_first(session: Session) -> None:
    session.execute(select(Cart)).all()
    session.add(Cart())
    session.flush()
    session.execute(select(Cart)).all()
    session.commit()


@pytest.mark.parametrize(
    "scenario",
    [
        flush_then_commit,
        flush_then_savepoint,
        publish_alone,
        publish_before_a_savepoint,
        publish_after_a_flush,
        read_first,
    ],
)
def test_a_routing_session_writes_messages_where_it_writes_rows(
    leader_and_follower: tuple[Engine, Engine], scenario: Any
) -> None:
    leader, follower = leader_and_follower
    with RoutingSession() as session:
        scenario(session)

    def count(engine: Engine) -> int:
        with engine.connect() as connection:
            return len(connection.execute(select(tables.outbox_messages)).all())

    assert count(leader) >= 1
    assert count(follower) == 0


# --- bulk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autoflush", [True, False])
@pytest.mark.parametrize("block", [False, True], ids=["plainly", "no_autoflush"])
def test_bulk_keeps_what_the_session_had_not_flushed(world: CaptureDatabase, *, autoflush: bool, block: bool) -> None:
    def scenario(session: Session) -> None:
        order, other = Order(total=10), Order(total=20)
        session.add_all([order, other])
        session.commit()
        order.total = 12
        other.status = "held"
        session.add(Order(total=5))
        statement = update(Order).values(total=Order.total + 1)
        if block:
            with session.no_autoflush:
                bulk(session, statement, lambda found: OrderPlaced(found.id, found.total))
        else:
            bulk(session, statement, lambda found: OrderPlaced(found.id, found.total))
        session.commit()
        assert (order.total, other.total, other.status) == (13, 21, "held")

    world.run(scenario, autoflush=autoflush)

    assert sorted(found["total"] for found in world.events()) == [6, 13, 21]


def test_bulk_deletes_what_was_changed_and_not_flushed_as_it_is(world: CaptureDatabase) -> None:
    def scenario(session: Session) -> None:
        order = Order(total=10)
        session.add(order)
        session.commit()
        order.total = 12
        bulk(session, delete(Order).where(Order.total == 12), lambda found: OrderPlaced(found.id, found.total))
        session.commit()

    world.run(scenario, autoflush=False)

    assert [found["total"] for found in world.events()] == [12]


@pytest.mark.parametrize("how", ["values", "parameters"])
def test_bulk_inserts_more_rows_than_a_statement_has_parameters(sync_world: CaptureDatabase, how: str) -> None:
    rows = [{"total": number} for number in range(25_000)]

    def scenario(session: Session) -> None:
        make = lambda found: OrderPlaced(None, found.total)  # noqa: E731
        if how == "values":
            assert bulk(session, insert(Order).values(rows), make) == len(rows)
        else:
            assert bulk(session, insert(Order), make, rows) == len(rows)
        session.commit()

    sync_world.run(scenario)

    assert sync_world.scalar("SELECT count(*) FROM orders") == len(rows)
    assert [found["total"] for found in sync_world.events()] == list(range(len(rows)))


def test_bulk_upserts_tell_the_row_as_it_is_now_not_as_the_session_knew_it(sync_world: CaptureDatabase) -> None:
    dialect: Any = postgresql if sync_world.sync_engine.dialect.name == "postgresql" else sqlite

    def scenario(session: Session) -> None:
        order = Order(id=1, total=10)
        session.add(order)
        session.commit()
        assert order.total == 10
        statement = dialect.insert(Order).on_conflict_do_update(index_elements=["id"], set_={"total": 99})
        rows = [{"id": 1, "total": 1}, {"id": 2, "total": 2}]
        bulk(session, statement.values(rows), lambda found: OrderPlaced(found.id, found.total))
        session.commit()

    sync_world.run(scenario)

    assert sorted((found["order_id"], found["total"]) for found in sync_world.events()) == [(1, 99), (2, 2)]


def test_bulk_takes_scoped_sessions_and_says_how_an_async_one_is_used(sync_world: CaptureDatabase) -> None:
    scoped = scoped_session(sessionmaker(sync_world.sync_engine))
    bulk(scoped, insert(Order).values([{"total": 4}]), lambda found: OrderPlaced(None, found.total))
    scoped.commit()
    scoped.remove()

    with pytest.raises(CaptureError, match=r"run_sync\(bulk"):
        bulk(AsyncSession(), insert(Order).values(total=5), lambda found: OrderPlaced(None, found.total))  # type: ignore[arg-type]

    assert [found["total"] for found in sync_world.events()] == [4]


# --- savepoints on SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = f"{tmp_path}/plain.db"
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        migrations.upgrade(connection)
    engine.dispose()
    return path


def count(path: str) -> int:
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found: int = connection.scalar(text("SELECT count(*) FROM outbox_messages"))
    engine.dispose()
    return found


def in_a_savepoint(session: Session) -> None:
    with session.begin_nested():
        publish(session, Noted("inside"), topic="notes")
    session.rollback()


def after_a_query(session: Session) -> None:
    session.execute(select(Cart)).all()
    with session.begin_nested():
        session.add(Cart())
    session.rollback()


def two_levels_deep(session: Session) -> None:
    with session.begin_nested(), session.begin_nested():
        session.add(Cart())
    session.rollback()


SCENARIOS = [in_a_savepoint, after_a_query, two_levels_deep]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_savepoint_whose_release_would_commit_is_refused(file: str, scenario: Any) -> None:
    engine = create_engine(f"sqlite:///{file}")
    with Session(engine) as session, pytest.raises(CaptureError, match="begin_sqlite_transactions"):
        scenario(session)
    engine.dispose()

    assert count(file) == 0


async def test_a_savepoint_whose_release_would_commit_is_refused_on_aiosqlite(file: str) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{file}")
    async with AsyncSession(engine) as session:
        with pytest.raises(CaptureError, match="begin_sqlite_transactions"):
            await session.run_sync(in_a_savepoint)
    await engine.dispose()

    assert count(file) == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_with_transactions_that_begin_at_once_savepoints_roll_back(file: str, scenario: Any) -> None:
    engine = create_engine(f"sqlite:///{file}")
    begin_sqlite_transactions(engine)
    begin_sqlite_transactions(engine)
    with Session(engine) as session:
        scenario(session)
        publish(session, Noted("kept"), topic="notes")
        session.commit()
    engine.dispose()

    assert count(file) == 1


def test_a_savepoint_inside_a_transaction_that_has_begun_needs_nothing(file: str) -> None:
    engine = create_engine(f"sqlite:///{file}")
    with Session(engine) as session:
        session.add(Cart())
        session.flush()
        in_a_savepoint(session)
        with session.begin():
            publish(session, Noted("without a savepoint"), topic="notes")
    engine.dispose()

    assert count(file) == 1


def test_a_driver_that_begins_no_transaction_is_refused(file: str) -> None:
    engine = create_engine(f"sqlite:///{file}", connect_args={"isolation_level": None})
    with Session(engine) as session:
        session.add(Cart())
        publish(session, Noted("x"), topic="notes")
        with pytest.raises(CaptureError, match="AUTOCOMMIT"):
            session.commit()
        session.rollback()
    engine.dispose()

    assert count(file) == 0


def test_the_recipe_is_for_sqlite() -> None:
    engine = create_engine("postgresql+psycopg://nobody@localhost/nothing")

    with pytest.raises(ConfigurationError, match="postgresql"):
        begin_sqlite_transactions(engine)
