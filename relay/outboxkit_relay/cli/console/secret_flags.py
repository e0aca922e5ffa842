"""Secrets of a command line: none is taken as an argument, because every user of the machine can read those."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outboxkit.errors import ConfigurationError
from outboxkit_relay import redaction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outboxkit_relay.settings import Settings

__all__ = ["of", "refuse_in_flag"]


def refuse_in_flag(flag: str, url: str | None, variable: str) -> None:
    """Refuses a URL with a secret in it.

    Raises:
        ConfigurationError: says where the secret belongs.
    """
    if url and any(redaction.secrets_of(url)):
        raise ConfigurationError(
            f"{flag} carries a secret, and every user of this machine can read arguments: "
            f"set {variable} instead, or {variable}_FILE to a file that holds the URL",
        )


def of(settings: Settings) -> set[str]:
    """Every secret in the settings, as it is written and as it is meant."""
    return set(_of(settings))


def _of(settings: Settings) -> Iterator[str]:
    urls = (settings.database_url, settings.database_direct_url, settings.broker_url, settings.registry_url)
    for url in (*urls, *(one.url for one in settings.brokers.values())):
        if url is not None:
            yield from redaction.secrets_of(url.get_secret_value())
    options = [settings.broker, *(one.options for one in settings.brokers.values())]
    for name, value in (pair for one in options for pair in one.items()):
        if redaction.is_secret(name):
            yield value
