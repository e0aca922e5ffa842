"""What a machine can ask a running relay, over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection, Engine

from outboxkit import dead_letters, outbox, tables
from outboxkit.brokers import memory, open_publisher
from outboxkit.dialects import open_engine
from outboxkit.durations import Durations
from outboxkit.errors import ConfigurationError
from outboxkit.guards.circuit_breaker import CircuitState
from outboxkit.policy import Failure
from outboxkit.rows import Part, Reading, Row
from outboxkit_relay import settings
from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.relay import RelayDaemon
from outboxkit_relay.observe import health
from outboxkit_relay.observe.metrics import Subject
from outboxkit_relay.observe.stats import MAX_TOPICS, OTHER_TOPICS, RelayStats, Tally
from outboxkit_relay.settings import ProbeSettings
from tests.deadlines import DEADLINE
from tests.integration.relay.world import count, engine_for, message, relaying, until, write
from tests.probes import ask

LEASE = timedelta(seconds=2)
HEALTHY = RelayStats(
    relay=uuid4(), at=0.0, heard=0.0, away=False, joined=True, stopping=False, shards=64, queued=0, in_flight=0,
    found_by_rescan=0, destinations=(), unavailable=(), published={}, failures={},
)  # fmt: skip


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    found = engine_for(f"sqlite:///{tmp_path / 'outbox.db'}")
    yield found
    found.dispose()


@contextmanager
def _serving(engine: Engine, look: Callable[[], RelayStats | None], **changes: Any) -> Iterator[int]:
    subject = Subject(look=look, engine=engine, lease=LEASE, transport=lambda _topic: "memory", version="1.2.3")
    with health.serving(ProbeSettings(port=0, **changes), subject) as port:
        assert port
        yield port


def _metrics(port: int) -> dict[tuple[str, ...], float]:
    """Values by name and the values of its labels, sorted."""
    families = text_string_to_metric_families(ask(port, "/metrics")[1])
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


# --- a real relay ------------------------------------------------------------------------------------------------


def test_a_relay_that_publishes_is_alive_and_ready_and_counts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outboxkit_relay.observe.metrics._FRESH_FOR", 0.0)
    write(engine, *(message(number) for number in range(5)))

    with (
        relaying(engine, open_publisher(f"memory://{uuid4().hex}", {})) as relay,
        _serving(engine, lambda: relay.stats) as port,
    ):
        until(lambda: count(engine, tables.outbox_messages) == 0)
        until(lambda: ask(port, "/readyz")[0] == 200)
        assert ask(port, "/livez") == (200, '{"ok": true}\n')
        until(lambda: _metrics(port).get(("outboxkit_relay_published_total", "memory", "orders")) == 5)
        found = _metrics(port)

    assert found["outboxkit_relay_ready",] == found["outboxkit_database_up",] == 1
    assert found["outboxkit_relay_publish_duration_seconds_bucket", "+Inf"] >= 1
    assert (
        found["outboxkit_delivery_latency_seconds_count",] == found["outboxkit_relay_publish_duration_seconds_count",]
    )
    assert 0 < found["outboxkit_delivery_latency_seconds_sum",] < DEADLINE
    assert found["outboxkit_relay_shards_owned",] == tables.SHARDS
    assert found["outboxkit_destination_paused", "orders"] == 0
    assert found["outboxkit_relay_found_by_rescan_total",] == 0
    assert found["outboxkit_relay_fenced_total",] == 0
    assert found["outboxkit_build_info", "1.2.3", sys.version.split()[0]] == 1
    assert found["outboxkit_outbox_pending_messages", "orders"] == 0
    assert found["outboxkit_relay_publish_failures_total", "broker-down", "orders"] == 0


def test_the_circuit_of_each_destination_and_what_operators_paused_are_told(engine: Engine) -> None:
    found = replace(
        HEALTHY,
        destinations=("orders", "payments"),
        circuits={"orders": CircuitState.CLOSED, "payments": CircuitState.OPEN, "mails": CircuitState.HALF_OPEN},
        paused=frozenset({"stock"}),
    )
    with _serving(engine, lambda: found) as port:
        metrics = _metrics(port)

    states = {name: metrics["outboxkit_circuit_state", name] for name in found.circuits}
    assert states == {"orders": 0, "payments": 2, "mails": 1}
    assert metrics["outboxkit_destination_paused", "stock"] == 1
    assert metrics["outboxkit_destination_paused", "orders"] == 0


def test_a_paused_destination_is_named_with_its_reason_and_the_relay_stays_ready(engine: Engine) -> None:
    name = uuid4().hex
    memory.exchange(name).missing.add("payments")
    write(engine, message(1), message(2, topic="payments"))

    with (
        relaying(engine, open_publisher(f"memory://{name}", {})) as relay,
        _serving(engine, lambda: relay.stats) as port,
    ):
        until(lambda: "payments" in ask(port, "/readyz")[1])
        status, body = ask(port, "/readyz")
        found = _metrics(port)

    (paused,) = json.loads(body)["paused"]
    assert status == 200
    assert (paused["topic"], paused["failure"]) == ("payments", "unknown-topic")
    assert "there is no topic payments" in paused["reason"]
    assert (found["outboxkit_destination_paused", "payments"], found["outboxkit_destination_paused", "orders"]) == (
        1,
        0,
    )
    assert found["outboxkit_relay_publish_failures_total", "payments", "unknown-topic"] >= 1
    assert found["outboxkit_outbox_pending_messages", "payments"] == 1
    assert found["outboxkit_outbox_oldest_pending_age_seconds", "payments"] >= 0


def test_a_relay_whose_database_is_away_is_alive_but_not_ready(engine: Engine, tmp_path: Path) -> None:
    with (
        relaying(engine, open_publisher(f"memory://{uuid4().hex}", {})) as relay,
        _serving(engine, lambda: relay.stats) as port,
    ):
        until(lambda: ask(port, "/readyz")[0] == 200)
        with engine.connect() as connection:
            connection.exec_driver_sql("ALTER TABLE outbox_relays RENAME TO gone")
            connection.commit()

        until(lambda: ask(port, "/readyz")[0] == 503)

        assert json.loads(ask(port, "/readyz")[1])["reason"] == "the database cannot be reached"
        assert ask(port, "/livez")[0] == 200
        assert _metrics(port)["outboxkit_relay_ready",] == 0
        with engine.connect() as connection:
            connection.exec_driver_sql("ALTER TABLE gone RENAME TO outbox_relays")
            connection.commit()
        until(lambda: ask(port, "/readyz")[0] == 200)


def test_a_relay_that_has_left_is_not_ready(engine: Engine) -> None:
    with relaying(engine, open_publisher(f"memory://{uuid4().hex}", {})) as relay:
        until(lambda: relay.stats and relay.stats.joined)

    with _serving(engine, lambda: relay.stats) as port:
        assert json.loads(ask(port, "/readyz")[1]) == {"ok": False, "reason": "stopping", "paused": []}


def test_before_its_first_turn_a_relay_is_alive_and_not_ready(engine: Engine) -> None:
    relay = RelayDaemon(engine, open_publisher(f"memory://{uuid4().hex}", {}), RelayConfig())

    with _serving(engine, lambda: relay.stats) as port:
        assert ask(port, "/livez")[0] == 200
        assert ask(port, "/readyz")[0] == 503
        assert ask(port, "/metrics")[0] == 200


def test_the_daemon_answers_when_a_port_is_set_and_ends_well(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"sqlite:///{tmp_path / 'app.db'}"
    engine_for(url).dispose()
    environment = settings.environment(database_url=url, broker_url="memory://one", probes__port=str(port))
    command = [sys.executable, "-m", "outboxkit_relay", "relay", "run"]
    daemon = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        until(lambda: _status(port, "/readyz") == 200)
        assert ask(port, "/livez")[0] == 200
        assert "outboxkit_build_info" in ask(port, "/metrics")[1]
        os.kill(daemon.pid, signal.SIGTERM)
        _, said = daemon.communicate(timeout=DEADLINE)
    finally:
        daemon.kill()
        daemon.wait()

    assert daemon.returncode == 0
    assert b"probes.listening" in said


def _status(port: int, path: str) -> int:
    try:
        return ask(port, path)[0]
    except OSError:
        return 0


# --- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ready", "words"),
    [
        ({}, True, ""),
        ({"stopping": True}, False, "stopping"),
        ({"away": True}, False, "cannot be reached"),
        ({"joined": False}, False, "no lease"),
        ({"heard": -5.0}, False, "has not answered for"),
        ({"at": -50.0}, True, ""),
    ],
)
def test_what_makes_a_relay_unready(engine: Engine, changes: dict[str, Any], ready: bool, words: str) -> None:  # noqa: FBT001
    with _serving(engine, lambda: _now(**changes)) as port:
        status, body = ask(port, "/readyz")
        alive, _ = ask(port, "/livez")

    assert (status == 200) is ready
    assert words in body
    assert alive == 200


def test_a_dispatcher_that_does_not_move_is_not_alive(engine: Engine) -> None:
    with _serving(engine, lambda: _now(at=-61.0)) as port:
        status, body = ask(port, "/livez")

    assert status == 503
    assert "the dispatcher has not moved for 61 s" in body


def _now(*, at: float = 0.0, heard: float = 0.0, **changes: Any) -> RelayStats:
    now = time.monotonic()
    return replace(HEALTHY, at=now + at, heard=now + heard, **changes)


# --- safety ------------------------------------------------------------------------------------------------------


def test_without_a_port_nothing_listens(engine: Engine) -> None:
    before = threading.active_count()
    subject = Subject(look=lambda: None, engine=engine, lease=LEASE, transport=lambda _topic: "memory", version="")

    with health.serving(ProbeSettings(), subject) as port:
        assert port is None
        assert threading.active_count() == before


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "relay.example", ""])
def test_an_address_that_others_reach_is_refused_unless_a_setting_allows_it(engine: Engine, host: str) -> None:
    with pytest.raises(ConfigurationError, match="allow_remote"), _serving(engine, lambda: None, host=host):
        pass


def test_an_address_that_others_reach_can_be_allowed(engine: Engine) -> None:
    with _serving(engine, _now, host="0.0.0.0", allow_remote=True) as port:
        assert ask(port, "/livez")[0] == 200


def test_a_port_that_is_taken_is_one_line(engine: Engine) -> None:
    with _serving(engine, _now) as port:
        subject = Subject(look=_now, engine=engine, lease=LEASE, transport=lambda _topic: "memory", version="")
        with pytest.raises(ConfigurationError, match=f"port {port}"), health.serving(ProbeSettings(port=port), subject):
            pass


def test_the_daemon_refuses_to_start_where_others_could_read(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'app.db'}"
    names = {"database_url": url, "broker_url": "memory://one", "probes__port": "0", "probes__host": "0.0.0.0"}
    command = [sys.executable, "-m", "outboxkit_relay", "relay", "run", "--once"]

    done = subprocess.run(
        command, env=settings.environment(**names), capture_output=True, text=True, cwd=tmp_path, check=False
    )

    assert done.returncode == 2
    assert "probes.host is 0.0.0.0" in done.stderr


def test_unknown_paths_and_methods_change_nothing(engine: Engine) -> None:
    with _serving(engine, _now) as port:
        assert ask(port, "/")[0] == ask(port, "/livez/x")[0] == 404
        assert ask(port, "/livez?verbose")[0] == 200
        connection = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        connection.request("POST", "/readyz", body=b"{}")
        assert connection.getresponse().status == 501
        connection.close()


def test_clients_that_say_nothing_are_cut_and_never_stand_in_the_way(engine: Engine) -> None:
    with _serving(engine, _now) as port:
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(150)]
        for one in silent[::2]:
            one.sendall(b"GET /livez HTTP/1.1\r\nX-Slow: ")

        assert {ask(port, path)[0] for path in ("/livez", "/readyz") for _ in range(20)} == {200}

        for one in silent:
            one.settimeout(DEADLINE)
            with contextlib.suppress(ConnectionError):  # it was turned away to make room
                assert one.recv(1) == b""
            one.close()


def test_a_request_without_an_end_is_cut(engine: Engine) -> None:
    with _serving(engine, _now) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(DEADLINE)
        with contextlib.suppress(ConnectionError):
            client.sendall(b"GET /livez HTTP/1.1\r\n" + b"X-More: header\r\n" * 10_000)
            assert client.recv(1) == b""
        assert ask(port, "/livez")[0] == 200


def test_probes_do_not_wait_for_scrapes_of_a_database_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never says a word
        url = f"postgresql+psycopg://nobody@127.0.0.1:{silent.getsockname()[1]}/none"
        stalled = open_engine(url, patience=timedelta(seconds=3))
        with _serving(stalled, _now) as port:
            scrapes: list[dict[tuple[str, ...], float]] = []
            scraping = [threading.Thread(target=lambda: scrapes.append(_metrics(port))) for _ in range(20)]
            for one in scraping:
                one.start()

            assert {ask(port, path)[0] for path in ("/livez", "/readyz") for _ in range(20)} == {200}

            for one in scraping:
                one.join()
        stalled.dispose()

    assert len(scrapes) == 20
    assert {found["outboxkit_database_up",] for found in scrapes} == {0}
    assert {found["outboxkit_relay_shards_owned",] for found in scrapes} == {64}


def test_metrics_have_no_key_no_id_and_no_payload(engine: Engine) -> None:
    secret = message(4711, key="CANARY")
    write(engine, secret)

    with _serving(engine, _now) as port:
        text = ask(port, "/metrics")[1]

    assert 'outboxkit_outbox_pending_messages{topic="orders"} 1.0' in text
    assert not [word for word in ("CANARY", "4711", secret.id) if word in text]


def test_every_metric_is_documented_with_its_labels(engine: Engine) -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "metrics.md").read_text().partition("## A consumer")[0]
    rows = re.findall(r"^\| `(outboxkit_\w+)` \|([^|]*)\|", page, re.MULTILINE)
    documented = {name.removesuffix("_total"): set(filter(None, labels.strip().split(", "))) for name, labels in rows}
    found = replace(
        HEALTHY,
        destinations=("orders",),
        circuits={"orders": CircuitState.CLOSED},
        published={"orders": 1},
        failures={("orders", "refusing"): 1},
    )
    write(engine, message(1))
    with engine.begin() as connection:
        row = {"topic": "orders", "key": b"k", "shard": 0, "position": 1, "reason": "retry"}
        connection.execute(tables.outbox_stopped_keys.insert().values(**row))
        dead_letters.bury(connection, dead_letters.of_row(_row(connection), Failure.REJECTED, "no", 1))
    with _serving(engine, lambda: found) as port:
        families = list(text_string_to_metric_families(ask(port, "/metrics")[1]))

    told = {family.name: {name for one in family.samples for name in one.labels} - {"le"} for family in families}
    assert told == documented


def _row(connection: Connection) -> Row:
    everything = Part(frozenset(), only=False, seen=None)
    return outbox.read(connection, Reading(shards=frozenset(range(64)), parts=(everything,), limit=1)).rows[0]


def test_durations_are_counted_up_to_each_limit(engine: Engine) -> None:
    durations = Durations()
    for seconds in (0, 0.001, 0.002, 0.04, 90):
        durations.add(seconds)
    with _serving(engine, lambda: replace(HEALTHY, latency=durations.now)) as port:
        found = _metrics(port)

    upto = {le: found["outboxkit_delivery_latency_seconds_bucket", le] for le in ("0.001", "0.0025", "0.05", "60.0")}
    assert upto == {"0.001": 2, "0.0025": 3, "0.05": 4, "60.0": 4}
    assert found["outboxkit_delivery_latency_seconds_bucket", "+Inf"] == 5
    assert found["outboxkit_delivery_latency_seconds_sum",] == pytest.approx(90.043)


def test_topics_without_end_are_counted_together() -> None:
    tally = Tally()

    for number in range(MAX_TOPICS + 100):
        name = tally._name_of(f"topic-{number}")
        tally.failures[name, Failure.REJECTED.value] += 1

    assert len(tally.failures) == MAX_TOPICS + 1
    assert tally.failures[OTHER_TOPICS, "rejected"] == 100


def test_the_database_is_counted_no_more_often_than_it_can_bear(engine: Engine) -> None:
    write(engine, message(1))
    with _serving(engine, _now) as port:
        first = _metrics(port)["outboxkit_outbox_pending_messages", "orders"]
        write(engine, message(2))

        assert _metrics(port)["outboxkit_outbox_pending_messages", "orders"] == first == 1


def test_without_a_database_the_other_numbers_are_still_told(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE outbox_messages")

    with _serving(engine, _now) as port:
        found = _metrics(port)

    assert found["outboxkit_database_up",] == 0
    assert found["outboxkit_relay_shards_owned",] == 64
