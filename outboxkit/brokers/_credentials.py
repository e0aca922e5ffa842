"""Logins and tokens, and where new ones come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from outboxkit.brokers._urls import read_url
from outboxkit.errors import ConfigurationError

__all__ = ["Credentials", "Login", "Token", "ask", "logins_of"]


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A bearer token (Kafka: OAUTHBEARER).

    Attributes:
        value: the token.
        expires_at: aware; a new one is asked for in time.
        principal: whose it is; Kafka shows it in its logs.
        extensions: further facts for the broker (SASL extensions).
    """

    value: str = field(repr=False)
    expires_at: datetime
    principal: str = ""
    extensions: Mapping[str, str] = field(default_factory=dict)


#: Gives what a new connection logs in with; asked again each time, so that what was rotated is found.
Credentials = Callable[[], Login | Token]


def logins_of(read: Callable[[], str]) -> Credentials:
    """Returns credentials that read a broker URL anew each time: from a file that a secret store rewrites, say.

    Args:
        read: gives the URL; the credentials take its user and password, and refuse one without them.
    """

    def login() -> Login:
        user, *password = read_url(read(), "amqp://user:password@host/").login or ("",)
        if not user:
            raise ConfigurationError("the broker URL that was read again has no user and password")
        return Login(user, "".join(password))

    return login


def ask(credentials: Credentials) -> Login | Token:
    """Asks for what a new connection logs in with.

    Raises:
        ConfigurationError: the function failed; its error may hold secrets and is named only.
    """
    try:
        return credentials()
    except ConfigurationError:
        raise
    except Exception as error:
        raise ConfigurationError(f"the credentials cannot be had: {type(error).__name__}") from error
