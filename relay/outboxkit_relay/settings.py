"""Settings of the daemon and the command line: file, environment, flags; the only module that reads the environment.

Precedence: flags, environment (``OUTBOXKIT_RELAY__BATCH_SIZE``), the file (``outboxkit.toml``, or ``[tool.outboxkit]``
in ``pyproject.toml``), defaults. An unknown key is an error that names it.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from outboxkit.brokers import Credentials, logins_of
from outboxkit.errors import ConfigurationError
from outboxkit_relay import redaction
from outboxkit_relay.sections import (
    BrokerSettings,
    DestinationSettings,
    Duration,
    LogSettings,
    ProbeSettings,
    RelaySettings,
    Retention,
)

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

# Kubernetes gives every pod such variables for every Service, in the form of Docker's links.
_OF_A_SERVICE: Final = re.compile(
    rf"(?!.*__){PREFIX}(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)?)"
)


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
    database_schema: str = Field(
        "", max_length=63, description="PostgreSQL: where the tables are; default: the login's search_path"
    )
    broker_url: SecretStr | None = Field(None, description="kafka://host:9092 or amqp://user@host/vhost")
    registry_url: SecretStr | None = Field(
        None, description="directory:schemas or https://registry:8081: the schemas that dead messages name"
    )
    broker: dict[str, str] = Field(
        default_factory=dict, description="client settings by their own names, by allow-list"
    )
    brokers: dict[str, BrokerSettings] = Field(
        default_factory=dict, description="further brokers by name, see below: one outbox feeds them all"
    )
    relay: RelaySettings = Field(default_factory=RelaySettings)
    destinations: dict[str, DestinationSettings] = Field(
        default_factory=dict, description="limits and brokers of single topics and queues, see below"
    )
    retention: Retention = Field(default_factory=Retention)
    log: LogSettings = Field(default_factory=LogSettings)
    probes: ProbeSettings = Field(default_factory=ProbeSettings)
    failpoints: str = Field("", description="for tests only: name=exit[:n],…", exclude=True)
    secret_files: dict[str, Path] = Field(default_factory=dict, description="where secrets came from", exclude=True)
    read_from: Path | None = Field(None, description="the settings file", exclude=True)

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
        """Returns the database URL, secret included; read again from its file, if it came from one.

        Raises:
            ConfigurationError: it is not set.
        """
        return _required(self._secret("database_url"), "database_url", "postgresql+psycopg://user@host/database")

    @property
    def pooled(self) -> bool:
        """Whether the database URL leads to a pooler in transaction mode."""
        return self.database_direct_url is not None

    def direct_database(self) -> str:
        """The URL of the database itself, secret included: it leads to a session of our own.

        Raises:
            ConfigurationError: the database is not set.
        """
        return self._secret("database_direct_url") or self.database()

    def broker_address(self) -> str:
        """The broker URL, secret included.

        Raises:
            ConfigurationError: it is not set.
        """
        return _required(self._secret("broker_url"), "broker_url", "kafka://localhost:9092 or amqp://guest@localhost/")

    def broker_names(self) -> tuple[str, ...]:
        """The names of all brokers, the default one first; that of ``broker_url`` is the empty one.

        Raises:
            ConfigurationError: none is the default, or several are, or a destination names one that is not there.
        """
        chosen = [name for name, one in self.brokers.items() if one.default]
        candidates = chosen or ([""] if self.broker_url or not self.brokers else list(self.brokers))
        if len(candidates) != 1 or (chosen and self.broker_url):
            raise ConfigurationError(
                "several brokers and no single default: set broker_url, or default = true in one of [brokers.NAME]; "
                f"found {', '.join(sorted(candidates) or ['none'])}"
            )
        for destination, own in self.destinations.items():
            if own.broker and own.broker not in self.brokers:
                raise ConfigurationError(
                    f"destinations.{destination}.broker is {own.broker}; there are {', '.join(sorted(self.brokers))}"
                )
        return (*candidates, *(name for name in self.brokers if name not in candidates))

    def address_of(self, broker: str) -> str:
        """Returns the URL of a broker by its name, secret included; read again from its file, if it came from one.

        Raises:
            ConfigurationError: it is not set, or the file cannot be read.
        """
        if not broker:
            return self.broker_address()
        own, name = self.brokers[broker], f"brokers.{broker}.url"
        given = _secret_file(own.url_file, name) if own.url_file else own.url.get_secret_value() if own.url else ""
        return _required(given, name, "amqp://guest@localhost/")

    def credentials_of(self, broker: str) -> Credentials | None:
        """Tells what each new connection to a broker logs in with, where its URL is in a file; None elsewhere.

        Raises:
            ConfigurationError: as `address_of`.
        """
        in_file = self.brokers[broker].url_file is not None if broker else "broker_url" in self.secret_files
        read = partial(self.address_of, broker)
        return logins_of(read) if in_file and "@" in read() else None

    def options_of(self, broker: str) -> dict[str, str]:
        """The client settings of a broker by its name."""
        return self.brokers[broker].options if broker else self.broker

    def _secret(self, name: str) -> str:
        if name in self.secret_files:
            return _secret_file(self.secret_files[name], f"{PREFIX}{name.upper()}_FILE")
        value: SecretStr | None = getattr(self, name)
        return value.get_secret_value() if value else ""


def load(file: Path | None = None, **flags: Any) -> Settings:
    """Reads settings; flags that are not None win.

    Args:
        file: a TOML file; default: ``OUTBOXKIT_CONFIG``, ``outboxkit.toml``, or ``[tool.outboxkit]`` of the project.
        flags: top-level settings by name.

    Raises:
        ConfigurationError: each wrong key with what was expected.
    """
    found, read_from = _content(file)
    files = _secret_files()
    content = _flat(found) | {name: _secret_file(path, f"{PREFIX}{name.upper()}_FILE") for name, path in files.items()}
    _refuse_unknown_variables()
    _refuse_failpoints(found)
    try:
        settings = Settings(**content)
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None
    given = {name: SecretStr(value) for name, value in flags.items() if value is not None}
    kept = {name: path for name, path in files.items() if name not in given}
    return settings.model_copy(update={**given, "secret_files": kept, "read_from": read_from})


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


def _content(file: Path | None) -> tuple[dict[str, Any], Path | None]:
    """The content of a file, and its place."""
    named = file or (Path(value) if (value := os.environ.get(f"{PREFIX}CONFIG")) else None)
    if named is None and (default := Path("outboxkit.toml")).is_file():
        named = default
    if named is not None:
        return _toml(named), named.absolute()
    if (project := Path("pyproject.toml")).is_file():
        found = _toml(project).get("tool", {}).get("outboxkit", {})
        return found, project.absolute() if found else None
    return {}, None


def _refuse_failpoints(content: Mapping[str, Any]) -> None:
    """They end processes: nobody gets them from a file that happens to lie there, and production never."""
    if "failpoints" in content:
        raise ConfigurationError(
            f"failpoints are for tests: they are read from {PREFIX}FAILPOINTS only, not from a file"
        )
    if os.environ.get(f"{PREFIX}FAILPOINTS") and os.environ.get(f"{PREFIX}PROFILE") == "production":
        raise ConfigurationError(
            f"{PREFIX}FAILPOINTS is set, and {PREFIX}PROFILE is production: failpoints are for tests"
        )


def _refuse_foreign(path: Path, status: os.stat_result) -> None:
    """A settings file says where messages go, and with which checks: nobody else may have a hand in it."""
    foreign = os.name == "posix" and status.st_uid not in {0, os.geteuid()}
    by_group = status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()
    if foreign or by_group or status.st_mode & stat.S_IWOTH:
        why = "belongs to another user" if foreign else "can be written by other users"
        raise ConfigurationError(f"the settings file {path} {why}: own it, and let nobody else write it (chmod go-w)")


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    """``[database] schema`` and ``OUTBOXKIT_DATABASE__SCHEMA`` are other spellings of ``database_schema``."""
    section = content.pop("database", {})
    named = {f"database_{name}": value for name, value in section.items()} if isinstance(section, dict) else {}
    variable = os.environ.get(f"{PREFIX}DATABASE__SCHEMA")
    return {**content, **named, **({"database_schema": variable} if variable else {})}


def _toml(path: Path) -> dict[str, Any]:
    try:
        _refuse_foreign(path, path.stat())
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"the settings file {path} is not TOML: {error}") from None


def _secret_files() -> dict[str, Path]:
    """``OUTBOXKIT_DATABASE_URL_FILE`` and the like: for secrets that are mounted as files.

    A variable with the secret itself wins over its file.
    """
    variables = {name: f"{PREFIX}{name.upper()}" for name in _IN_FILES}
    named = {name: os.environ.get(f"{variable}_FILE", "") for name, variable in variables.items()}
    return {name: Path(path) for name, path in named.items() if path and not os.environ.get(variables[name])}


def _secret_file(path: Path, name: str) -> str:
    try:
        secret = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{name}: {path}: {why}") from None
    redaction.remember({*redaction.secrets_of(secret)})
    return secret


def _refuse_unknown_variables() -> None:
    sections = {
        "CONFIG",
        "DATABASE",
        *(f"{name.upper()}_FILE" for name in _IN_FILES),
        "PROFILE",
        "DEMO_DATABASE",
        "DEMO_BROKER",
    }
    known = sections | {name.upper() for name in Settings.model_fields} | {"ALLOW_FAILPOINTS"}
    for variable in sorted(os.environ):
        if variable.startswith(PREFIX):
            section = variable.removeprefix(PREFIX).partition("__")[0]
            misspelt = section == "DATABASE" and variable != f"{PREFIX}DATABASE__SCHEMA"
            if (
                (section not in known or misspelt)
                and not section.startswith("TEST_")
                and not _OF_A_SERVICE.fullmatch(variable)
            ):
                raise ConfigurationError(
                    f"the variable {variable} is not a setting of outboxkit; see docs/reference/settings.md. "
                    "If a Kubernetes Service of that name has set it, use enableServiceLinks: false"
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


def _required(value: str, name: str, example: str) -> str:
    if not value:
        variable = f"{PREFIX}{name.upper().replace('.', '__')}"
        raise ConfigurationError(
            f"{name} is not set; set {variable}, or {name} in outboxkit.toml, for example {example}"
        )
    return value
