"""From a URL and options to what a connection needs. Secrets stay inside `Settings`: out of its repr and all texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlencode, urlunsplit

from outboxkit.brokers import Features, Login, refuse_unknown
from outboxkit.brokers._credentials import ask
from outboxkit.brokers._urls import read_url
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outboxkit.brokers import Credentials

__all__ = ["FEATURES", "Settings", "parse"]

# RabbitMQ 4 takes 16 MiB by default (max_message_size), older ones 128 MiB.
FEATURES: Final = Features(name="rabbitmq", order=Order.STRICT, evidence=False, max_message_bytes=16 << 20)

_CLIENT: Final = frozenset({"cadata", "cafile", "capath", "certfile", "heartbeat", "keyfile", "name", "no_verify_ssl"})
_OURS: Final = frozenset({
    "blocked_timeout",
    "confirm_timeout",
    "management",
    "max_message_bytes",
    "prefetch",
    "prefetch_bytes",
})
_PREFETCH: Final = 65_535  # the most that the protocol can say


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Addresses, login and bounds.

    Attributes:
        address: the URL without secrets, for people and error texts.
        nodes: ``host:port`` of each node.
        scheme: ``amqp`` or ``amqps``.
        path: the virtual host, quoted.
        query: settings of the client.
        login: user and password of the URL, as far as it has them.
        credentials: gives the login at each connection, instead of the URL's.
        confirm_seconds: a message that is not confirmed after this long is indeterminate.
        blocked_seconds: how long a blocked connection is waited for before anything is written.
        max_message_bytes: larger payloads are refused before they are sent.
        prefetch: messages that a consumer holds at most, None for twice what it receives at once.
        prefetch_bytes: bytes of payload that a consumer holds at most, but one message.
        management: where the management interface is; empty: at the broker's host.
    """

    address: str
    nodes: tuple[str, ...]
    scheme: str
    path: str
    query: str
    login: tuple[str, ...] = field(repr=False)
    credentials: Credentials | None = field(repr=False)
    confirm_seconds: float
    blocked_seconds: float
    max_message_bytes: int
    prefetch: int | None
    prefetch_bytes: int
    management: str

    def urls(self) -> list[str]:
        """The URL of each node with the login of this moment; for the client only.

        Raises:
            ConfigurationError: the credentials cannot be had, or are a token, which RabbitMQ's login does not take.
        """
        login = self.login if self.credentials is None else _login(ask(self.credentials))
        before = ":".join(quote(part, safe="") for part in login) + "@" if login else ""
        return [urlunsplit((self.scheme, before + node, self.path, self.query, "")) for node in self.nodes]


def _login(given: object) -> tuple[str, ...]:
    if not isinstance(given, Login):
        raise ConfigurationError("RabbitMQ takes a user and a password: let the credentials return a Login")
    return given.user, given.password


def parse(url: str, options: Mapping[str, str], credentials: Credentials | None = None) -> Settings:
    """Reads the settings that a URL and options ask for; options win over the query of the URL.

    Raises:
        ConfigurationError: unparsable URL, or a setting that is not on the allow-list.
    """
    read = read_url(url, "amqp://user:password@host/vhost")
    wanted = {**read.query, **options}
    refuse_unknown(wanted, _CLIENT | _OURS, "rabbitmq")
    # Ten seconds of heartbeat: a silent partition is found within half a minute.
    client = {"heartbeat": "10", **{name: value for name, value in wanted.items() if name in _CLIENT}}
    prefetch = _whole(wanted, "prefetch", 0)
    if prefetch > _PREFETCH:
        raise ConfigurationError(f"the rabbitmq option prefetch must be at most {_PREFETCH:,}, got {prefetch:,}")
    return Settings(
        address=read.shown,
        nodes=read.hosts,
        scheme="amqps" if read.scheme in {"amqps", "rabbitmq+ssl", "amqp+ssl"} else "amqp",
        path=read.path,
        query=urlencode(client),
        login=read.login,
        credentials=credentials,
        confirm_seconds=_number(wanted, "confirm_timeout", 30.0),
        blocked_seconds=_number(wanted, "blocked_timeout", 10.0),
        max_message_bytes=_whole(wanted, "max_message_bytes", FEATURES.max_message_bytes or 0),
        prefetch=prefetch or None,
        prefetch_bytes=_whole(wanted, "prefetch_bytes", 64 << 20),
        management=wanted.get("management", ""),
    )


def _whole(wanted: Mapping[str, str], name: str, default: int) -> int:
    return int(_number(wanted, name, default))


def _number(wanted: Mapping[str, str], name: str, default: float) -> float:
    text = wanted.get(name, str(default))
    try:
        number = float(text)
    except ValueError as error:
        raise ConfigurationError(f"the rabbitmq option {name} must be a number, got {text!r}") from error
    if not 0 <= number < float("inf"):
        raise ConfigurationError(f"the rabbitmq option {name} must be a positive number, got {text!r}")
    return number
