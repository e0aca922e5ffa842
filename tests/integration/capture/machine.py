"""The model: what an outbox must hold after each commit, in plain Python, against a session on a real database."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import Engine, delete, event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from outboxkit import publish, tables
from tests.integration.capture.model import Order, OrderPlaced, Plain

MAX_DEPTH = 3


@dataclass
class Life:
    """One session and what the model knows of it: a stack of lists, one for the transaction and each savepoint."""

    session: Session
    savepoints: list[Any] = field(default_factory=list)
    stack: list[list[int]] = field(default_factory=lambda: [[]])

    def emitted(self, number: int) -> None:
        self.stack[-1].append(number)

    def forget(self) -> None:
        self.savepoints.clear()
        self.stack = [[]]


def failed(session: Session, error: type[Exception]) -> bool:
    """Whether a flush fails like this; `pytest.raises` has an exception of its own, which is no AssertionError."""
    try:
        session.flush()
    except error:
        return True
    return False


class CaptureMachine(RuleBasedStateMachine):
    """Two sessions live at random; after each commit the outbox holds exactly what survived, in order."""

    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        with self.engine.begin() as connection:
            for table in (tables.outbox_messages, Order.__table__, Plain.__table__):
                connection.execute(delete(table))  # type: ignore[arg-type]
            connection.execute(Plain.__table__.insert().values(text="taken"))  # type: ignore[attr-defined]
        self.lives = [Life(Session(self.engine)), Life(Session(self.engine))]
        self.numbers = iter(range(1_000_000))
        self.committed: list[int] = []
        self.steps = 0

    def teardown(self) -> None:
        for life in self.lives:
            life.session.rollback()
            life.session.close()

    # --- emitting

    @rule(which=st.integers(0, 1), deferred=st.booleans())
    def publish_from_the_session(self, *, which: int, deferred: bool) -> None:
        life, number = self.lives[which], next(self.numbers)
        made = OrderPlaced(None, number)
        publish(life.session, (lambda: made) if deferred else made, topic="machine")
        life.emitted(number)

    @rule(which=st.integers(0, 1), before=st.booleans())
    def emit_from_a_new_object(self, *, which: int, before: bool) -> None:
        life, number = self.lives[which], next(self.numbers)
        order = Order(total=number)
        if before:
            order.emit(lambda: OrderPlaced(order.id, number))
            life.session.add(order)
        else:
            life.session.add(order)
            order.emit(lambda: OrderPlaced(order.id, number))
        life.emitted(number)

    @rule(which=st.integers(0, 1), touch=st.booleans(), drop=st.booleans())
    def emit_from_a_known_object(self, *, which: int, touch: bool, drop: bool) -> None:
        life, number = self.lives[which], next(self.numbers)
        newest = select(Order).order_by(Order.id.desc()).limit(1).with_for_update(skip_locked=True)
        order = life.session.scalars(newest).first()
        if order is None:
            return
        if touch:
            order.status = f"touched {number}"
        known = order.id
        order.emit(lambda: OrderPlaced(known, number))
        life.emitted(number)
        if drop:
            life.session.delete(order)

    @rule(which=st.integers(0, 1))
    def emit_from_a_hook_of_somebody_else(self, which: int) -> None:
        life, number = self.lives[which], next(self.numbers)

        def speak(session: Session, *_: Any) -> None:
            publish(session, OrderPlaced(None, number), topic="machine")

        event.listen(life.session, "before_flush", speak)
        life.session.add(Order(total=number))
        life.session.flush()
        event.remove(life.session, "before_flush", speak)
        life.emitted(number)

    @rule(which=st.integers(0, 1))
    def merge_and_emit(self, which: int) -> None:
        life, number = self.lives[which], next(self.numbers)
        merged = life.session.merge(Order(total=number))
        merged.emit(lambda: OrderPlaced(merged.id, number))
        life.emitted(number)

    # --- what sessions do meanwhile

    @rule(which=st.integers(0, 1))
    def flush(self, which: int) -> None:
        self.lives[which].session.flush()

    @rule(which=st.integers(0, 1))
    def query(self, which: int) -> None:
        life = self.lives[which]
        life.session.scalars(select(Plain)).all()
        seen = life.session.scalars(select(func.count()).select_from(tables.outbox_messages)).one()
        assert seen == len(self.committed) + sum(map(len, life.stack)), "a query has not flushed the events"

    @rule(which=st.integers(0, 1))
    def expire_all(self, which: int) -> None:
        self.lives[which].session.flush()
        self.lives[which].session.expire_all()

    @rule(which=st.integers(0, 1))
    def expunge_all(self, which: int) -> None:
        self.lives[which].session.flush()
        publish(self.lives[which].session, OrderPlaced(None, number := next(self.numbers)), topic="machine")
        self.lives[which].emitted(number)
        self.lives[which].session.expunge_all()

    @rule(which=st.integers(0, 1))
    def expunge_a_new_object(self, which: int) -> None:
        life, number = self.lives[which], next(self.numbers)
        life.session.add(order := Order(total=number))
        publish(life.session, OrderPlaced(None, number), topic="machine")
        life.emitted(number)
        life.session.expunge(order)

    @rule(which=st.integers(0, 1))
    def fail_a_listener_and_go_on(self, which: int) -> None:
        life, number = self.lives[which], next(self.numbers)

        def refuse(*_: Any) -> None:
            raise RuntimeError

        publish(life.session, OrderPlaced(None, number), topic="machine")
        life.emitted(number)
        event.listen(life.session, "before_flush", refuse)
        assert failed(life.session, RuntimeError), "the session does not know that there is something to write"
        event.remove(life.session, "before_flush", refuse)

    # --- ends

    @rule(which=st.integers(0, 1))
    def open_a_savepoint(self, which: int) -> None:
        life = self.lives[which]
        if len(life.savepoints) < MAX_DEPTH:
            life.savepoints.append(life.session.begin_nested())
            life.stack.append([])

    @rule(which=st.integers(0, 1))
    def release_the_savepoint(self, which: int) -> None:
        life = self.lives[which]
        if life.savepoints:
            life.savepoints.pop().commit()
            released = life.stack.pop()
            life.stack[-1].extend(released)

    @rule(which=st.integers(0, 1))
    def roll_back_the_savepoint(self, which: int) -> None:
        life = self.lives[which]
        if life.savepoints:
            life.savepoints.pop().rollback()
            life.stack.pop()

    @rule(which=st.integers(0, 1))
    def fail_a_flush(self, which: int) -> None:
        life = self.lives[which]
        life.session.flush()
        life.session.add(Plain(text="taken"))
        publish(life.session, OrderPlaced(None, next(self.numbers)), topic="machine")
        assert failed(life.session, IntegrityError)
        if life.savepoints:
            self.roll_back_the_savepoint(which)
        else:
            self.roll_back(which)

    @rule(which=st.integers(0, 1))
    def roll_back(self, which: int) -> None:
        self.lives[which].session.rollback()
        self.lives[which].forget()

    @rule(which=st.integers(0, 1))
    def close(self, which: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # closing without commit is what is wanted
            self.lives[which].session.close()
        self.lives[which].forget()

    @rule(which=st.integers(0, 1))
    def commit(self, which: int) -> None:
        life = self.lives[which]
        expected = [number for level in life.stack for number in level]
        life.session.commit()
        life.forget()
        stored = self.stored()
        assert sorted(stored) == sorted(self.committed + expected)  # two sessions have no order between them
        assert [number for number in stored if number in set(expected)] == expected
        self.committed = stored

    # --- looking

    @invariant()
    def nothing_is_visible_that_was_not_committed(self) -> None:
        self.steps += 1
        if self.steps % 5 == 0:
            assert self.stored() == self.committed

    def stored(self) -> list[int]:
        hot = tables.outbox_messages.c
        with self.engine.connect() as connection:
            rows = connection.execute(select(hot.topic, hot.payload).order_by(hot.position)).all()
        for topic, payload in rows:
            assert topic == "machine" or b"null" not in payload, "an object's event was made before its key was known"
        return [json.loads(payload)["total"] for _, payload in rows]
