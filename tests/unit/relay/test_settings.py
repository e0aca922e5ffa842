"""Settings of single destinations become the core's limits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from outboxkit.brokers import open_publisher
from outboxkit.errors import ConfigurationError
from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit_relay import settings
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.daemon.build import relay_config

USUAL = CircuitRule(failure_rate=0.5, window=timedelta(seconds=30), open_for=timedelta(seconds=5))


def _loaded(tmp_path: Path, text: str) -> settings.Settings:
    file = tmp_path / "outboxkit.toml"
    file.write_text(text)
    return settings.load(file)


def test_a_destination_has_its_own_limits_and_all_others_what_the_broker_takes(tmp_path: Path) -> None:
    found = _loaded(
        tmp_path,
        """
        [destinations."payments.charge"]
        rate = "300/m"
        in_flight = 500
        circuit = { failure_rate = 0.2, window = "1m", open_for = "15s" }
        """,
    )
    publisher = open_publisher("memory://unit")

    config = relay_config(found.relay, publisher, destinations=found.destinations)

    room = publisher.capacity("orders")
    assert config.limits == DestinationLimits(in_flight=room, rate=None, circuit=USUAL)
    own = CircuitRule(failure_rate=0.2, window=timedelta(minutes=1), open_for=timedelta(seconds=15))
    assert config.destinations == {"payments.charge": DestinationLimits(in_flight=500, rate=5.0, circuit=own)}


def test_no_destination_gets_more_than_the_broker_takes(tmp_path: Path) -> None:
    found = _loaded(tmp_path, "[destinations.orders]\nin_flight = 1000000\n")
    publisher = open_publisher("memory://unit")

    config = relay_config(found.relay, publisher, destinations=found.destinations)

    assert config.destinations["orders"].in_flight == publisher.capacity("orders")


@pytest.mark.parametrize(("text", "rate"), [("200/s", 200.0), ("1.5 / s", 1.5), ("600/m", 10.0), ("36/h", 0.01)])
def test_a_rate_is_messages_per_time(tmp_path: Path, text: str, rate: float) -> None:
    assert _loaded(tmp_path, f'[destinations.orders]\nrate = "{text}"').destinations["orders"].rate == pytest.approx(
        rate
    )


@pytest.mark.parametrize("text", ["fast", "200", "0/s", "-1/s", "200/d"])
def test_what_is_no_rate_is_refused_with_what_was_expected(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"destinations\.orders\.rate"):
        _loaded(tmp_path, f'[destinations.orders]\nrate = "{text}"')
