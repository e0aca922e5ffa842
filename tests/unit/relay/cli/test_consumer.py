"""A consumer gets another name: everything of it goes along, or nothing does."""

from __future__ import annotations

import json
from datetime import timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from outboxkit import inbox, tables
from outboxkit._sql import database_now
from outboxkit.consumer import crash_marker
from outboxkit.consumer.crash_marker import Owner
from outboxkit.errors import ConfigurationError
from outboxkit.inbox import rename
from tests.unit.relay.cli.builders import bury
from tests.unit.relay.cli.conftest import Outboxkit

RUNS = tables.inbox_consumers.c
NAMED = [table for table in tables.METADATA.sorted_tables if "consumer" in table.c]


def _fill(engine: Engine, name: str = "billing") -> None:
    """A row in every table that knows consumers."""
    place = {"topic": "orders", "key": b"7", "headers": b"\0\0", "origin": "orders[0]@1", "partition": 0, "offset": 1}
    expired = database_now(timedelta(seconds=-1))
    mark = {"id": uuid4(), "host": "box/1/a", "expires_at": expired}
    bury(engine, name)
    with engine.begin() as connection:
        for table, values in (
            (tables.inbox_messages, {"message_id": "m-1"}),
            (tables.inbox_waiting, {**place, "reason": "retry", "due_at": expired}),
            (tables.inbox_batches, {**mark, "messages": ["m-2"]}),
            (tables.inbox_suspects, {"identity": "m-2", "deaths": 1}),
            (tables.inbox_consumers, mark),
            (tables.outbox_schemas, {"fingerprint": "f", "role": "reader", "type": "order.placed", "text": "{}"}),
        ):
            connection.execute(table.insert().values(consumer=name, **values))


def _names(engine: Engine) -> dict[str, set[str]]:
    """The names in each table, but for what says that a consumer has another one now."""
    queries = {table.name: select(table.c.consumer) for table in NAMED}
    queries["inbox_consumers"] = queries["inbox_consumers"].where(RUNS.renamed_to.is_(None))
    with engine.connect() as connection:
        return {name: set(connection.scalars(query)) for name, query in queries.items()}


def _begins(engine: Engine, name: str) -> None:
    with Session(engine) as session, session.begin():
        crash_marker.began(session, Owner(name, timedelta(seconds=-1), [uuid4()]), None)


