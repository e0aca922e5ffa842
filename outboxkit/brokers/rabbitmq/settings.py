"""From a URL and options to a connection. Secrets stay inside `Settings`: out of its repr and of every error text."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from aiormq.connection import Connection, FrameReceiver
from aiormq.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ConnectionClosed,
    ProbableAuthenticationError,
)
from pamqp import commands
from pamqp.base import Frame
from pamqp.frame import FrameTypes, marshal

from outboxkit.brokers import Features, redacted, refuse_unknown
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure, Order

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FEATURES", "TROUBLE", "ChannelError", "Settings", "connect", "parse", "trouble_of"]

# RabbitMQ 4 takes 16 MiB by default (max_message_size), older ones 128 MiB.
FEATURES: Final = Features(name="rabbitmq", order=Order.STRICT, evidence=False, max_message_bytes=16 << 20)

# What a failed question to the broker means; the first class that fits.
_FAILURES: Final[Mapping[type[BaseException], Failure]] = {
    AuthenticationError: Failure.UNAUTHORIZED,
    ProbableAuthenticationError: Failure.UNAUTHORIZED,
    ChannelAccessRefused: Failure.UNAUTHORIZED,
    ChannelNotFoundEntity: Failure.UNKNOWN_TOPIC,
    AMQPConnectionError: Failure.BROKER_DOWN,
    AMQPError: Failure.BROKER_DOWN,
    OSError: Failure.BROKER_DOWN,
    TimeoutError: Failure.BROKER_DOWN,
    RuntimeError: Failure.BROKER_DOWN,  # aiormq: the connection was closed meanwhile
}
TROUBLE: Final = (AMQPError, OSError, TimeoutError, RuntimeError)
_ACCESS_REFUSED: Final = 403
_NOT_ALLOWED: Final = 530  # AMQP: no such virtual host, or no access to it
_CONNECT_SECONDS: Final = 5.0

_CLIENT: Final = frozenset({"cadata", "cafile", "capath", "certfile", "heartbeat", "keyfile", "name", "no_verify_ssl"})
_OURS: Final = frozenset({"blocked_timeout", "confirm_timeout", "max_message_bytes"})


class ChannelError(Exception):
    """The broker did not do what was asked; says what that means."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where and how to connect.

    Attributes:
        address: the URL without secrets, for people and error texts.
        url: the URL for the client, with its secrets.
        confirm_seconds: a message that is not confirmed after this long is indeterminate.
        blocked_seconds: how long a blocked connection is waited for before anything is written.
        max_message_bytes: larger payloads are refused before they are sent.
    """

    address: str
    url: str = field(repr=False)
    confirm_seconds: float
    blocked_seconds: float
    max_message_bytes: int


def parse(url: str, options: Mapping[str, str]) -> Settings:
    """The settings that a URL and options ask for; options win over the query of the URL.

    Raises:
        ConfigurationError: unparsable URL, or a setting that is not on the allow-list.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigurationError(f"cannot read the broker URL {redacted(url)}") from error
    if not host:
        raise ConfigurationError(
            f"the broker URL {redacted(url)} names no host; expected amqp://user:password@host/vhost",
        )
    wanted = {**dict(parse_qsl(parts.query, keep_blank_values=True)), **options}
    refuse_unknown(wanted, _CLIENT | _OURS, "rabbitmq")
    # Ten seconds of heartbeat: a silent partition is found within half a minute.
    client = {"heartbeat": "10", **{name: value for name, value in wanted.items() if name in _CLIENT}}
    scheme = "amqp" if parts.scheme == "rabbitmq" else parts.scheme
    return Settings(
        address=redacted(url),
        url=urlunsplit((scheme, parts.netloc, parts.path, urlencode(client), "")),
        confirm_seconds=_number(wanted, "confirm_timeout", 30.0),
        blocked_seconds=_number(wanted, "blocked_timeout", 10.0),
        max_message_bytes=int(_number(wanted, "max_message_bytes", float(FEATURES.max_message_bytes or 0))),
    )


def _number(wanted: Mapping[str, str], name: str, default: float) -> float:
    text = wanted.get(name, str(default))
    try:
        return float(text)
    except ValueError as error:
        raise ConfigurationError(f"the rabbitmq option {name} must be a number, got {text!r}") from error


class _Connection(Connection):
    """The client's connection, with one repair: a broker that closes during the handshake is told by its reply code."""

    @staticmethod
    async def _rpc(
        request: Frame,
        writer: asyncio.StreamWriter,
        frame_receiver: FrameReceiver,
        wait_response: bool = True,  # noqa: FBT001, FBT002  the client's signature
    ) -> FrameTypes | None:
        if wait_response:
            writer.write(marshal(request, 0))
            await writer.drain()
            _, _, answer = await frame_receiver.get_frame()
            if isinstance(answer, commands.Connection.Close):
                raise _closed(answer)
            return answer
        return await Connection._rpc(request, writer, frame_receiver, wait_response=False)  # noqa: SLF001


def _closed(frame: commands.Connection.Close) -> AMQPConnectionError:
    refused = frame.reply_code == _ACCESS_REFUSED
    return (ProbableAuthenticationError if refused else ConnectionClosed)(frame.reply_code, frame.reply_text)


async def connect(settings: Settings) -> Connection:
    """An open connection.

    Raises:
        ChannelError: the broker is away (``broker-down``) or refused the login (``unauthorized``).
    """
    connection = _Connection(settings.url)
    try:
        await asyncio.wait_for(connection.connect(), _CONNECT_SECONDS)
    except TROUBLE as error:
        raise trouble_of(error, f"RabbitMQ at {settings.address}") from error
    return connection


def trouble_of(error: BaseException, what: str) -> ChannelError:
    """The meaning of an error of the client; its text is ours, because the client's may hold secrets."""
    failure = next(failure for kind, failure in _FAILURES.items() if isinstance(error, kind))
    if isinstance(error, ConnectionClosed) and error.args[:1] == (_NOT_ALLOWED,):
        failure = Failure.UNAUTHORIZED
    return ChannelError(failure, _TEXTS[failure].format(what=what))


_TEXTS: Final[Mapping[Failure, str]] = {
    Failure.UNAUTHORIZED: "{what} refused us: check user, password, virtual host, permissions and limits",
    Failure.UNKNOWN_TOPIC: "{what} does not exist; create it: outboxkit init --topology",
    Failure.BROKER_DOWN: "{what} is away",
}
