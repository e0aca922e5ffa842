"""Several consumers in one process: each for itself, and none goes on alone when another one has failed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, select

from outboxkit import tables
from outboxkit.brokers.memory import Exchange, exchange
from tests.consumer_fixture import order, row_of
from tests.unit.relay.cli.conftest import Outboxkit

APP = """
import os, signal
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from outboxkit import Consumer, Message

sessions = sessionmaker(create_engine("sqlite:///app.db"))
seen = set()

def made(name, topic):
    consumer = Consumer(name, sessions=sessions)

    @consumer.on("*", topic=topic)
    def handle(message: Message, session: Session) -> None:
        seen.add(name)
        if seen == {"billing", "shipping"}:
            os.kill(os.getpid(), signal.SIGTERM)

    return consumer

billing, shipping, again = made("billing", "orders"), made("shipping", "parcels"), made("billing", "orders")
"""


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exchange]:
    name = uuid4().hex
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL", f"memory://{name}")
    Path("app.py").write_text(APP)
    yield exchange(name)
    sys.modules.pop("app").sessions.kw["bind"].dispose()
    sys.path.remove(str(Path.cwd()))


def _stops(engine: Engine) -> dict[str, bool]:
    runs = tables.inbox_consumers.c
    with engine.connect() as connection:
        return {
            name: stopped is not None for name, stopped in connection.execute(select(runs.consumer, runs.stopped_at))
        }


def test_consumers_of_one_process_run_side_by_side_and_stop_together(
    outboxkit: Outboxkit, engine: Engine, broker: Exchange
) -> None:
    for topic in ("orders", "parcels"):
        broker.append(topic, row_of(order(1, topic=topic)))

    done = outboxkit("consume", "app:billing", "app:shipping", "app:billing")

    assert done.code == 0, done.err
    assert done.err.count("consumer.stopped") == 2
    assert _stops(engine) == {"billing": True, "shipping": True}


def test_one_that_ends_with_an_error_takes_the_others_along_in_order(
    outboxkit: Outboxkit, engine: Engine, broker: Exchange
) -> None:
    broker.missing.add("parcels")

    done = outboxkit("consume", "app:billing", "app:shipping")

    assert done.code == 2
    assert "there is no topic parcels" in done.err
    assert _stops(engine) == {"billing": True, "shipping": True}


def test_two_of_one_name_are_refused(outboxkit: Outboxkit, engine: Engine, broker: Exchange) -> None:
    done = outboxkit("consume", "app:billing", "app:again")

    assert done.code == 2
    assert "two consumers of one name" in done.err
