"""A proxy in front of somebody's broker, which can be cut for a moment: its clients have an outage, nobody else has.

Bytes go through as they are, with one exception. A Kafka cluster tells its clients the addresses of its brokers, and
they would go there directly, so the addresses in its answers are replaced by ports of the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit, urlunsplit

from outboxkit_relay.demo import kafka_metadata
from outboxkit_relay.demo.kafka_metadata import Address

__all__ = ["BrokerProxy", "is_possible"]

_HERE: Final = "127.0.0.1"
_CHUNK: Final = 65_536
_ANSWER_SECONDS: Final = 10.0
_PORTS: Final = {"kafka": 9092, "amqp": 5672, "rabbitmq": 5672}


def is_possible(url: str) -> bool:
    """True if the connection can be forwarded: one with TLS cannot, its certificate names another host."""
    parts = urlsplit(url)
    encrypted = "@" in parts.netloc and parts.scheme == "kafka"  # credentials go over TLS, unless an option says so
    return parts.scheme in _PORTS and not encrypted and "security.protocol" not in parts.query


class BrokerProxy:
    """Forwards connections to the broker of a URL, until it is cut.

    Attributes:
        url: the broker's URL through the proxy.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._is_kafka = parts.scheme == "kafka"
        self._open = True
        self._ports: dict[Address, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="broker-proxy", daemon=True)
        self._thread.start()
        login, at, hosts = parts.netloc.rpartition("@")
        port = self._do(self._port(_address(hosts.partition(",")[0], _PORTS[parts.scheme])))
        self.url = urlunsplit(parts._replace(netloc=f"{login}{at}{_HERE}:{port}"))

    def cut(self) -> None:
        """Breaks every connection, and accepts none."""
        self._do(self._cut())

    def restore(self) -> None:
        """Forwards connections again."""
        self._open = True

    def close(self) -> None:
        """Stops listening."""
        self._do(self._cut())
        self._do(self._stop_listening())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ANSWER_SECONDS)
        self._loop.close()

    def _do(self, work: Awaitable[int]) -> int:
        async def done() -> int:
            return await work

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(_ANSWER_SECONDS)

    async def _port(self, target: Address) -> int:
        """Returns the port that leads there."""
        if target not in self._ports:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await self._serve(reader, writer, target)

            server = await asyncio.start_server(serve, _HERE, 0)
            self._servers.append(server)
            self._ports[target] = server.sockets[0].getsockname()[1]
        return self._ports[target]

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
            ports = {
                broker: (_HERE, await self._port(broker))
                for broker in kafka_metadata.BrokerAddresses(frame, version).addresses
            }
            return kafka_metadata.with_addresses(frame, version, ports)

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
        if kind == kafka_metadata.METADATA:
            asked[correlation] = version
        return frame

    return note
