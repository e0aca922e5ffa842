"""What a Kafka client logs in with: the URL's user and password, or what the credentials say at this moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from outboxkit.brokers import Login, Token
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from confluent_kafka import Consumer, Producer

    from outboxkit.brokers import Credentials
    from outboxkit.brokers.kafka.settings import Settings

__all__ = ["connection_settings", "provable_settings", "renewed"]


def connection_settings(settings: Settings) -> dict[str, Any]:
    """Returns the settings of a new client with the login of this moment.

    Raises:
        ConfigurationError: the credentials give neither a `Login` nor a `Token`.
    """
    if settings.credentials is None:
        return dict(settings.common)
    given = settings.credentials()
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
    given = settings.credentials()
    if not isinstance(given, Login) or given.password == used.get("sasl.password"):
        return False
    client.set_sasl_credentials(given.user, given.password)
    return True


def _token_source(credentials: Credentials) -> Any:
    def next_token(_: str) -> tuple[str, float, str, Mapping[str, str]]:
        token = _token(credentials())
        return token.value, token.expires_at.timestamp(), token.principal, dict(token.extensions)

    return next_token


def _token(given: object) -> Token:
    if not isinstance(given, Token):
        raise ConfigurationError("the credentials of a Kafka client must be a Login, or always a Token")
    return given
