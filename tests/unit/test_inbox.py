"""The inbox alone, for people with their own consumer."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.orm import Session

from outboxkit import inbox, tables
from outboxkit.errors import ConfigurationError, InboxConflict, OutboxKitError
from outboxkit.inbox import MAX_OUTCOME_BYTES, Admission, Admitted
from tests.consumer_fixture import ConsumerFixture, order


def test_the_first_claim_is_true_and_the_second_gets_its_outcome(world: ConsumerFixture) -> None:
    with world.plain.begin() as session, inbox.claim(session, message_id="m", consumer="billing") as first:
        assert first
        first.set_outcome(b"invoice 7")

    with world.plain.begin() as session, inbox.claim(session, message_id="m", consumer="billing") as second:
        assert not second
        assert second.outcome == b"invoice 7"
        second.set_outcome(b"ignored")

    assert [row.outcome for row in world.rows(tables.inbox_messages)] == [b"invoice 7"]


async def test_it_works_in_an_async_session(world: ConsumerFixture) -> None:
    async with world.asynchronous.begin() as session, inbox.claim(session, message_id="m", consumer="billing") as first:
        assert first

    async with (
        world.asynchronous.begin() as session,
        inbox.claim(session, message_id="m", consumer="billing") as second,
    ):
        assert not second


@pytest.mark.parametrize("other", [{"consumer": "shipping"}, {"source": "elsewhere"}])
def test_consumers_and_sources_do_not_collide(world: ConsumerFixture, other: Any) -> None:
    plain: Any = {"consumer": "billing"}
    for names in (plain, plain | other):
        with world.plain.begin() as session, inbox.claim(session, message_id="m", **names) as claim:
            assert claim


def test_a_claim_is_void_when_the_block_or_the_transaction_fails(world: ConsumerFixture) -> None:
    with (
        pytest.raises(KeyError),
        world.plain.begin() as session,
        inbox.claim(session, message_id="m", consumer="billing"),
    ):
        raise KeyError

    session = world.plain()
    with inbox.claim(session, message_id="m", consumer="billing") as claim:
        assert claim
    session.rollback()
    session.close()

    assert world.count(tables.inbox_messages) == 0


def test_the_same_id_with_other_content_is_refused(world: ConsumerFixture) -> None:
    with world.plain.begin() as session, inbox.claim(session, message_id="m", consumer="billing", content=b"1"):
        pass

    with world.plain() as session, pytest.raises(InboxConflict, match="'m' came again"):
        inbox.claim(session, message_id="m", consumer="billing", content=b"2").__enter__()
    with world.plain() as session, inbox.claim(session, message_id="m", consumer="billing", content=b"1") as again:
        assert not again


def test_ending_the_transaction_inside_the_block_is_an_error(world: ConsumerFixture) -> None:
    session = world.plain()

    with (
        pytest.raises(OutboxKitError, match="gone before the commit"),
        inbox.claim(session, message_id="m", consumer="b"),
    ):
        session.rollback()
    session.close()


def test_an_outcome_is_bounded(world: ConsumerFixture) -> None:
    with world.plain.begin() as session, inbox.claim(session, message_id="m", consumer="billing") as claim:
        claim.set_outcome(bytes(MAX_OUTCOME_BYTES))
        with pytest.raises(OutboxKitError, match="at most"):
            claim.set_outcome(bytes(MAX_OUTCOME_BYTES + 1))


async def test_the_wrong_kind_of_with_is_refused(world: ConsumerFixture) -> None:
    with world.plain() as session, pytest.raises(ConfigurationError, match="needs `with`"):
        await inbox.claim(session, message_id="m", consumer="b").__aenter__()
    async with world.asynchronous() as session:
        with pytest.raises(ConfigurationError, match="async with"):
            inbox.claim(session, message_id="m", consumer="b").__enter__()


def test_finish_writes_the_outcome_of_an_admitted_message(world: ConsumerFixture) -> None:
    message = order(1)
    with world.plain.begin() as session:
        assert inbox.admit(session, "billing", message) == Admission(Admitted.FIRST)
        inbox.finish(session, "billing", message, b"done")

    with world.plain.begin() as session:
        assert inbox.admit(session, "billing", message) == Admission(Admitted.DUPLICATE, b"done")


def test_finish_without_a_row_is_an_error(world: ConsumerFixture) -> None:
    def finish(session: Session) -> None:
        inbox.finish(session, "billing", order(1))

    with world.plain() as session, pytest.raises(OutboxKitError):
        finish(session)


def test_names_of_schemas_are_translated_as_in_every_statement_of_the_session(world: ConsumerFixture) -> None:
    engine = world.engine.execution_options(schema_translate_map={None: "elsewhere"})
    with (
        pytest.raises(ConfigurationError, match="tables"),
        Session(engine) as session,
        inbox.claim(session, message_id="m", consumer="billing"),
    ):
        raise AssertionError("not into the tables of another schema")
