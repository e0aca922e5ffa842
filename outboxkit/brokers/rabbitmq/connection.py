"""Opens connections with aio-pika, and says what a failure means.

Of a received message the client library is shown one header only, the bytes of all properties: it ends the connection
over a value that it cannot decode, and the broker then hands the same message out again, for ever. `properties` reads
them instead. The seam for this is the library's own, its transport factory.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from aio_pika import Connection
from aio_pika.abc import ConnectionParameter
from aiormq.connection import TransportFactory
from aiormq.exceptions import (
    AMQPConnectionError,
    AMQPError,
    AuthenticationError,
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ProbableAuthenticationError,
)
from yarl import URL

from outboxkit.brokers.rabbitmq.properties import RAW_PROPERTIES
from outboxkit.errors import ConfigurationError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiormq.connection import Connection as AmqpConnection

    from outboxkit.brokers.rabbitmq.settings import Settings

__all__ = [
    "TROUBLE",
    "ChannelError",
    "Connection",
    "beneath",
    "close",
    "connect",
    "is_blocked",
    "is_open",
    "trouble_of",
    "until_ready",
]

TROUBLE: Final = (AMQPError, OSError, TimeoutError, RuntimeError)

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
_TEXTS: Final[Mapping[Failure, str]] = {
    Failure.UNAUTHORIZED: "{what} refused us: check user, password, virtual host, permissions and limits",
    Failure.UNKNOWN_TOPIC: "{what} does not exist; create it: outboxkit init --topology",
    Failure.BROKER_DOWN: "{what} is away",
}
_REFUSED: Final = frozenset({403, 530})  # AMQP: the login; the virtual host, which is missing or closed to us
_CUT_SHORT: Final = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)  # as when a broker stops
_CONNECT_SECONDS: Final = 5.0
_CLOSE_SECONDS: Final = 2.0
_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_FRAME_HEAD: Final = struct.Struct(">BHI")
_METHOD, _HEADER, _BODY, _HEARTBEAT = 1, 2, 3, 8
_FRAMES: Final = frozenset({_METHOD, _HEADER, _BODY, _HEARTBEAT})
_CLOSE: Final = struct.pack(">HH", 10, 50)  # connection.close
_CONTENT: Final = 12  # bytes of a content header before its flags: class, weight, size of the body
_TABLE_ONLY: Final = struct.pack(">H", 1 << 13)
_RAW_NAME: Final = bytes((len(RAW_PROPERTIES),)) + RAW_PROPERTIES.encode() + b"x"


class ChannelError(Exception):
    """The broker did not do what was asked; says what that means."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


