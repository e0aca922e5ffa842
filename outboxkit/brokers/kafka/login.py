"""Login of a Kafka client: the URL's user and password, or what the credentials give at this moment."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from outboxkit.brokers import Login, Token
from outboxkit.brokers._credentials import ask
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from confluent_kafka import Consumer, Producer

    from outboxkit.brokers import Credentials
    from outboxkit.brokers.kafka.settings import Settings

_LATE_REFUSALS: Final = 10.0  # seconds; longer than all connections take to try again
_RECONNECT_MS: Final = "3000"  # with the client's jitter at most 4.5 s after an outage, and not the default's 15

__all__ = ["SessionLogin", "connection_settings", "provable_settings"]


def connection_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings of a new client with the login of this moment.

    Raises:
        ConfigurationError: the credentials give neither a `Login` nor a `Token`.
    """
    return {"reconnect.backoff.max.ms": _RECONNECT_MS, **_with_login(settings)}


def _with_login(settings: Settings) -> dict[str, Any]:
    if settings.credentials is None:
        return dict(settings.common)
    given = ask(settings.credentials)
    if isinstance(given, Login):
        login = {"sasl.username": given.user, "sasl.password": given.password}
        return {"sasl.mechanism": "PLAIN", **settings.common, **login}
    _token(given)
    source = _token_source(settings.credentials)
    return {**settings.common, "sasl.mechanism": "OAUTHBEARER", "oauth_cb": source}


def provable_settings(settings: Settings) -> dict[str, str]:
    """Returns what can be read without an address, and without the login that only the credentials know."""
    known = {name: value for name, value in settings.common.items() if name != "bootstrap.servers"}
    if settings.credentials is None:
        return known
    return {name: value for name, value in known.items() if not name.startswith(("sasl.", "security."))}


class SessionLogin:
    """The login of a client while it lives: renewed where the credentials give another password than before."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._used: dict[str, Any] = {}
        self._newer: Login | None = None
        self._renewed_at = -_LATE_REFUSALS

    def begin(self) -> dict[str, Any]:
        """Returns the settings of a new client; see `connection_settings`."""
        self._used, self._newer = connection_settings(self._settings), None
        return self._used

    def is_renewable(self) -> bool:
        """Looks for a newer password than the one that was refused; `renew` gives it to the client.

        Also True a moment after that: each connection has tried the old one by itself.
        """
        if self._settings.credentials is None:
            return False
        try:
            given = ask(self._settings.credentials)
        except ConfigurationError:
            return False  # a file that is being replaced, say: the broker's refusal says more
        if isinstance(given, Login) and given.password != self._used.get("sasl.password"):
            self._newer = given
        return self._newer is not None or time.monotonic() - self._renewed_at < _LATE_REFUSALS

    def renew(self, client: Producer | Consumer) -> None:
        """Gives the client the newer password, if there is one. From a callback of its own it would end the process."""
        newer, self._newer = self._newer, None
        if newer is not None:
            client.set_sasl_credentials(newer.user, newer.password)
            self._renewed_at = time.monotonic()
            self._used = {**self._used, "sasl.username": newer.user, "sasl.password": newer.password}


def _token_source(credentials: Credentials) -> Any:
    def next_token(_: str) -> tuple[str, float, str, Mapping[str, str]]:
        token = _token(ask(credentials))
        return token.value, token.expires_at.timestamp(), token.principal, dict(token.extensions)

    return next_token


def _token(given: object) -> Token:
    if not isinstance(given, Token):
        raise ConfigurationError("the credentials of a Kafka client must be a Login, or always a Token")
    return given
