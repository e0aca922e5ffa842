"""Ten questions of an operator in the night: `outboxkit status` answers each by itself, on PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from uuid import uuid4

import pytest
from sqlalchemy import Engine, text

from outboxkit import tables
from outboxkit.brokers import memory, open_publisher
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.policy import Failure, RetryPolicy, full_jitter
from outboxkit_relay import load
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.build import build_relay
from tests import servers
from tests.deadlines import DEADLINE
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write
from tests.unit.relay.cli.conftest import Done, Outboxkit

QUICK = RelayConfig(retry=RetryPolicy(delayed=full_jitter("10ms", cap="20ms", attempts=1)))


@pytest.fixture
def engine(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", database_url)
    made = engine_for(database_url)
    yield made
    made.dispose()


def answers(outboxkit: Outboxkit, *words: str) -> None:
    """Waits until the status is not healthy and one of its lines holds all these words."""
    end, done = time.monotonic() + DEADLINE / 5, outboxkit("status")
    while not _is_said(done, words):
        assert time.monotonic() < end, f"no line with {words} in: {done}"
        done = outboxkit("status")


def _is_said(done: Done, words: Sequence[str]) -> bool:
    lines = (done.out + done.err).splitlines()
    return done.code != 0 and any(all(word in line for word in words) for line in lines)


def test_the_broker_is_away(engine: Engine, outboxkit: Outboxkit) -> None:
    name = uuid4().hex
    memory.exchange(name).away = True
    write(engine, message(1))

    with relaying(engine, open_publisher(f"memory://{name}", {})):
        answers(outboxkit, "orders: the memory broker is away; for", "start the broker, or mend the way to it")


def test_the_password_is_wrong(engine: Engine, outboxkit: Outboxkit) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda _row: Failure.UNAUTHORIZED
    write(engine, message(1))

    with relaying(engine, publisher):
        answers(outboxkit, "orders: refused as unauthorized", "correct the login, or give it the right to write there")


def test_the_databases_password_is_wrong(engine: Engine, outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch) -> None:
    url = engine.url.set(username="nobody", password="wrong").render_as_string(hide_password=False)
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL", url)

    answers(outboxkit, "the database refused the login to", "check user, password and database name")


def test_the_topic_is_missing(engine: Engine, outboxkit: Outboxkit) -> None:
    name = uuid4().hex
    memory.exchange(name).missing.add("orders")
    write(engine, message(1))

    with relaying(engine, open_publisher(f"memory://{name}", {})):
        answers(outboxkit, "orders: there is no topic orders", "create it (outboxkit init --topology)")


def test_no_broker_allows_the_name(engine: Engine, outboxkit: Outboxkit, kafka: servers.Server) -> None:
    write(engine, message(1, topic="orders placed"))

    with relaying(engine, open_publisher(kafka.url, {})):
        answers(outboxkit, "orders placed: ", "name", "it is wrong until then")


def test_the_destination_is_paused(engine: Engine, outboxkit: Outboxkit) -> None:
    """That is no fault: a person wanted it. So the status stays healthy, and says who and why."""
    write(engine, message(1))
    assert outboxkit("relay", "pause", "orders", "--why", "stocktaking").code == 0

    with relaying(engine, ScriptedPublisher()):
        done = outboxkit("status")

    assert done.code == 0
    (line,) = (line for line in done.out.splitlines() if line.startswith("Paused"))
    assert "destination orders, by " in line
    assert line.endswith(": stocktaking")


def test_a_key_is_parked(engine: Engine, outboxkit: Outboxkit) -> None:
    publisher = ScriptedPublisher()
    publisher.refuse = lambda row: Failure.REJECTED if row.payload == b"1" else None
    write(engine, message(1), message(4, key="other"))

    with relaying(engine, publisher, QUICK):
        until(lambda: count(engine, tables.dead_letters) == 1)
        write(engine, message(2), message(3))
        words = "orders: the key k is parked behind a dead head, 2 messages wait: see `outboxkit dlq list --side relay`"
        answers(outboxkit, words)


def test_no_relay_is_alive(engine: Engine, outboxkit: Outboxkit) -> None:
    write(engine, message(1))

    answers(outboxkit, "messages wait, and no relay is alive: start one with `outboxkit relay run`")


@contextmanager
def role(engine: Engine) -> Iterator[str]:
    """A login that may read and write the outbox, and not its ledger."""
    name = f"weak_{uuid4().hex[:8]}"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        connection.execute(text(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {name}"))
        connection.execute(text(f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {name}"))
        connection.execute(text(f"REVOKE INSERT ON outbox_ledger FROM {name}"))
    yield name
    with engine.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))


def test_the_relay_lacks_a_right(engine: Engine, outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch) -> None:
    with role(engine) as name:
        url = engine.url.set(username=name).render_as_string(hide_password=False)
        write(engine, message(1))

        with monkeypatch.context() as patched:
            patched.setenv("OUTBOXKIT_DATABASE_URL", url)
            with pytest.raises(ConfigurationError, match="lacks a right"), build_relay(load()) as built:
                built.run(threading.Event())

        answers(outboxkit, "does not publish", "lacks a right", "outbox_ledger", "outboxkit db roles")


def test_the_database_is_a_standby(engine: Engine, outboxkit: Outboxkit) -> None:
    """Or was made read-only, as a demoted primary is: to who writes they are the same."""
    write(engine, message(1))
    with engine.begin() as connection:
        connection.execute(text(f'ALTER DATABASE "{engine.url.database}" SET default_transaction_read_only = on'))

    answers(outboxkit, "the database is read-only and takes no writes", "let database_url lead to the primary")


def test_the_publisher_has_ended(engine: Engine, outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending(memory.MemoryPublisher):
        has_ended = True

    name = uuid4().hex
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL", f"memory://{name}")
    monkeypatch.setattr(memory, "publisher", lambda _url, _options: Ending(memory.exchange(name)))
    write(engine, message(1))

    with pytest.raises(OutboxKitError, match="has ended 3 times"), build_relay(load()) as built:
        built.run(threading.Event())

    answers(outboxkit, "does not publish", "has ended 3 times")
