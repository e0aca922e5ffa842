"""What a relay tells of itself: one sentence for the log, the probes and the status of every machine."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine, make_url, text

from outboxkit import tables
from outboxkit.brokers import memory, open_publisher
from outboxkit.errors import OutboxKitError
from outboxkit.policy import Failure
from outboxkit_relay import load
from outboxkit_relay.cli.status import look
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.build import build_relay
from outboxkit_relay.daemon.publishers import Publishers, SupervisedPublisher
from outboxkit_relay.daemon.relay import RelayDaemon
from outboxkit_relay.observe.sentences import from_text, sentence, to_text
from outboxkit_relay.observe.stats import NOTHING_YET, Unavailable, why_not_ready
from tests.integration.relay.world import ScriptedPublisher, count, engine_for, message, relaying, until, write

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def _problems(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return look(connection, timedelta(minutes=5)).problems


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure.BROKER_DOWN, "start the broker"),
        (Failure.UNKNOWN_TOPIC, "create it"),
        (Failure.UNAUTHORIZED, "correct the login"),
        (Failure.BLOCKED, "free some"),
    ],
)
def test_a_sentence_says_which_destination_since_when_why_what_was_tried_and_what_to_do(
    failure: Failure, words: str
) -> None:
    found = Unavailable(topic="orders", failure=failure.value, reason="it said no", since=NOW, tries=7)

    said = sentence(found, NOW + timedelta(seconds=40))

    assert said.startswith("orders: it said no; for 40 s, 7 tries; ")
    assert words in said
    assert from_text(to_text([found])) == [found]


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"topic": "x"}]', None])
def test_a_state_that_another_version_has_written_is_left_out(text: str | None) -> None:
    assert from_text(text) == []


def test_a_destination_in_trouble_is_told_by_the_status_of_any_machine(engine: Engine) -> None:
    name = uuid4().hex
    memory.exchange(name).missing.add("payments")
    write(engine, message(1), message(2, topic="payments"))

    with relaying(engine, open_publisher(f"memory://{name}", {})):
        until(lambda: any("there is no topic payments" in one for one in _problems(engine)))
        (told,) = _problems(engine)
        assert told.startswith("payments: there is no topic payments")
        assert "create it (outboxkit init --topology)" in told
        memory.exchange(name).missing.clear()
        until(lambda: not _problems(engine))


def test_a_relay_that_cannot_start_leaves_a_word_until_one_can(engine: Engine, tmp_path: Path) -> None:
    name, stop = uuid4().hex, threading.Event()
    memory.exchange(name).away = True
    file = tmp_path / "outboxkit.toml"
    url = engine.url.render_as_string(hide_password=False)
    file.write_text(f'database_url = "{url}"\nbroker_url = "memory://{name}"\n[relay]\nlease = "2s"')
    write(engine, message(1))
    with build_relay(load(file)) as built:
        thread = threading.Thread(target=built.run, args=(stop,))
        thread.start()
        try:
            until(lambda: any("it waits for its broker: the memory broker is away" in one for one in _problems(engine)))
            memory.exchange(name).away = False
            until(lambda: count(engine, tables.outbox_messages) == 0)
            assert _problems(engine) == []
        finally:
            stop.set()
            thread.join()


class _Ending(ScriptedPublisher):
    """A publisher whose thread has ended by a defect."""

    has_ended = True


def test_a_publisher_that_has_ended_is_opened_again(engine: Engine) -> None:
    working = ScriptedPublisher()
    opened = iter([_Ending(), working])
    publishers = Publishers({"": SupervisedPublisher("", lambda: next(opened))})
    write(engine, message(1))

    with relaying(engine, publishers):
        until(lambda: [row.payload for row in working.accepted] == [b"1"])


def test_a_publisher_that_ends_again_and_again_ends_the_relay_and_its_lease(engine: Engine) -> None:
    relay = RelayDaemon(engine, Publishers({"": SupervisedPublisher("", _Ending)}), RelayConfig())

    with pytest.raises(OutboxKitError, match="has ended 3 times"):
        relay.run(threading.Event())

    assert count(engine, tables.outbox_relays) == 0


def test_a_new_login_is_found_when_the_old_one_is_refused(engine: Engine) -> None:
    refusing, working, login = ScriptedPublisher(), ScriptedPublisher(), ["old"]
    refusing.refuse = lambda _row: Failure.UNAUTHORIZED
    opened = iter([refusing, working])
    publishers = Publishers({"": SupervisedPublisher("", lambda: next(opened), lambda: login[0])})
    write(engine, message(1))

    with relaying(engine, publishers):
        until(lambda: len(refusing.sent) > 0)
        login[0] = "new"
        until(lambda: [row.payload for row in working.accepted] == [b"1"])


def test_a_rotated_database_login_is_read_again_at_the_next_connection(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old login is locked, as a secret store does after a rotation: only the new one gets in."""
    engine, name, stop = engine_for(database_url), uuid4().hex, threading.Event()
    old, new = f"old_{name}", f"new_{name}"
    with engine.begin() as connection:
        for user in (old, new):
            connection.execute(text(f"CREATE ROLE {user} LOGIN SUPERUSER PASSWORD 'secret'"))
    secret, given = tmp_path / "url", make_url(database_url).set(password="secret")
    secret.write_text(given.set(username=old).render_as_string(hide_password=False))
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL_FILE", str(secret))
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL", f"memory://{name}")
    monkeypatch.setenv("OUTBOXKIT_RELAY__LEASE", "2s")
    monkeypatch.chdir(tmp_path)

    with build_relay(load()) as built:
        thread = threading.Thread(target=built.run, args=(stop,))
        thread.start()
        try:
            until(lambda: built.daemon.stats is not None and built.daemon.stats.joined)
            with engine.begin() as connection:
                connection.execute(text(f"ALTER ROLE {old} NOLOGIN"))
                gone = text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :user")
                connection.execute(gone, {"user": old})
            until(lambda: built.daemon.stats is not None and "refused the login" in built.daemon.stats.refused)
            secret.write_text(given.set(username=new).render_as_string(hide_password=False))
            write(engine, message(1))
            until(lambda: count(engine, tables.outbox_messages) == 0)
        finally:
            stop.set()
            thread.join()
            engine.dispose()


def test_readiness_says_that_the_database_lets_it_in_no_more() -> None:
    found = replace(NOTHING_YET, away=True, refused="the database refused the login to …")
    assert why_not_ready(found, timedelta(seconds=1)) == "the database refused the login to …"
