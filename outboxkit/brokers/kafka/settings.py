"""From a URL and options to librdkafka's configuration: by allow-list, because some client settings load code.

Secrets stay inside `Settings` and out of its repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, unquote, urlsplit

from outboxkit.brokers import redacted, refuse_unknown
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["EMBEDDED", "Settings", "parse"]

EMBEDDED: Final = "embedded"
_DEFAULT_PORT: Final = 9092

_COMMON: Final = frozenset(
    {
        "broker.address.family",
        "client.id",
        "client.rack",
        "connections.max.idle.ms",
        "enable.ssl.certificate.verification",
        "metadata.max.age.ms",
        "reconnect.backoff.max.ms",
        "reconnect.backoff.ms",
        "sasl.mechanism",
        "sasl.oauthbearer.client.id",
        "sasl.oauthbearer.client.secret",
        "sasl.oauthbearer.method",
        "sasl.oauthbearer.scope",
        "sasl.oauthbearer.token.endpoint.url",
        "sasl.password",
        "sasl.username",
        "security.protocol",
        "socket.connection.setup.timeout.ms",
        "socket.keepalive.enable",
        "socket.timeout.ms",
        "ssl.ca.location",
        "ssl.ca.pem",
        "ssl.certificate.location",
        "ssl.certificate.pem",
        "ssl.cipher.suites",
        "ssl.endpoint.identification.algorithm",
        "ssl.key.location",
        "ssl.key.password",
        "ssl.key.pem",
    },
)
_PUBLISHER: Final = frozenset({"compression.level", "compression.type", "linger.ms"})
_SUBSCRIBER: Final = frozenset(
    {
        "auto.offset.reset",
        "fetch.min.bytes",
        "fetch.wait.max.ms",
        "group.instance.id",
        "heartbeat.interval.ms",
        "isolation.level",
        "max.poll.interval.ms",
        "queued.max.messages.kbytes",
        "session.timeout.ms",
    },
)
_TOPOLOGY: Final = frozenset({"partitions", "replication"})
_SECURE: Final = {False: "SSL", True: "SASL_SSL"}  # by whether there are credentials


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where and how to connect.

    Attributes:
        address: the bootstrap servers, for people and error texts.
        common: librdkafka settings of both sides.
        publisher: further settings of a producer.
        subscriber: further settings of a consumer.
        partitions: how many a created topic gets.
        replication: of a created topic, -1 is the broker's default.
    """

    address: str
    common: Mapping[str, str] = field(repr=False)
    publisher: Mapping[str, str] = field(repr=False)
    subscriber: Mapping[str, str] = field(repr=False)
    partitions: int
    replication: int


def parse(url: str, options: Mapping[str, str]) -> Settings:
    """The settings that a URL and options ask for; options win over the query of the URL.

    Raises:
        ConfigurationError: unparsable URL, or a setting that is not on the allow-list.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigurationError(f"cannot read the broker URL {redacted(url)}") from error
    wanted = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    refuse_unknown(wanted, _COMMON | _PUBLISHER | _SUBSCRIBER | _TOPOLOGY, "kafka")
    userinfo, _, hosts = parts.netloc.rpartition("@")
    address = _servers(hosts, url)
    security = _security(parts.scheme, userinfo)
    chosen = {name: value for name, value in wanted.items() if name in _COMMON}
    return Settings(
        address=address,
        common={"bootstrap.servers": address, **security, **chosen},
        publisher={name: value for name, value in wanted.items() if name in _PUBLISHER},
        subscriber={name: value for name, value in wanted.items() if name in _SUBSCRIBER},
        partitions=_number(wanted, "partitions", 6),
        replication=_number(wanted, "replication", -1),
    )


def _servers(hosts: str, url: str) -> str:
    names = [host.strip() for host in hosts.split(",") if host.strip()]
    if not names:
        raise ConfigurationError(f"the broker URL {redacted(url)} names no host; expected kafka://host:9092")
    return ",".join(name if _has_port(name) else f"{name}:{_DEFAULT_PORT}" for name in names)


def _has_port(host: str) -> bool:
    return host == EMBEDDED or host.rpartition(":")[2].isdigit()


def _security(scheme: str, userinfo: str) -> dict[str, str]:
    secure = scheme.endswith("+ssl")
    if not userinfo:
        return {"security.protocol": _SECURE[False]} if secure else {}
    user, _, password = userinfo.partition(":")
    return {
        "security.protocol": _SECURE[True],  # never credentials in clear text, unless an option says so
        "sasl.mechanism": "PLAIN",
        "sasl.username": unquote(user),
        "sasl.password": unquote(password),
    }


def _number(wanted: Mapping[str, str], name: str, default: int) -> int:
    text = wanted.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(f"the kafka option {name} must be a whole number, got {text!r}") from error
