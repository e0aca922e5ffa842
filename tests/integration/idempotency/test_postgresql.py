"""Two callers at once, and a holder that is killed: on PostgreSQL."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session

from outboxkit.errors import IdempotencyInProgress
from outboxkit.idempotency import idempotent
from tests.consumer_fixture import Effect, create_tables
from tests.deadlines import DEADLINE
from tests.servers.postgres import Templates
from tests.unit.idempotency.orders import CREATED, SCOPE, effects, place
from tests.unit.idempotency.test_keys import *  # noqa: F403

HOLDER = """
import sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from outboxkit.idempotency import idempotent
from tests.consumer_fixture import Effect

with Session(create_engine(sys.argv[1])) as session, session.begin():
    with idempotent(session, "k-1", scope=sys.argv[2], request=b"order"):
        session.add(Effect(message_id="k-1", number=1))
        session.flush()
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def database_url(templates: Templates) -> Iterator[str]:
    yield from templates.lend(create_tables)


@pytest.fixture  # type: ignore[no-redef]
def engine(database_url: str) -> Iterator[Engine]:
    found = create_engine(database_url)
    yield found
    found.dispose()


def test_of_many_callers_at_once_one_has_the_effect_and_all_get_the_answer(engine: Engine) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: place(engine), range(40)))

    assert answers == [CREATED] * 40
    assert effects(engine) == 1


def test_a_caller_that_waits_too_long_is_told_that_the_other_is_under_way(engine: Engine) -> None:
    with Session(engine) as first, first.begin(), idempotent(first, "k-1", scope=SCOPE) as call:
        with pytest.raises(IdempotencyInProgress, match="try again") as told, Session(engine) as second, second.begin():
            idempotent(second, "k-1", scope=SCOPE, wait="100ms").__enter__()
        call.finish(CREATED)

    assert told.value.retry_after.total_seconds() == 0.1
    assert place(engine) == CREATED
    assert effects(engine) == 0


def test_the_patience_for_a_lock_ends_with_the_wait(engine: Engine) -> None:
    with Session(engine) as session, session.begin():
        before = session.connection().exec_driver_sql("SHOW lock_timeout").scalar_one()
        with idempotent(session, "k-1", scope=SCOPE, wait="100ms"):
            assert session.connection().exec_driver_sql("SHOW lock_timeout").scalar_one() == before


def test_a_waiter_takes_over_from_a_holder_that_is_killed(engine: Engine, database_url: str) -> None:
    program = [sys.executable, "-c", HOLDER, database_url, SCOPE]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with ThreadPoolExecutor(1) as pool:
            waiter = pool.submit(place, engine)
            holder.kill()
            assert waiter.result(timeout=DEADLINE) == CREATED

    with Session(engine) as session:
        assert session.query(Effect).count() == 1
