"""A broker's password is changed while relays and consumers run: who reads it from a file needs no restart."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

from outboxkit.brokers import Delivery, Subscriber
from outboxkit_relay import load
from outboxkit_relay.cli.consume import subscriber_of
from outboxkit_relay.daemon.build import build_relay
from outboxkit_relay.settings import Settings
from tests import servers
from tests.consumer_fixture import ConsumerFixture, consumer, handles, order
from tests.deadlines import DEADLINE
from tests.integration.brokers.world import control
from tests.integration.relay.world import until, write
from tests.servers.kafka import scram_address


@dataclass(frozen=True)
class Rotating:
    """A broker with a user of the test's own."""

    url: str  # with {password}
    options: dict[str, str]
    set_password: Callable[[str], None]
    cut: Callable[[], None]  # the connections: what connects now must log in anew


@pytest.fixture(params=[pytest.param("rabbitmq", marks=pytest.mark.full), "kafka"])
def rotating(request: pytest.FixtureRequest) -> Rotating:
    found: Rotating = {"rabbitmq": _rabbitmq, "kafka": _kafka}[request.param](request.getfixturevalue(request.param))
    return found


def _rabbitmq(server: servers.Server) -> Rotating:
    user = f"u{uuid4().hex}"

    def tell(*calls: str) -> None:
        control(server, "eval", ", ".join(f"rabbit_{call}" for call in calls) + ".")

    def set_password(password: str) -> None:
        tell(
            f'auth_backend_internal:put_user(#{{name => <<"{user}">>, password => <<"{password}">>, '
            'tags => <<>>}, <<"test">>)',
            f'auth_backend_internal:set_permissions(<<"{user}">>, <<"/">>, <<".*">>, <<".*">>, <<".*">>, <<"test">>)',
        )

    def cut() -> None:
        tell(
            f"networking:close_connections([rabbit_misc:pget(pid, C) || C <- rabbit_networking:connection_info_all("
            f'[pid, user]), rabbit_misc:pget(user, C) =:= <<"{user}">>], "rotated")'
        )

    url = f"amqp://{user}:{{password}}@{server.bootstrap}/"
    return Rotating(url, {}, set_password, cut)


def _kafka(server: servers.Server) -> Rotating:
    user, admin = f"u{uuid4().hex}", AdminClient({"bootstrap.servers": server.bootstrap})
    mechanism = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_256, 4096)

    def set_password(password: str) -> None:
        change = UserScramCredentialUpsertion(user, mechanism, password.encode())
        admin.alter_user_scram_credentials([change])[user].result(DEADLINE)

    def cut() -> None:
        server.kill()
        server.start()

    options = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "SCRAM-SHA-256"}
    return Rotating(f"kafka://{user}:{{password}}@{scram_address(server)}", options, set_password, cut)


def _settings(database: str, folder: Path, rotating: Rotating) -> tuple[Settings, Path]:
    secret = folder / "broker.url"
    secret.write_text(rotating.url.format(password="first"))
    options = "\n".join(f'"{name}" = "{value}"' for name, value in rotating.options.items())
    (folder / "outboxkit.toml").write_text(f'database_url = "{database}"\n[relay]\nlease = "2s"\n[broker]\n{options}')
    return load(folder / "outboxkit.toml"), secret


@contextmanager
def _relaying(settings: Settings) -> Iterator[None]:
    stop = threading.Event()
    with build_relay(settings) as built:
        thread = threading.Thread(target=built.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(DEADLINE)


def _acknowledged(subscriber: Subscriber) -> list[Delivery]:
    """What the broker has taken back so far."""
    inner, found = subscriber.acknowledge, list[Delivery]()

    async def acknowledge(deliveries: Sequence[Delivery]) -> None:
        await inner(deliveries)
        found.extend(deliveries)

    subscriber.acknowledge = acknowledge  # type: ignore[method-assign]
    return found


async def test_a_password_that_is_rotated_in_its_file_lets_relay_and_consumer_in_without_a_refused_login(
    database_url: str,
    tmp_path: Path,
    rotating: Rotating,
    *,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world, topic, stop = ConsumerFixture(database_url), f"orders-{uuid4().hex}", asyncio.Event()
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL_FILE", str(tmp_path / "broker.url"))
    rotating.set_password("first")
    settings, secret = _settings(database_url, tmp_path, rotating)
    billing = consumer(world)
    handles(billing, topic=topic)
    subscriber = subscriber_of(billing, settings)
    await subscriber.declare(billing.subscription)
    acknowledged = _acknowledged(subscriber)

    with _relaying(settings):
        consuming = asyncio.create_task(billing.run(subscriber, stop))
        write(world.engine, order(1, topic=topic))
        await asyncio.to_thread(until, lambda: world.effects() == [1] and len(acknowledged) == 1)
        rotating.set_password("second")
        secret.write_text(rotating.url.format(password="second"))
        await asyncio.to_thread(rotating.cut)
        write(world.engine, order(2, topic=topic))
        await asyncio.to_thread(until, lambda: world.effects() == [1, 2])
        stop.set()
        await consuming

    await world.close()
    assert not [one for one in caplog.messages if "login" in one], "nobody was refused"
