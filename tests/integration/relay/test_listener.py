"""Hints: a commit with messages wakes the relay; nothing about them can delay or fail a writer."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from outboxkit import outbox, publish, tables
from outboxkit.capture import commit_hooks
from outboxkit.errors import ConfigurationError
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.listener import Listener
from tests.integration.capture.model import Noted
from tests.integration.relay.world import (
    ScriptedPublisher,
    count,
    engine_for,
    message,
    relaying,
    until,
    write,
)  # fmt: skip

SLOW = RelayConfig(
    slow=timedelta(hours=1), quick=timedelta(hours=1), lease=timedelta(hours=1)
)  # it never looks by itself


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = engine_for(database_url)
    yield found
    found.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    found = engine_for(f"sqlite:///{tmp_path / 'outbox.db'}")
    yield found
    found.dispose()


class Heard:
    """Counts hints."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


# --- what is a commit with messages ----------------------------------------------------------------------------------


@pytest.fixture(params=["sqlite", "engine"])
def watched(request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Heard]]:
    found, heard = request.getfixturevalue(request.param), Heard()
    end = commit_hooks.on_commit(found, heard)
    yield found, heard
    end()


def test_each_commit_with_messages_is_one_hint(watched: tuple[Engine, Heard]) -> None:
    engine, heard = watched
    write(engine, message(1), message(2))
    assert heard.count == 1

    with Session(engine) as session, session.begin():
        publish(session, Noted("x"), topic="notes", key="1")
    assert heard.count == 2


def test_it_comes_when_the_messages_can_be_seen(sqlite: Engine) -> None:
    seen: list[int] = []
    end = commit_hooks.on_commit(sqlite, lambda: seen.append(0))
    with sqlite.begin() as connection:
        outbox.write(connection, [message(1)])
        assert seen == []
    assert seen == [0]
    end()


def test_what_adds_no_messages_or_is_rolled_back_is_none(watched: tuple[Engine, Heard]) -> None:
    engine, heard = watched
    with engine.begin() as connection:
        connection.execute(tables.outbox_audit.insert().values(who="a", action="b", target="c"))
    with engine.connect() as connection:
        outbox.write(connection, [message(1)])
        connection.rollback()
        connection.execute(text("SELECT 1"))
        connection.commit()
    with engine.connect() as connection:
        outbox.write(connection, [message(1)])

    assert heard.count == 0


def test_a_connection_that_is_kept_gives_its_hint_with_its_next_transaction(watched: tuple[Engine, Heard]) -> None:
    engine, heard = watched
    with engine.connect() as connection:
        outbox.write(connection, [message(1)])
        connection.commit()
        connection.execute(text("SELECT 1"))
        assert heard.count == 1
        connection.rollback()
    assert heard.count == 1


async def test_an_async_engine_gives_hints_too(tmp_path: Path) -> None:
    engine_for(f"sqlite:///{tmp_path / 'a.db'}").dispose()
    engine, heard = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'a.db'}"), Heard()
    end = commit_hooks.on_commit(engine, heard)
    async with engine.begin() as connection:
        await connection.run_sync(outbox.write, [message(1)])
    end()
    await engine.dispose()

    assert heard.count == 1


def test_after_the_end_there_are_no_more(sqlite: Engine) -> None:
    heard = Heard()
    commit_hooks.on_commit(sqlite, heard)()
    write(sqlite, message(1))

    assert heard.count == 0


# --- a relay that is woken -------------------------------------------------------------------------------------------


def _asleep(relay: object) -> bool:
    state = relay.state  # type: ignore[attr-defined]
    return state.empty_rounds > 0 and not state.reading and not state.busy


def test_a_hint_in_the_same_process_wakes_the_relay(sqlite: Engine) -> None:
    publisher = ScriptedPublisher()
    writer = create_engine(sqlite.url)
    with relaying(sqlite, publisher, SLOW, lease=SLOW.lease) as relay:
        until(lambda: _asleep(relay))
        end = commit_hooks.on_commit(writer, relay.wake)
        write(writer, message(1))
        until(lambda: len(publisher.accepted) == 1, "nothing but the hint can have woken it")
        end()
    writer.dispose()


def test_a_notification_wakes_a_relay_elsewhere(engine: Engine, database_url: str) -> None:
    publisher = ScriptedPublisher()
    writer = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    end = commit_hooks.notify(writer)
    with (
        relaying(engine, publisher, SLOW, lease=SLOW.lease) as relay,
        Listener(engine, relay.wake),
    ):
        until(lambda: _asleep(relay))
        for number in range(3):
            write(writer, message(number))
            until(lambda at=number: len(publisher.accepted) == at + 1)  # type: ignore[misc]
    end()
    writer.dispose()


def test_a_listener_connects_again_and_then_wakes_for_what_it_missed(engine: Engine) -> None:
    heard = Heard()
    with Listener(engine, heard):
        until(lambda: heard.count == 1, "it listens")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = 'LISTEN outboxkit'"
            assert connection.exec_driver_sql(kill).all() == [(True,)]
            until(lambda: heard.count == 2, "it listens again")
            connection.exec_driver_sql("NOTIFY outboxkit")
            until(lambda: heard.count == 3)


def test_many_commits_are_few_notifications_and_the_last_one_is_not_forgotten(engine: Engine) -> None:
    heard = Heard()
    end = commit_hooks.notify(engine)
    with Listener(engine, heard):
        until(lambda: heard.count == 1)
        for number in range(50):
            write(engine, message(number))
        until(lambda: heard.count > 1)
        end()
    assert heard.count < 50


# --- what cannot hurt ------------------------------------------------------------------------------------------------


def test_a_database_that_cannot_notify_says_so(sqlite: Engine) -> None:
    with pytest.raises(ConfigurationError, match="cannot notify"):
        commit_hooks.notify(sqlite)
    with pytest.raises(ConfigurationError, match="cannot notify"):
        Listener(sqlite, lambda: None)


def test_a_sender_that_cannot_connect_delays_and_fails_no_commit(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = engine.url.set(host="127.0.0.1", port=1).render_as_string(hide_password=False)
    end = commit_hooks.notify(engine, url=nowhere)
    for number in range(5):
        write(engine, message(number))
    until(lambda: "hints.failed" in caplog.text)
    write(engine, message(9))
    end()

    assert count(engine, tables.outbox_messages) == 6
    assert caplog.text.count("hints.failed") == 1


def test_nothing_is_started_before_the_first_commit_with_messages(engine: Engine) -> None:
    def senders() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "outboxkit-hints"]

    end = commit_hooks.notify(engine)
    with engine.begin() as connection:
        connection.execute(text("SELECT 1"))
    assert senders() == []
    write(engine, message(1))
    assert senders() == ["outboxkit-hints"]
    end()
    assert senders() == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_after_a_fork_notifies_by_itself(engine: Engine, database_url: str) -> None:
    heard = Heard()
    writer = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    end = commit_hooks.notify(writer)
    with Listener(engine, heard):
        until(lambda: heard.count == 1)
        write(writer, message(1))
        until(lambda: heard.count == 2, "the parent's sender runs")
        child = os.fork()
        if child == 0:
            try:
                writer.dispose(close=False)
                write(writer, message(2))
                end()  # sends what is wanted, then ends
            except OperationalError:
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        until(lambda: heard.count == 3, "the child's own sender has notified")
    end()
    writer.dispose()