class _Connection(Connection):
    """The client's connection; its transport may be given."""

    PARAMETERS = (
        *Connection.PARAMETERS,
        ConnectionParameter(name="transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )


class _Frames(asyncio.StreamReader):
    """The stream from the broker, frame by frame; shows the properties of messages as bytes.

    Attributes:
        close_code: the broker's reason to close the connection, 0 before it does.
        is_silent: nothing has come that RabbitMQ says.
    """

    def __init__(self) -> None:
        super().__init__()
        self.close_code = 0
        self.is_silent = True
        self._ready = b""

    async def readexactly(self, n: int) -> bytes:
        while len(self._ready) < n:
            self._ready += await self._next_frame()
        taken, self._ready = self._ready[:n], self._ready[n:]
        return taken

    def at_eof(self) -> bool:
        return not self._ready and super().at_eof()

    async def _next_frame(self) -> bytes:
        head = await super().readexactly(_FRAME_HEAD.size)
        kind, channel, size = _FRAME_HEAD.unpack(head)
        if kind not in _FRAMES:  # an answer in another version of the protocol, or in TLS
            return head
        self.is_silent = False
        rest = await super().readexactly(size + 1)
        if kind == _HEADER:
            return _shown(channel, rest)
        if kind == _METHOD and rest.startswith(_CLOSE):
            (self.close_code,) = struct.unpack_from(">H", rest, len(_CLOSE))
        return head + rest


def _shown(channel: int, rest: bytes) -> bytes:
    """A content header with one property, the header that keeps all of them."""
    raw = rest[_CONTENT:-1]
    table = _RAW_NAME + struct.pack(">I", len(raw)) + raw
    body = rest[:_CONTENT] + _TABLE_ONLY + struct.pack(">I", len(table)) + table
    return _FRAME_HEAD.pack(_HEADER, channel, len(body)) + body + rest[-1:]


class _Transport(TransportFactory):
    """Opens the stream to a broker, with or without TLS."""

    def __init__(self) -> None:
        self.frames: _Frames | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = await kwargs.pop("ssl_context_provider").get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        frames = _Frames()
        protocol = asyncio.StreamReaderProtocol(frames, loop=loop)
        kwargs.pop("ssl_context_provider", None)
        port = url.port or _PORTS[url.scheme]
        transport, _ = await loop.create_connection(lambda: protocol, url.host or "", port, ssl=secure, **kwargs)
        self.frames = frames
        return frames, asyncio.StreamWriter(transport, protocol, frames, loop)


async def connect(settings: Settings, rng: random.Random) -> Connection:
    """Opens a connection to the first node that answers, beginning with any.

    Raises:
        ChannelError: every node is away (``broker-down``), or one refused the login (``unauthorized``).
    """
    try:
        urls = settings.urls()
    except ConfigurationError as error:
        raise ChannelError(Failure.UNAUTHORIZED, error.message) from error
    trouble = ChannelError(Failure.BROKER_DOWN, "no node")
    for url in rng.sample(urls, len(urls)):
        transport = _Transport()
        connection = _Connection(URL(url, encoded=True), transport_factory=transport)
        try:
            await connection.connect(timeout=_CONNECT_SECONDS)
        except (*TROUBLE, EOFError) as error:
            await close(connection)
            trouble = _failed(error, transport.frames, settings)
            if trouble.failure is Failure.UNAUTHORIZED:
                break
        else:
            return connection
    raise trouble


def _failed(error: BaseException, frames: _Frames | None, settings: Settings) -> ChannelError:
    """Why a connection could not be opened."""
    what = f"RabbitMQ at {settings.address}"
    code, is_silent = (frames.close_code, frames.is_silent) if frames else (0, False)
    if isinstance(error, ssl.SSLCertVerificationError):
        text = f"{what} has a certificate that is not trusted: give the file of its authority (cafile)"
        return ChannelError(Failure.UNAUTHORIZED, text)
    if isinstance(error, ssl.SSLError) and not isinstance(error, _CUT_SHORT):
        return ChannelError(Failure.UNAUTHORIZED, f"{what} speaks no TLS there: use amqp://, or the port for TLS")
    if code in _REFUSED:
        return ChannelError(Failure.UNAUTHORIZED, _TEXTS[Failure.UNAUTHORIZED].format(what=what))
    if is_silent and not isinstance(error, TimeoutError):
        hint = "is it a RabbitMQ?" if settings.scheme == "amqps" else "is it a TLS port? then use amqps://"
        text = f"{what} ended the connection before it said anything ({hint})"
        return ChannelError(Failure.BROKER_DOWN, text)
    return trouble_of(error, what)


def trouble_of(error: BaseException, what: str) -> ChannelError:
    """The meaning of an error of the client; its text is ours, because the client's may hold secrets."""
    failure = next((failure for kind, failure in _FAILURES.items() if isinstance(error, kind)), Failure.BROKER_DOWN)
    return ChannelError(failure, _TEXTS[failure].format(what=what))


def beneath(connection: Connection) -> AmqpConnection:
    """Returns the connection under aio-pika's.

    Raises:
        ChannelError: there is none any more.
    """
    if connection.transport is None:
        raise ChannelError(Failure.BROKER_DOWN, "the connection is closed")
    amqp: AmqpConnection = connection.transport.connection  # type: ignore[assignment]  # the only class of it
    return amqp


def is_open(connection: Connection | None) -> bool:
    """Whether the connection works, as far as is known here: aio-pika's own word for it is about our closing only."""
    if connection is None or connection.transport is None:
        return False
    return not connection.transport.connection.is_closed


async def close(connection: Connection | None) -> None:
    """Ends a connection, also one that is lost; never raises."""
    if connection is not None:
        with suppress(*TROUBLE, asyncio.CancelledError):
            await asyncio.wait_for(connection.close(), _CLOSE_SECONDS)


async def until_ready(connection: Connection | None, limit: float) -> None:
    """Returns when the broker takes messages on this connection.

    Raises:
        ChannelError: it did not within so many seconds.
    """
    if await is_blocked(connection, limit):
        raise ChannelError(Failure.BLOCKED, f"RabbitMQ takes nothing since {limit:g} s (memory or disk alarm)")


async def is_blocked(connection: Connection | None, seconds: float) -> bool:
    """Whether an alarm keeps the broker from taking anything on this connection, for all of these seconds."""
    if connection is None or connection.transport is None or not is_open(connection):
        return False
    try:
        await asyncio.wait_for(connection.transport.ready(), seconds)
    except TimeoutError:
        return True
    return False
