"""Login of a Kafka client: the URL's user and password, or what the credentials give at this moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from outboxkit.brokers import Login, Token
from outboxkit.brokers._credentials import ask
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from confluent_kafka import Consumer, Producer

    from outboxkit.brokers import Credentials
    from outboxkit.brokers.kafka.settings import Settings

_RECONNECT_MS: Final = "3000"  # with the client's jitter at most 4.5 s after an outage, and not the default's 15

__all__ = ["connection_settings", "provable_settings", "renewed"]


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


def renewed(client: Producer | Consumer, settings: Settings, used: Mapping[str, Any]) -> bool:
    """Gives a client that was refused the password of this moment; False when there is no newer one."""
    if settings.credentials is None:
        return False
    given = ask(settings.credentials)
    if not isinstance(given, Login) or given.password == used.get("sasl.password"):
        return False
    client.set_sasl_credentials(given.user, given.password)
    return True


def _token_source(credentials: Credentials) -> Any:
    def next_token(_: str) -> tuple[str, float, str, Mapping[str, str]]:
        token = _token(ask(credentials))
        return token.value, token.expires_at.timestamp(), token.principal, dict(token.extensions)

    return next_token


def _token(given: object) -> Token:
    if not isinstance(given, Token):
        raise ConfigurationError("the credentials of a Kafka client must be a Login, or always a Token")
    return given
