"""Settings of single destinations become the core's limits."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from outboxkit.brokers import open_publisher
from outboxkit.errors import ConfigurationError
from outboxkit.guards.circuit_breaker import CircuitRule
from outboxkit.policy import Order
from outboxkit_relay import settings
from outboxkit_relay.core.destinations import DestinationLimits
from outboxkit_relay.daemon.build import relay_config
from outboxkit_relay.daemon.publishers import Publishers

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

    config = relay_config(found.relay, Publishers.of(publisher), destinations=found.destinations)

    room = publisher.capacity("orders")
    assert config.limits == DestinationLimits(in_flight=room, rate=None, circuit=USUAL, order=Order.PIPELINED)
    own = CircuitRule(failure_rate=0.2, window=timedelta(minutes=1), open_for=timedelta(seconds=15))
    assert config.destinations == {
        "payments.charge": DestinationLimits(in_flight=500, rate=5.0, circuit=own, order=Order.PIPELINED)
    }


def test_no_destination_gets_more_than_the_broker_takes(tmp_path: Path) -> None:
    found = _loaded(tmp_path, "[destinations.orders]\nin_flight = 1000000\n")
    publisher = open_publisher("memory://unit")

    config = relay_config(found.relay, Publishers.of(publisher), destinations=found.destinations)

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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("order", "keys"),
        ("on_dead", "bury"),
        ("wake", "listen"),
        ("retry_attempts", 0),
        ("retry_base", "5"),
        ("ordr", "x"),
    ],
)
def test_a_choice_that_does_not_exist_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=rf"relay\.{name}"):
        _loaded(tmp_path, f"[relay]\n{name} = {value!r}")


# --- files, secrets and the environment --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variable",
    [
        "OUTBOXKIT_PORT",
        "OUTBOXKIT_SERVICE_HOST",
        "OUTBOXKIT_SERVICE_PORT",
        "OUTBOXKIT_SERVICE_PORT_HTTP",
        "OUTBOXKIT_PORT_8080_TCP",
        "OUTBOXKIT_PORT_8080_TCP_ADDR",
        "OUTBOXKIT_RELAY_PORT_53_UDP_PROTO",
        "OUTBOXKIT_RELAY_SERVICE_PORT_PROBES",
        "OUTBOXKIT_LOG_PORT",
    ],
)
def test_variables_of_a_kubernetes_service_are_let_pass(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:8080")

    assert settings.load().relay.batch_size == 1000


@pytest.mark.parametrize("variable", ["OUTBOXKIT_PROBE__PORT", "OUTBOXKIT_PORTS", "OUTBOXKIT_BATCH_SIZE"])
def test_a_misspelt_variable_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")

    with pytest.raises(ConfigurationError, match=f"{variable} is not a setting.*enableServiceLinks"):
        settings.load()


def test_a_secret_in_a_file_is_read_again_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "url"
    secret.write_text("postgresql://app:first@db/app\n")
    monkeypatch.setenv("OUTBOXKIT_DATABASE_URL_FILE", str(secret))
    found = settings.load()
    secret.write_text("postgresql://app:second@db/app\n")

    assert found.database() == found.direct_database() == "postgresql://app:second@db/app"


def test_a_settings_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "outboxkit.toml"
    file.write_text("[relay]\nbatch_size = 7")
    file.chmod(0o646)

    with pytest.raises(ConfigurationError, match="can be written by other users"):
        settings.load(file)
    file.chmod(0o644)
    assert settings.load(file).read_from == file


def test_failpoints_come_from_the_environment_only_and_never_in_production(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="not from a file"):
        _loaded(tmp_path, 'failpoints = "publish.before_send=exit"')
    monkeypatch.setenv("OUTBOXKIT_FAILPOINTS", "publish.before_send=exit")
    assert settings.load().failpoints
    monkeypatch.setenv("OUTBOXKIT_PROFILE", "production")
    with pytest.raises(ConfigurationError, match="production"):
        settings.load()
