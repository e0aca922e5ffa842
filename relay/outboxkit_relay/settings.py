"""Settings of the daemon and the command line: file, environment, flags; the only module that reads the environment.

Precedence: flags, environment (``OUTBOXKIT_RELAY__BATCH_SIZE``), the file (``outboxkit.toml``, or ``[tool.outboxkit]``
in ``pyproject.toml``), defaults. An unknown key is an error that names it.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from outboxkit.errors import ConfigurationError
from outboxkit.policy import Followers, Order, duration

__all__ = [
    "Duration",
    "ProbeSettings",
    "RelaySettings",
    "Retention",
    "Settings",
    "colourless",
    "environment",
    "load",
    "replace_environment",
    "variables",
]

PREFIX: Final = "OUTBOXKIT_"
_IN_FILES: Final = ("database_url", "database_direct_url", "broker_url")

Duration = Annotated[timedelta, BeforeValidator(lambda value: duration(value) if isinstance(value, str) else value)]


def _rate(value: object) -> object:
    """Messages a second, from a text such as ``200/s``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/\s*(s|m|h)", value.strip()) if isinstance(value, str) else None
    if isinstance(value, str) and match is None:
        raise ValueError("expected a rate such as 200/s, 5000/m or 100/h")
    return value if match is None else float(match[1]) / {"s": 1, "m": 60, "h": 3600}[match[2]]


Rate = Annotated[float, BeforeValidator(_rate), Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CircuitSettings(_Section):
    """``[relay.circuit]`` and ``[destinations.NAME.circuit]``: when a destination that refuses is left alone."""

    failure_rate: float = Field(0.5, gt=0, le=1, description="it opens when so much of a window's messages is refused")
    window: Duration = Field(timedelta(seconds=30), description="how far it looks back")
    open_for: Duration = Field(timedelta(seconds=5), description="how long it stays open before a few messages probe")


class RelaySettings(_Section):
    """``[relay]``: how the daemon publishes."""

    batch_size: int = Field(1000, ge=1, le=10_000, description="rows read, claimed and settled together")
    window: int = Field(8, ge=1, le=64, description="batches in flight for one destination")
    lease: Duration = Field(timedelta(seconds=10), description="how long the others wait before they take over")
    drain: Duration = Field(timedelta(seconds=20), description="how long a stop waits for messages in flight")
    patience: Duration = Field(timedelta(seconds=30), description="a batch not answered for so long is sent again")
    wake: Literal["poll", "notify"] = Field(
        "poll",
        description="notify: PostgreSQL wakes it when writers call commit_hooks.notify; it polls, too",
    )
    poll_slowest: Duration = Field(timedelta(milliseconds=250), description="the longest pause between two idle reads")
    order: Order | None = Field(
        None, description="pipelined or strict; default: pipelined on Kafka, strict on RabbitMQ"
    )
    on_dead: Followers = Field(Followers.PARK, description="followers of a dead head: park, skip or block")
    retry_base: Duration = Field(timedelta(milliseconds=100), description="full jitter: base of the delay")
    retry_cap: Duration = Field(timedelta(seconds=5), description="full jitter: the longest delay")
    retry_attempts: int = Field(8, ge=1, le=1000, description="tries after the first before a message is dead")
    circuit: CircuitSettings = Field(default_factory=CircuitSettings)


class DestinationSettings(_Section):
    """``[destinations.NAME]``: what one topic or queue may take of each relay."""

    rate: Rate | None = Field(None, description="messages per time: 200/s, 5000/m; default: as fast as it goes")
    in_flight: int | None = Field(None, ge=1, le=1_000_000, description="messages at the broker; default: the window")
    circuit: CircuitSettings | None = Field(None, description="default: [relay.circuit]")


class Retention(_Section):
    """``[retention]``: how long finished things are kept."""

    ledger: Duration = Field(timedelta(days=3), description="evidence of what was published")
    inbox: Duration = Field(timedelta(days=14), description="how long a redelivered message is recognised")
    dead_letters: Duration = Field(timedelta(days=90), description="closed dead letters")
    audit: Duration = Field(timedelta(days=365), description="who did what")


class LogSettings(_Section):
    """``[log]``: what is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least severe level shown")
    format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, JSON elsewhere")


class ProbeSettings(_Section):
    """``[probes]``: ``/livez``, ``/readyz`` and ``/metrics`` of the relay."""

    port: int | None = Field(None, ge=0, le=65_535, description="off unless set; 0 takes a free one and logs it")
    host: str = Field("127.0.0.1", description="the address to listen on")
    allow_remote: bool = Field(False, description="let it be an address that other machines reach: there is no login")


class Settings(BaseSettings):
    """Everything the daemon and the command line can be told."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        secrets_dir=None,
    )

    database_url: SecretStr | None = Field(
        None, description="postgresql+psycopg://user@host/database or sqlite:///file.db"
    )
    database_direct_url: SecretStr | None = Field(
        None, description="the same database past the pooler, for reading; says that database_url leads to a pooler"
    )
    broker_url: SecretStr | None = Field(None, description="kafka://host:9092 or amqp://user@host/vhost")
    registry_url: SecretStr | None = Field(
        None, description="directory:schemas or https://registry:8081: the schemas that dead messages name"
    )
    broker: dict[str, str] = Field(
        default_factory=dict, description="client settings by their own names, by allow-list"
    )
    relay: RelaySettings = Field(default_factory=RelaySettings)
    destinations: dict[str, DestinationSettings] = Field(
        default_factory=dict, description="limits of single topics and queues, see below"
    )
    retention: Retention = Field(default_factory=Retention)
    log: LogSettings = Field(default_factory=LogSettings)
    probes: ProbeSettings = Field(default_factory=ProbeSettings)
    failpoints: str = Field("", description="for tests only: name=exit[:n],…", exclude=True)

    @classmethod
    def settings_customise_sources(  # noqa: PLR0917  pydantic's signature
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file, whose content arrives as arguments."""
        del settings_cls, dotenv_settings, file_secret_settings
        return env_settings, init_settings

    def database(self) -> str:
        """The database URL, secret included.

        Raises:
            ConfigurationError: it is not set.
        """
        return _required(self.database_url, "database_url", "postgresql+psycopg://user@host/database")

    @property
    def pooled(self) -> bool:
        """Whether the database URL leads to a pooler in transaction mode."""
        return self.database_direct_url is not None

    def direct_database(self) -> str:
        """The URL of the database itself, secret included: it leads to a session of our own.

        Raises:
            ConfigurationError: the database is not set.
        """
        return self.database_direct_url.get_secret_value() if self.database_direct_url else self.database()

    def broker_address(self) -> str:
        """The broker URL, secret included.

        Raises:
            ConfigurationError: it is not set.
        """
        return _required(self.broker_url, "broker_url", "kafka://localhost:9092 or amqp://guest@localhost/")


def load(file: Path | None = None, **flags: Any) -> Settings:
    """Reads settings; flags that are not None win.

    Args:
        file: a TOML file; default: ``OUTBOXKIT_CONFIG``, ``outboxkit.toml``, or ``[tool.outboxkit]`` of the project.
        flags: top-level settings by name.

    Raises:
        ConfigurationError: each wrong key with what was expected.
    """
    content = {**_content(file), **_secrets_from_files()}
    _refuse_unknown_variables()
    try:
        settings = Settings(**content)
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    return settings.model_copy(update={name: SecretStr(value) for name, value in flags.items() if value is not None})


def environment(**settings: str) -> dict[str, str]:
    """The environment for a child process that is told these settings and inherits none: ``database_url="…"``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return kept | variables(**settings)


def replace_environment(values: Mapping[str, str]) -> None:
    """Gives this process these variables and no others, as a program that is started with them would have."""
    os.environ.clear()
    os.environ.update(values)


def variables(**settings: str) -> dict[str, str]:
    """The names that these settings have in the environment: ``database_url="…"``."""
    return {f"{PREFIX}{name.upper()}": value for name, value in settings.items()}


def colourless() -> bool:
    """Whether the person wants no colours (no-color.org)."""
    return bool(os.environ.get("NO_COLOR"))


def _content(file: Path | None) -> dict[str, Any]:
    named = file or (Path(value) if (value := os.environ.get(f"{PREFIX}CONFIG")) else None)
    if named is not None:
        return _toml(named)
    if (default := Path("outboxkit.toml")).is_file():
        return _toml(default)
    if (project := Path("pyproject.toml")).is_file():
        found: dict[str, Any] = _toml(project).get("tool", {}).get("outboxkit", {})
        return found
    return {}


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"the settings file {path} is not TOML: {error}") from None


