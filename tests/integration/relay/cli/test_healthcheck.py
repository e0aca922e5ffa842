"""The probe for hosts that run a command: what it makes of each answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from sqlalchemy import Engine

from outboxkit_relay.observe import health
from outboxkit_relay.observe.metrics import Subject
from outboxkit_relay.observe.stats import RelayStats, Unavailable
from outboxkit_relay.settings import ProbeSettings
from tests.unit.relay.cli.conftest import Outboxkit

PAUSED = Unavailable(
    topic="payments",
    failure="unknown-topic",
    reason="there is no \x1b[2J such topic",
    since=datetime(2026, 1, 1, tzinfo=UTC),
    tries=3,
)


class Relay:
    """What a relay would hand out."""

    def __init__(self) -> None:
        self.joined, self.silence = True, 0.0

    def look(self) -> RelayStats:
        now = time.monotonic()
        return RelayStats(
            relay=uuid4(), at=now - self.silence, heard=now, away=False, joined=self.joined, stopping=False, shards=1,
            queued=0, in_flight=0, found_by_rescan=0, destinations=("payments",), unavailable=(PAUSED,), published={},
            failures={},
        )  # fmt: skip


@pytest.fixture
def relay(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """It answers where the settings say."""
    found = Relay()
    subject = Subject(
        look=found.look, engine=engine, lease=timedelta(seconds=10), transport=lambda _topic: "memory", version=""
    )
    with health.serving(ProbeSettings(port=0), subject) as port:
        monkeypatch.setenv("OUTBOXKIT_PROBES__PORT", str(port))
        yield found


def test_a_relay_that_can_publish_is_well_and_its_paused_destinations_are_named(
    outboxkit: Outboxkit, relay: Relay
) -> None:
    done = outboxkit("healthcheck")

    assert done.code == 0, done.err
    assert done.out == "well\npayments is paused: unknown-topic: there is no \\x1b[2J such topic\n"


def test_a_relay_that_cannot_publish_is_alive_and_not_well(outboxkit: Outboxkit, relay: Relay) -> None:
    relay.joined = False

    complete, minimal = outboxkit("healthcheck"), outboxkit("healthcheck", "--level", "minimal")

    assert complete.code == 3
    assert complete.out.startswith("joining: the relay has no lease yet\n")
    assert (minimal.code, minimal.out) == (0, "well\n")


def test_a_relay_that_does_not_move_is_not_even_alive(outboxkit: Outboxkit, relay: Relay) -> None:
    relay.silence = 100.0

    done = outboxkit("healthcheck", "--level", "minimal", "--json")

    assert done.code == 3
    assert json.loads(done.out) == {"ok": False, "reason": "the dispatcher has not moved for 100 s"}


def test_an_address_that_means_all_of_them_is_asked_here(
    outboxkit: Outboxkit, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOXKIT_PROBES__HOST", "0.0.0.0")

    assert outboxkit("healthcheck").code == 0


def test_without_a_port_it_is_a_matter_of_settings(outboxkit: Outboxkit) -> None:
    done = outboxkit("healthcheck")

    assert done.code == 2
    assert "probes.port is not set" in done.err


@pytest.fixture
def said() -> Iterator[Callable[[bytes], int]]:
    """Something else on a port: it says these bytes to one client."""
    threads: list[threading.Thread] = []

    def listen(answer: bytes) -> int:
        server = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with server, server.accept()[0] as client:
                client.recv(65_536)
                client.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return int(server.getsockname()[1])

    yield listen
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.0 200 OK\r\n\r\nno JSON", b"rubbish\r\n\r\n"])
def test_no_relay_there_is_one_line(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, said: Callable[[bytes], int]
) -> None:
    monkeypatch.setenv("OUTBOXKIT_PROBES__PORT", str(_free_port() if answer is None else said(answer)))

    done = outboxkit("healthcheck", "--timeout", "2s")

    assert done.code == 1
    assert "is it running?" in done.err
    assert done.err.count("\n") == 1


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
