"""Mistakes with TLS are told as what they are, on both brokers."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest

from outboxkit.brokers import Batch, Publisher, Subscription, open_publisher, open_subscriber
from outboxkit.errors import ConfigurationError, TransientBrokerError
from outboxkit.policy import Failure
from outboxkit.testing.broker_conformance import make_row
from tests import servers
from tests.deadlines import DEADLINE
from tests.servers.certificates import Authority

PATIENCE = timedelta(seconds=2)  # of one question; it is put again until the answer is the one that is waited for


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "nobody-trusts-me")


@pytest.fixture
def tls_port(authority: Authority) -> Iterator[int]:
    """A port for TLS whose certificate is of an authority that nobody knows; behind it is nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.issue("broker"))
    yield from _door(lambda visitor: context.wrap_socket(visitor, server_side=True))


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port that takes connections and hangs up."""
    yield from _door(lambda visitor: visitor)


def _door(greet: object) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        porter = threading.Thread(target=_turn_away, args=(door, greet))
        porter.start()
        yield door.getsockname()[1]
        door.shutdown(socket.SHUT_RDWR)
        porter.join()


def _turn_away(door: socket.socket, greet: object) -> None:
    with suppress(OSError):  # the door is shut
        while True:
            visitor, _ = door.accept()
            with suppress(OSError):  # what it did not like
                visitor.settimeout(5)
                greet(visitor).close()  # type: ignore[operator]
            visitor.close()


def told_by_publisher(url: str, expected: str) -> str:
    """Returns what is said of a destination that cannot be asked about, as soon as it says what is expected."""
    publisher = open_publisher(url)
    try:
        return until(lambda: publisher.check(["t"], PATIENCE)["t"].text, expected)
    finally:
        publisher.close()


def misconfigured(publisher: Publisher) -> str:
    """Returns the configuration error of a publisher's check."""

    def asked() -> str:
        try:
            return publisher.check(["t"], PATIENCE)["t"].text
        except ConfigurationError as error:
            return f"configuration: {error}"

    return until(asked, "configuration: ")


async def told_by_subscriber(url: str, kind: type[Exception], expected: str = "") -> str:
    """Returns the error of that kind which a subscriber gets."""
    subscriber = open_subscriber(url, Subscription(consumer="c", topics=("t",)))
    end = time.monotonic() + DEADLINE
    try:
        while time.monotonic() < end:
            try:
                await subscriber.receive(1, PATIENCE)
            except (ConfigurationError, TransientBrokerError) as error:
                if isinstance(error, kind) and expected in str(error):
                    return str(error)
    finally:
        await subscriber.close()
    pytest.fail(f"no {kind.__name__} with {expected!r}")


def until(ask: Callable[[], str], expected: str) -> str:
    end = time.monotonic() + DEADLINE
    while expected not in (text := ask()):
        assert time.monotonic() < end, text
    return text


@pytest.mark.parametrize("scheme", ["amqps", "kafka+ssl"])
async def test_a_certificate_that_is_not_trusted_is_a_configuration_error_that_names_the_setting(
    tls_port: int, scheme: str
) -> None:
    url = f"{scheme}://shop:c4n4ry@127.0.0.1:{tls_port}"
    publisher = open_publisher(url)

    of_publisher = misconfigured(publisher)
    refusals = publisher.publish(Batch("t", [make_row("t")])).result(DEADLINE).refusals
    publisher.close()
    of_subscriber = await told_by_subscriber(url, ConfigurationError)

    setting = "cafile" if scheme == "amqps" else "ssl.ca.location"
    for text in (of_publisher, of_subscriber, refusals[0].text):
        assert setting in text
        assert "c4n4ry" not in text
    assert refusals[0].failure is Failure.UNAUTHORIZED


@pytest.mark.parametrize(("scheme", "right"), [("amqp", "amqps://"), ("kafka", "kafka+ssl://")])
async def test_a_plain_url_at_a_tls_port_is_asked_whether_it_is_one(tls_port: int, scheme: str, right: str) -> None:
    url = f"{scheme}://127.0.0.1:{tls_port}"

    assert right in told_by_publisher(url, "TLS port?")
    assert right in await told_by_subscriber(url, TransientBrokerError, "TLS port?")


def test_a_broker_that_hangs_up_on_tls_is_away_and_not_misconfigured(mute_port: int) -> None:
    """So does one that stops at this moment."""
    told_by_publisher(f"amqps://127.0.0.1:{mute_port}", "away")


def test_a_port_without_tls_is_a_configuration_error_for_who_wants_tls(rabbitmq: servers.Server) -> None:
    publisher = open_publisher(rabbitmq.url.replace("amqp://", "amqps://"))

    assert "no TLS there" in misconfigured(publisher)

    publisher.close()


@pytest.mark.parametrize("scheme", ["amqp", "kafka"])
def test_a_port_that_nobody_listens_on_is_away_and_nobody_is_asked_for_tls(scheme: str) -> None:
    assert "TLS" not in told_by_publisher(f"{scheme}://127.0.0.1:1", "127.0.0.1:1")
