"""One outbox feeds several brokers: each destination is on its own, and one broker's trouble is nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from outboxkit import dead_letters, outbox, tables
from outboxkit.brokers import memory
from outboxkit.errors import ConfigurationError
from outboxkit_relay import load
from outboxkit_relay.daemon.build import BuiltRelay, build_relay
from outboxkit_relay.settings import Settings
from tests.deadlines import DEADLINE
from tests.integration.relay.world import count, message, until, write


def _settings(
    tmp_path: Path,
    engine: Engine,
    first: str,
    second: str,
    *,
    pattern: str = "payments.*",
    allowed: tuple[str, ...] = (),
) -> Settings:
    file = tmp_path / f"{uuid4().hex}.toml"
    file.write_text(
        f"""
        database_url = "{engine.url.render_as_string(hide_password=False)}"
        broker_url = "memory://{first}"
        [brokers.bank]
        url = "memory://{second}"
        [destinations."{pattern}"]
        broker = "bank"
        [relay]
        lease = "2s"
        allowed_destinations = {list(allowed)}
        """
    )
    return load(file)


@contextmanager
def _running(settings: Settings) -> Iterator[BuiltRelay]:
    stop, failures = threading.Event(), []
    with build_relay(settings) as built:

        def run() -> None:
            try:
                built.run(stop)
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield built
        finally:
            stop.set()
            thread.join(DEADLINE)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def _sent(name: str, topic: str) -> list[bytes | None]:
    return [one.payload for one in memory.exchange(name).messages(topic)]


def test_each_destination_goes_to_the_broker_that_its_pattern_names(engine: Engine, tmp_path: Path) -> None:
    first, second = uuid4().hex, uuid4().hex
    write(engine, *(message(number, topic=topic) for number in range(5) for topic in ("orders", "payments.eu")))

    with _running(_settings(tmp_path, engine, first, second)):
        until(lambda: count(engine, tables.outbox_messages) == 0)

    numbers = [b"%d" % number for number in range(5)]
    assert (_sent(first, "orders"), _sent(second, "payments.eu")) == (numbers, numbers)
    assert (_sent(first, "payments.eu"), _sent(second, "orders")) == ([], [])


def test_one_broker_that_is_away_keeps_nothing_back_from_the_other(engine: Engine, tmp_path: Path) -> None:
    first, second = uuid4().hex, uuid4().hex
    memory.exchange(second).away = True
    write(engine, message(1), message(2, topic="payments.eu"))

    with _running(_settings(tmp_path, engine, first, second)) as built:
        until(lambda: _sent(first, "orders") == [b"1"])
        until(lambda: built.daemon.stats is not None and built.daemon.stats.unavailable)
        write(engine, message(3))
        until(lambda: _sent(first, "orders") == [b"1", b"3"])
        memory.exchange(second).away = False
        until(lambda: _sent(second, "payments.eu") == [b"2"])


def test_a_relay_with_another_routing_is_refused_by_a_line_that_names_both(engine: Engine, tmp_path: Path) -> None:
    first, second = uuid4().hex, uuid4().hex
    with _running(_settings(tmp_path, engine, first, second)) as built:
        until(lambda: built.daemon.stats is not None and built.daemon.stats.joined)

        with (
            build_relay(_settings(tmp_path, engine, first, second, pattern="pay.*")) as other,
            pytest.raises(ConfigurationError) as refused,
        ):
            other.run(threading.Event())

    assert "payments.*" in str(refused.value)
    assert "pay.*" in str(refused.value)


def test_a_broker_that_moves_to_another_host_is_the_same_broker(engine: Engine, tmp_path: Path) -> None:
    """Routing is by names: relays may be told of the new address one after the other."""
    before = _settings(tmp_path, engine, uuid4().hex, uuid4().hex)
    after = _settings(tmp_path, engine, uuid4().hex, uuid4().hex)
    with _running(before) as one, _running(after) as other:
        until(lambda: one.daemon.stats is not None and one.daemon.stats.shards == tables.SHARDS // 2)
        until(lambda: other.daemon.stats is not None and other.daemon.stats.shards == tables.SHARDS // 2)


def test_a_message_for_a_destination_that_is_not_allowed_is_dead_and_reaches_no_broker(
    engine: Engine, tmp_path: Path
) -> None:
    first, second = uuid4().hex, uuid4().hex
    memory.exchange(first).missing.add("secrets")
    write(
        engine, message(1), message(2, topic="secrets"), message(3, topic="payments.eu"), message(4, topic="payments")
    )
    with engine.begin() as connection:
        outbox.schedule(connection, [(message(5, topic="secrets", key=None), timedelta(milliseconds=1))])

    with _running(_settings(tmp_path, engine, first, second, allowed=("orders", "payments.*"))) as built:
        until(lambda: count(engine, tables.dead_letters) == 3)
        until(lambda: count(engine, tables.outbox_messages) == count(engine, tables.outbox_waiting) == 0)
        assert built.daemon.stats is not None
        assert built.daemon.stats.unavailable == ()

    assert (_sent(first, "orders"), _sent(second, "payments.eu")) == ([b"1"], [b"3"])
    assert _sent(first, "secrets") == _sent(first, "payments") == []
    with engine.connect() as connection:
        found = dead_letters.find(connection, dead_letters.Filter())
    assert sorted(letter.payload or b"" for letter in found) == [b"2", b"4", b"5"]
    assert {letter.error for letter in found} == {"its destination is not one of relay.allowed_destinations"}


def test_a_relay_with_other_allowed_destinations_is_refused(engine: Engine, tmp_path: Path) -> None:
    """It would bury what the others publish."""
    first, second = uuid4().hex, uuid4().hex
    with _running(_settings(tmp_path, engine, first, second, allowed=("orders",))) as built:
        until(lambda: built.daemon.stats is not None and built.daemon.stats.joined)
        other = build_relay(_settings(tmp_path, engine, first, second, allowed=("orders", "payments.*")))
        with other, pytest.raises(ConfigurationError, match=r"and only orders, payments\.\*.*and only orders:"):
            other.run(threading.Event())


def test_relays_with_one_routing_share_the_work(engine: Engine, tmp_path: Path) -> None:
    settings = _settings(tmp_path, engine, uuid4().hex, uuid4().hex)
    with _running(settings) as one, _running(settings) as other:
        until(lambda: one.daemon.stats is not None and one.daemon.stats.shards == tables.SHARDS // 2)
        until(lambda: other.daemon.stats is not None and other.daemon.stats.shards == tables.SHARDS // 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[brokers.a]\nurl = "memory://a"\n[brokers.b]\nurl = "memory://b"', "default"),
        ('broker_url = "memory://x"\n[brokers.a]\nurl = "memory://a"\ndefault = true', "default"),
        (
            'broker_url = "memory://x"\n[destinations."pay.*"]\nbroker = "nowhere"',
            "destinations.pay.*.broker is nowhere",
        ),
        ('broker_url = "memory://x"\n[brokers.a]\n[destinations."pay.*"]\nbroker = "a"', "brokers.a.url is not set"),
    ],
)
def test_a_routing_that_leads_nowhere_is_refused_at_the_start(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "outboxkit.toml"
    file.write_text(f'database_url = "sqlite:///{tmp_path / "a.db"}"\n{text}')

    with pytest.raises(ConfigurationError, match=words.replace("*", r"\*")):
        build_relay(load(file))
