"""From a URL and options to librdkafka's configuration: by allow-list, because some client settings load code.

Secrets stay inside `Settings` and out of its repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import refuse_unknown
from outboxkit.brokers._urls import ENCODE, read_url
from outboxkit.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from outboxkit.brokers import Credentials
    from outboxkit.brokers._urls import BrokerUrl

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
        "topic.metadata.refresh.interval.ms",
    },
)
_PUBLISHER: Final = frozenset({"compression.level", "compression.type", "linger.ms"})
_SUBSCRIBER: Final = frozenset(
    {
        "auto.offset.reset",
        "fetch.max.bytes",
        "fetch.min.bytes",
        "fetch.wait.max.ms",
        "group.instance.id",
        "heartbeat.interval.ms",
        "isolation.level",
        "max.partition.fetch.bytes",
        "max.poll.interval.ms",
        "queued.max.messages.kbytes",
        "session.timeout.ms",
    },
)
_OURS: Final = frozenset({"partitions", "prefetch_bytes", "replication"})
_PREFETCH_BYTES: Final = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Addresses and settings of the clients.

    Attributes:
        address: the bootstrap servers, for people and error texts.
        common: librdkafka settings of both sides.
        publisher: further settings of a producer.
        subscriber: further settings of a consumer.
        credentials: gives the login or the token of each new client, instead of the URL's.
        prefetch_bytes: bytes of payload that one receive returns at most, but one message; the client keeps as many
            behind it.
        partitions: how many a created topic gets.
        replication: of a created topic, -1 is the broker's default.
    """

    address: str
    common: Mapping[str, str] = field(repr=False)
    publisher: Mapping[str, str] = field(repr=False)
    subscriber: Mapping[str, str] = field(repr=False)
    credentials: Credentials | None = field(repr=False)
    prefetch_bytes: int
    partitions: int
    replication: int


def parse(url: str, options: Mapping[str, str], credentials: Credentials | None = None) -> Settings:
    """Reads the settings that a URL and options ask for; options win over the query of the URL.

    Raises:
        ConfigurationError: unparsable URL, or a setting that is not on the allow-list.
    """
    read = read_url(url, "kafka://host:9092 or kafka+ssl://user:password@host:9093")
    if read.path.strip("/"):
        raise ConfigurationError(f"the broker URL {read.scheme}://… has a path, which Kafka has not: {ENCODE}")
    wanted = {**read.query, **options}
    refuse_unknown(wanted, _COMMON | _PUBLISHER | _SUBSCRIBER | _OURS, "kafka")
    address = ",".join(host if _has_port(host) else f"{host}:{_DEFAULT_PORT}" for host in read.hosts)
    chosen = {name: value for name, value in wanted.items() if name in _COMMON}
    prefetch_bytes = _number(wanted, "prefetch_bytes", _PREFETCH_BYTES)
    return Settings(
        address=address,
        common={"bootstrap.servers": address, **_security(read, logs_in=credentials is not None), **chosen},
        publisher={name: value for name, value in wanted.items() if name in _PUBLISHER},
        subscriber={name: value for name, value in wanted.items() if name in _SUBSCRIBER},
        credentials=credentials,
        prefetch_bytes=prefetch_bytes,
        partitions=_number(wanted, "partitions", 6),
        replication=_number(wanted, "replication", -1),
    )


def _has_port(host: str) -> bool:
    return host == EMBEDDED or host.rpartition(":")[2].isdigit()


def _security(read: BrokerUrl, *, logs_in: bool) -> dict[str, str]:
    if not read.login and logs_in:
        return {"security.protocol": "SASL_SSL"}
    if not read.login:
        return {"security.protocol": "SSL"} if read.scheme.endswith("+ssl") else {}
    user, password = (*read.login, "")[:2]
    return {
        "security.protocol": "SASL_SSL",  # never credentials in clear text, unless an option says so
        "sasl.mechanism": "PLAIN",
        "sasl.username": user,
        "sasl.password": password,
    }


def _number(wanted: Mapping[str, str], name: str, default: int) -> int:
    text = wanted.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise ConfigurationError(f"the kafka option {name} must be a whole number, got {text!r}") from error
