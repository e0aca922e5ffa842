"""A handler behind an idempotency key: its effect, and its answer."""

from __future__ import annotations

from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from outboxkit.idempotency import Outcome, idempotent
from tests.consumer_fixture import Effect, create_tables

__all__ = ["CREATED", "SCOPE", "effects", "place", "prepare"]

SCOPE = "ana POST /orders"
CREATED = Outcome(status=201, headers=(("location", "/orders/7"),), body=b'{"id": 7}')


def prepare(engine: Engine) -> None:
    with engine.begin() as connection:
        create_tables(connection)


def place(engine: Engine, key: str = "k-1", *, request: bytes = b"order", answer: Outcome | None = CREATED) -> Outcome:
    """A handler: its effect, and its answer."""
    with (
        Session(engine) as session,
        session.begin(),
        idempotent(session, key, scope=SCOPE, request=request) as call,
    ):
        if call.stored is not None:
            return call.stored
        if answer is None:  # the request is wrong
            return Outcome(status=400)
        session.add(Effect(message_id=key, number=1))
        return call.finish(answer)


def effects(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Effect)) or 0