def _secrets_from_files() -> dict[str, str]:
    """``OUTBOXKIT_DATABASE_URL_FILE`` and the like: for secrets that are mounted as files."""
    found = {}
    for name in _IN_FILES:
        if path := os.environ.get(f"{PREFIX}{name.upper()}_FILE"):
            try:
                found[name] = Path(path).read_text().strip()
            except OSError as error:
                raise ConfigurationError(f"{PREFIX}{name.upper()}_FILE: {path}: {error.strerror}") from None
    return found


def _refuse_unknown_variables() -> None:
    sections = {"CONFIG", *(f"{name.upper()}_FILE" for name in _IN_FILES), "PROFILE", "DEMO_DATABASE", "DEMO_BROKER"}
    known = sections | {name.upper() for name in Settings.model_fields}
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX):
            section = variable.removeprefix(PREFIX).partition("__")[0]
            if section not in known and not section.startswith("TEST_"):
                raise ConfigurationError(
                    f"the variable {variable} is not a setting of outboxkit; see docs/reference/settings.md"
                )


def _explain(error: ValidationError) -> str:
    # Never the input: it may be a secret.
    lines = []
    for problem in error.errors(include_input=False):
        why = _unknown(problem["loc"]) if problem["type"] == "extra_forbidden" else problem["msg"]
        lines.append(f"{'.'.join(map(str, problem['loc']))}: {why}")
    return "wrong settings: " + "; ".join(lines)


def _unknown(path: tuple[int | str, ...]) -> str:
    """Returns our words for a setting that does not exist, with the one that may be meant."""
    *outer, wrong = map(str, path)
    model: Any = Settings
    for name in outer:
        model = model.model_fields[name].annotation if name in getattr(model, "model_fields", {}) else None
    close = difflib.get_close_matches(wrong, getattr(model, "model_fields", ()), 1)
    return "there is no such setting" + (f"; did you mean {'.'.join((*outer, close[0]))}?" if close else "")


def _required(value: SecretStr | None, name: str, example: str) -> str:
    if value is None or not value.get_secret_value():
        raise ConfigurationError(
            f"{name} is not set; set {PREFIX}{name.upper()}, or {name} in outboxkit.toml, for example {example}",
        )
    return value.get_secret_value()