def test_everything_of_a_consumer_goes_along(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    _fill(engine, "shipping")

    done = outboxkit("consumer", "rename", "billing", "invoicing", "--yes", "--why", "clearer")

    assert done.code == 0, done.err
    assert done.out.startswith("billing to invoicing  renamed: 1 in dead_letters")
    assert _names(engine) == {table.name: {"invoicing", "shipping"} for table in NAMED}
    with engine.connect() as connection:
        (entry,) = connection.execute(select(tables.outbox_audit).where(tables.outbox_audit.c.action != "x")).all()
    assert (entry.action, entry.target, entry.why) == ("consumer.rename", "consumer billing to invoicing", "clearer")


def test_what_the_old_name_has_handled_the_new_one_does_not_handle_again(outboxkit: Outboxkit, engine: Engine) -> None:
    with Session(engine) as session, session.begin(), inbox.claim(session, message_id="m-1", consumer="billing"):
        pass

    assert outboxkit("consumer", "rename", "billing", "invoicing", "--yes").code == 0

    with Session(engine) as session, session.begin():
        claim = inbox.claim(session, message_id="m-1", consumer="invoicing")
        with claim as again:
            assert not again.first


def test_a_dry_run_counts_and_changes_nothing(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)

    done = outboxkit("consumer", "rename", "billing", "invoicing", "--dry-run", "--json")

    assert done.code == 0
    found = json.loads(done.out)
    assert (found["outcome"], found["rows"]["inbox_messages"]) == ("would be renamed", 2)  # one of the letter
    assert set().union(*_names(engine).values()) == {"billing"}


@pytest.mark.parametrize("running", ["billing", "invoicing"])
def test_a_run_of_either_name_is_in_the_way(outboxkit: Outboxkit, engine: Engine, running: str) -> None:
    _fill(engine)
    run = {"id": uuid4(), "host": "box/2/b", "expires_at": database_now(timedelta(seconds=5))}
    with engine.begin() as connection:
        connection.execute(tables.inbox_consumers.insert().values(consumer=running, **run))

    done = outboxkit("consumer", "rename", "billing", "invoicing", "--yes")

    assert done.code == 1
    assert f"refused: {running} runs on box/2/b: stop it first" in done.out
    assert _names(engine)["inbox_messages"] == {"billing"}


def test_replays_on_their_way_know_the_old_name_and_are_waited_for(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    with engine.begin() as connection:
        connection.execute(tables.dead_letters.update().values(state="replaying"))

    done = outboxkit("consumer", "rename", "billing", "invoicing", "--yes")

    assert done.code == 1
    assert "1 dead letters are being replayed" in done.out


def test_two_consumers_do_not_become_one(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    _fill(engine, "invoicing")

    done = outboxkit("consumer", "rename", "billing", "invoicing", "--yes")

    assert done.code == 1
    assert "invoicing has rows of its own (1 in dead_letters" in done.out


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        (("nobody", "invoicing"), 1, "nothing is known of nobody"),
        (("billing", "billing"), 2, "has this name already"),
        (("billing", " "), 2, "a consumer needs a name"),
    ],
)
def test_what_is_no_renaming_is_refused(
    outboxkit: Outboxkit, engine: Engine, names: tuple[str, str], *, code: int, words: str
) -> None:
    _fill(engine)

    done = outboxkit("consumer", "rename", *names, "--yes")

    assert done.code == code
    assert words in done.out + done.err


def test_what_a_start_of_the_new_name_left_is_in_nobodys_way(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    schema = {"fingerprint": "f", "role": "reader", "type": "order.placed", "text": "{}"}
    with engine.begin() as connection:
        connection.execute(tables.outbox_schemas.insert().values(consumer="invoicing", **schema))

    assert outboxkit("consumer", "rename", "billing", "invoicing", "--yes").code == 0


def test_a_run_that_begins_while_the_rows_are_renamed_undoes_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(engine)
    answers = iter(["", "invoicing runs on box/3/c"])
    monkeypatch.setattr(rename, "_running", lambda *_: next(answers))

    with pytest.raises(ConfigurationError, match="nothing was renamed"), engine.begin() as connection:
        rename.rename(connection, "billing", "invoicing", by="ana")

    assert _names(engine)["inbox_messages"] == {"billing"}
    with engine.connect() as connection:
        assert connection.scalar(select(func.count()).select_from(tables.outbox_audit)) == 0


def test_the_old_name_does_not_start_again_by_mistake(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    assert outboxkit("consumer", "rename", "billing", "invoicing", "--yes").code == 0
    assert outboxkit("consumer", "rename", "invoicing", "charging", "--yes").code == 0

    for name in ("billing", "invoicing"):
        with pytest.raises(ConfigurationError, match=f"{name} was renamed to charging.*: start it as charging"):
            _begins(engine, name)
        assert f"{name} was renamed to charging" in outboxkit("consumer", "rename", name, "other", "--yes").out
    _begins(engine, "charging")
    told = outboxkit("status", "--json").out
    assert "charging" in told
    assert not any(f'"{name}"' in told for name in ("billing", "invoicing")), "nobody looks for a run of it"


def test_a_consumer_is_renamed_back(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)

    for names in (
        ("billing", "invoicing"),
        ("invoicing", "billing"),
        ("billing", "invoicing"),
        ("invoicing", "billing"),
    ):
        assert outboxkit("consumer", "rename", *names, "--yes").code == 0

    _begins(engine, "billing")
    assert _names(engine)["inbox_messages"] == {"billing"}
    with pytest.raises(ConfigurationError, match="invoicing was renamed to billing"):
        _begins(engine, "invoicing")


def test_an_old_name_is_free_after_a_month(outboxkit: Outboxkit, engine: Engine) -> None:
    _fill(engine)
    assert outboxkit("consumer", "rename", "billing", "invoicing", "--yes").code == 0
    with engine.begin() as connection:
        long_ago = database_now(timedelta(days=-31))
        connection.execute(tables.inbox_consumers.update().values(expires_at=long_ago))

    _begins(engine, "billing")

    assert _names(engine)["inbox_consumers"] == {"billing", "invoicing"}
