"""``outboxkit db roles`` on PostgreSQL, where the roles belong to the whole cluster."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, text

from outboxkit import tables
from outboxkit.migrations.roles import GRANTS, missing_roles
from tests.database_roles import drop_roles
from tests.integration.relay.world import count, engine_for
from tests.unit.relay.cli.conftest import Outboxkit


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", database_url)
    engine = engine_for(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def prefix(engine: Engine) -> Iterator[str]:
    prefix = f"{engine.url.database}_"
    yield prefix
    with engine.begin() as connection:
        drop_roles(connection, prefix)


def test_the_roles_are_created_once_and_renewed_afterwards(outboxkit: Outboxkit, engine: Engine, prefix: str) -> None:
    rehearsal = outboxkit("db", "roles", "--prefix", prefix, "--dry-run")
    with engine.connect() as connection:
        assert len(missing_roles(connection, prefix)) == len(GRANTS) + 1
    first, second = (outboxkit("db", "roles", "--prefix", prefix) for _ in range(2))

    assert {rehearsal.code, first.code, second.code} == {0}
    assert f"would create {prefix}relay\n" in rehearsal.out
    assert f"created {prefix}relay\n" in first.out
    assert f"renewed the rights of {prefix}relay\n" in second.out
    assert count(engine, tables.outbox_audit, tables.outbox_audit.c.action == "db.roles") == 2


def test_a_login_without_the_right_is_told_which_right_in_one_line(
    outboxkit: Outboxkit, engine: Engine, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outboxkit("db", "roles", "--prefix", prefix)
    url = engine.url.update_query_dict({"options": f"-crole={prefix}app"})
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", url.render_as_string(hide_password=False))

    done = outboxkit("dlq", "list")

    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "the database login lacks a right: permission denied for table dead_letters" in done.err


def test_the_log_shows_the_login_beside_any_other_name_that_was_given(
    outboxkit: Outboxkit, engine: Engine, prefix: str
) -> None:
    outboxkit("db", "roles", "--prefix", prefix)
    entry = text(
        "INSERT INTO outbox_audit (who, action, target) SELECT coalesce(:who, session_user), 'dlq.discard', 'x'"
    )
    with engine.begin() as connection:
        login = connection.scalar(text("SELECT session_user"))
        connection.execute(entry, {"who": None})
        connection.exec_driver_sql(f"SET LOCAL ROLE {prefix}relay")
        connection.execute(entry, {"who": "alice"})

    shown = outboxkit("log", "--action", "dlq").out.splitlines()[1:]
    assert [line.split("  ")[1] for line in shown] == [f"alice as {login}", login]
    assert len(outboxkit("log", "--by", login, "--action", "dlq").out.splitlines()) == 1 + 2
    assert "alice" in outboxkit("log", "--by", "alice").out
