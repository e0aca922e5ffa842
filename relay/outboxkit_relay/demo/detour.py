"""A detour: a way to somebody's broker that can be closed for a moment. Who takes it has an outage; nobody else has.

Bytes go through as they are, with one exception. A Kafka cluster tells its clients the addresses of its brokers, and
they would go there directly, so the addresses in its answers are replaced by ways through here.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Detour", "Named", "is_possible", "renamed"]

_HERE: Final = "127.0.0.1"
_METADATA: Final = 3  # Kafka's number of the request whose answer names brokers
_FLEXIBLE: Final = 9  # its version from which on sizes are variable, and tags may follow
_THROTTLED: Final = 3  # its version from which on the answer begins with a throttle time
_CHUNK: Final = 65_536
_ANSWER_SECONDS: Final = 10.0
_PORTS: Final = {"kafka": 9092, "amqp": 5672, "rabbitmq": 5672}

Address = tuple[str, int]


def is_possible(url: str) -> bool:
    """Whether the connection can be read on its way: one with TLS cannot, and its certificate names another host."""
    parts = urlsplit(url)
    encrypted = (
        "@" in parts.netloc and parts.scheme == "kafka"
    )  # credentials go over TLS only, unless an option says so
    return parts.scheme in _PORTS and not encrypted and "security.protocol" not in parts.query


class Detour:
    """A way to the broker of a URL; open at first.

    Attributes:
        url: for who takes it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._is_kafka = parts.scheme == "kafka"
        self._open = True
        self._ways: dict[Address, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="detour", daemon=True)
        self._thread.start()
        login, at, hosts = parts.netloc.rpartition("@")
        port = self._do(self._way(_address(hosts.partition(",")[0], _PORTS[parts.scheme])))
        self.url = urlunsplit(parts._replace(netloc=f"{login}{at}{_HERE}:{port}"))

    def close(self) -> None:
        """Every connection breaks, and none is made any more."""
        self._do(self._cut())

    def open(self) -> None:
        """It is a way again."""
        self._open = True

    def end(self) -> None:
        """Takes it down."""
        self._do(self._cut())
        self._do(self._stop_listening())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_SECONDS)
        self._loop.close()

    def _do(self, work: Awaitable[int]) -> int:
        async def done() -> int:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(_ANSWER_SECONDS)

    async def _way(self, target: Address) -> int:
        """The port here that leads there."""
        if target not in self._ways:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._serve(reader, writer, target)

            server = await asyncio.start_server(serve, _HERE, 0)
            self._servers.append(server)
            self._ways[target] = server.sockets[0].getsockname()[1]
        return self._ways[target]

    async def _cut(self) -> int:
        self._open = False
        for writer in self._writers:
            writer.transport.abort()
        return len(self._writers)

    async def _stop_listening(self) -> int:
        for server in self._servers:
            server.close()
            await server.wait_closed()
        return len(self._servers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Address) -> None:
        """One connection, until either side ends it."""
        ends = [writer]
        self._writers.add(writer)
        try:
            if self._open:
                back, forth = await asyncio.open_connection(*target)
                ends.append(forth)
                self._writers.add(forth)
                await self._carry(reader, writer, back, forth)
        except OSError:
            pass  # to its client it looks like what it is: the broker cannot be reached
        finally:
            for end in ends:
                end.transport.abort()
                self._writers.discard(end)

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        forth: asyncio.StreamWriter,
    ) -> None:
        if self._is_kafka:
            asked: dict[int, int] = {}
            ways = [_frames(reader, forth, _noting(asked)), _frames(back, writer, self._answering(asked))]
        else:
            ways = [_bytes(reader, forth), _bytes(back, writer)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        _, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for other in others:
            other.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _answering(self, asked: dict[int, int]) -> Callable[[bytes], Awaitable[bytes]]:
        async def answer(frame: bytes) -> bytes:
            version = asked.pop(int.from_bytes(frame[:4], "big", signed=True), None)
            if version is None:
                return frame
            ways = {broker: (_HERE, await self._way(broker)) for broker in Named(frame, version).addresses}
            return renamed(frame, version, ways)

        return answer


def _address(host: str, default: int) -> Address:
    parts = urlsplit(f"//{host}")
    return parts.hostname or _HERE, parts.port or default


async def _bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()


async def _frames(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, translate: Callable[[bytes], Awaitable[bytes]]
) -> None:
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            frame = await translate(await reader.readexactly(size))
            writer.write(len(frame).to_bytes(4, "big") + frame)
            await writer.drain()


def _noting(asked: dict[int, int]) -> Callable[[bytes], Awaitable[bytes]]:
    async def note(frame: bytes) -> bytes:
        kind, version, correlation = struct.unpack_from(">hhi", frame)
        if kind == _METADATA:
            asked[correlation] = version
        return frame

    return note


# --- the beginning of Kafka's answer to Metadata -----------------------------------------------------------------


class Named:
    """The brokers that an answer names, and where in the frame it does.

    Attributes:
        addresses: of the brokers.
        places: where each address begins and ends: host and port.
    """

    def __init__(self, frame: bytes, version: int) -> None:
        self._frame, self._at, self._flexible = frame, 4, version >= _FLEXIBLE
        if self._flexible:
            self._skip_tags()  # of the header
        if version >= _THROTTLED:
            self._at += 4
        self.addresses: list[Address] = []
        self.places: list[tuple[int, int]] = []
        for _ in range(self._size(4)):
            self._at += 4  # its number
            begin, host = self._at, self._text()
            (port,) = struct.unpack_from(">i", frame, self._at)
            self._at += 4
            self.addresses.append((host, port))
            self.places.append((begin, self._at))
            if version >= 1:
                self._text()  # its rack
            if self._flexible:
                self._skip_tags()

    def _size(self, width: int) -> int:
        """A length: of this many bytes, or variable and one more than it is, so that 0 can mean nothing."""
        if self._flexible:
            return self._number() - 1
        self._at += width
        return int.from_bytes(self._frame[self._at - width : self._at], "big", signed=True)

    def _number(self) -> int:
        value = shift = 0
        while True:
            byte = self._frame[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:  # noqa: PLR2004  the protocol's mark for "more follows"
                return value

    def _text(self) -> str:
        size = max(0, self._size(2))
        self._at += size
        return self._frame[self._at - size : self._at].decode()

    def _skip_tags(self) -> None:
        for _ in range(self._number()):
            self._number()
            size = self._number()
            self._at += size


def renamed(frame: bytes, version: int, ways: dict[Address, Address]) -> bytes:
    """The answer with other addresses for its brokers."""
    named = Named(frame, version)
    parts, end = [], 0
    for broker, (begin, after) in zip(named.addresses, named.places, strict=True):
        host, port = ways[broker]
        size = bytes([len(host) + 1]) if version >= _FLEXIBLE else len(host).to_bytes(2, "big")
        parts += [frame[end:begin], size, host.encode(), port.to_bytes(4, "big")]
        end = after
    return b"".join([*parts, frame[end:]])
