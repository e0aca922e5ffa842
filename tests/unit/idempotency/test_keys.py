"""One key, one effect, one answer: on SQLite, and on whatever `tests.integration.idempotency` runs it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, update
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.errors import ConfigurationError, EncodeError, IdempotencyConflict, IdempotencyOutcomeUnknown
from outboxkit.idempotency import Outcome, idempotent
from tests.consumer_fixture import Effect, create_tables
from tests.sqlite_template import copied
from tests.unit.idempotency.orders import CREATED, SCOPE, effects, place


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = create_engine(copied(tmp_path / "keys.db", create_tables))
    yield found
    found.dispose()


def test_a_second_call_gets_the_first_ones_answer_and_has_no_effect(engine: Engine) -> None:
    assert [place(engine), place(engine), place(engine)] == [CREATED] * 3
    assert effects(engine) == 1


def test_another_request_under_the_same_key_is_refused(engine: Engine) -> None:
    place(engine)

    with pytest.raises(IdempotencyConflict, match="a new request needs a new key"):
        place(engine, request=b"another order")

    assert effects(engine) == 1


def test_keys_of_different_scopes_never_meet(engine: Engine) -> None:
    place(engine)

    with Session(engine) as session, session.begin(), idempotent(session, "k-1", scope="ben POST /orders") as call:
        assert call.first


def test_a_wrong_request_may_be_corrected_under_the_same_key(engine: Engine) -> None:
    assert place(engine, request=b"ordre", answer=None).status == 400

    assert place(engine, request=b"order") == CREATED
    assert effects(engine) == 1


def test_a_call_that_fails_leaves_its_key_free(engine: Engine) -> None:
    class Failed(Exception):
        pass

    def fail() -> None:
        with Session(engine) as session, session.begin(), idempotent(session, "k-1", scope=SCOPE) as call:
            session.add(Effect(message_id="k-1", number=1))
            call.finish(CREATED)
            raise Failed

    with pytest.raises(Failed):
        fail()

    assert effects(engine) == 0
    assert place(engine) == CREATED


def test_a_block_without_an_outcome_leaves_its_key_free(engine: Engine) -> None:
    with Session(engine) as session, session.begin(), idempotent(session, "k-1", scope=SCOPE):
        pass

    assert place(engine) == CREATED


def test_a_call_that_committed_in_its_middle_is_said_to_be_unknown(engine: Engine) -> None:
    class Killed(Exception):
        pass

    def die() -> None:
        with Session(engine) as session, idempotent(session, "k-1", scope=SCOPE):
            session.add(Effect(message_id="k-1", number=1))
            session.commit()
            raise Killed

    with pytest.raises(Killed):
        die()
    with pytest.raises(IdempotencyOutcomeUnknown, match="look for its effect"):
        place(engine)


def test_an_outcome_expires_by_the_databases_clock(engine: Engine) -> None:
    place(engine)
    with engine.begin() as connection:
        gone = database_now(timedelta(seconds=-1))
        connection.execute(update(tables.outbox_idempotency).values(expires_at=gone))

    assert place(engine, request=b"another order") == CREATED
    assert effects(engine) == 2


@pytest.mark.parametrize("key", ["", "x" * 256, "a\0b"])
def test_a_key_that_no_database_could_hold_is_refused(engine: Engine, key: str) -> None:
    with pytest.raises(ConfigurationError, match="1 to 255 characters"):
        place(engine, key)


def test_an_outcome_that_is_too_large_is_refused_with_its_effect(engine: Engine) -> None:
    with pytest.raises(EncodeError, match="1,048,576"):
        place(engine, answer=Outcome(body=b"x" * (1 << 20)))

    assert effects(engine) == 0
