"""docker-compose.yml starts the tutorial's world; without an engine we can at least hold it to its promises."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_world_is_complete() -> None:
    assert {"postgres", "kafka", "rabbitmq", "schema-registry", "relay"} <= set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_is_pinned_to_a_version(name: str) -> None:
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-[\w.]+)?", SERVICES[name]["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_that_stays_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]

    ends_by_itself = any(
        other.get("depends_on", {}).get(name) == {"condition": "service_completed_successfully"}
        for other in SERVICES.values()
    )
    assert ends_by_itself if check.get("disable") else check["test"][0] == "CMD"


@pytest.mark.parametrize("name", SERVICES)
def test_every_published_port_is_on_loopback(name: str) -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", []))


def test_every_variable_of_ours_is_a_setting() -> None:
    from outboxkit_relay.settings import Settings  # the other tests need no settings

    variables = {
        variable
        for service in SERVICES.values()
        for variable in service.get("environment", {})
        if variable.startswith("OUTBOXKIT_")
    }

    assert variables
    for variable in variables:
        model: Any = Settings
        for part in variable.removeprefix("OUTBOXKIT_").lower().split("__"):
            assert part in model.model_fields, f"{variable}: {model.__name__} has no {part}"
            model = model.model_fields[part].annotation


def test_the_example_file_is_valid_and_shows_only_defaults() -> None:
    from outboxkit_relay.settings import Settings  # as above

    content = tomllib.loads((ROOT / "relay" / "outboxkit.toml").read_text())

    shown, default = Settings(**content), Settings()
    for section in ("relay", "retention", "log"):
        assert getattr(shown, section) == getattr(default, section)


def test_the_build_file_uses_what_the_context_contains() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "relay" / "Dockerfile").read_text(), flags=re.MULTILINE)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}

    sources = {source for line in copied for source in line.split()}
    assert sources <= kept
    assert all((ROOT / source).exists() for source in sources)
