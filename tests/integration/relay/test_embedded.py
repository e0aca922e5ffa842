"""A relay inside an application: started, woken and stopped by a block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, create_engine

from outboxkit import tables
from outboxkit.brokers.memory import exchange
from outboxkit.capture import commit_hooks
from outboxkit.errors import ConfigurationError
from outboxkit_relay import Relay, settings
from outboxkit_relay.settings import Settings
from tests.integration.relay.world import count, engine_for, message, until, write


@pytest.fixture
def name() -> str:
    return uuid4().hex


@pytest.fixture
def loaded(tmp_path: Path, name: str) -> Settings:
    file = tmp_path / "outboxkit.toml"
    file.write_text(f'database_url = "sqlite:///{tmp_path}/app.db"\nbroker_url = "memory://{name}"\n')
    return settings.load(file)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = engine_for(f"sqlite:///{tmp_path}/app.db")
    yield found
    found.dispose()


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("outboxkit-")}


async def test_it_publishes_while_the_block_runs_and_gives_everything_back(
    loaded: Settings, engine: Engine, name: str
) -> None:
    before = threads()  # a client of an earlier test may take a moment to end
    async with Relay(loaded) as relay:
        end = commit_hooks.on_commit(engine, relay.wake)
        write(engine, message(1))
        await asyncio.to_thread(until, lambda: count(engine, tables.outbox_messages) == 0)
        await asyncio.to_thread(until, lambda: relay.stats is not None and relay.stats.joined)
        end()

    assert [one.payload for one in exchange(name).messages("orders")] == [b"1"]
    assert count(engine, tables.outbox_relays) == 0
    assert threads() <= before


def test_a_plain_block_works_too(loaded: Settings, engine: Engine, name: str) -> None:
    write(engine, message(1))
    with Relay(loaded):
        until(lambda: exchange(name).messages("orders"))
        until(lambda: count(engine, tables.outbox_messages) == 0)


def test_what_ends_it_is_raised_when_the_block_ends(loaded: Settings, tmp_path: Path) -> None:
    create_engine(f"sqlite:///{tmp_path}/app.db").connect().close()
    with pytest.raises(ConfigurationError, match="tables are missing"), Relay(loaded):
        until(lambda: "outboxkit-relay" not in threads())


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_relay(loaded: Settings) -> None:
    with pytest.raises(ZeroDivisionError), Relay(loaded):
        raise ZeroDivisionError


def test_a_wrong_setting_is_raised_at_the_beginning(loaded: Settings) -> None:
    wrong = loaded.model_copy(update={"broker_url": None})
    with pytest.raises(ConfigurationError, match="broker_url is not set"):
        Relay(wrong).__enter__()
    listening = loaded.model_copy(update={"relay": loaded.relay.model_copy(update={"wake": "notify"})})
    with pytest.raises(ConfigurationError, match="sqlite cannot notify"):
        Relay(listening).__enter__()
