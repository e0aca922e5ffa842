"""A client of RabbitMQ that writes whatever it is given."""

from __future__ import annotations

import socket
import struct
from urllib.parse import urlsplit

__all__ = ["RawClient", "frame", "short", "sized"]


def frame(kind: int, channel: int, body: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(body)) + body + b"\xce"


def short(text: str) -> bytes:
    return bytes((len(text),)) + text.encode()


def sized(tag: bytes, value: bytes) -> bytes:
    return tag + struct.pack(">I", len(value)) + value


class RawClient:
    """A client that writes whatever it is given: no library of ours or others checks it."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        self._socket = socket.create_connection((target.hostname, target.port or 5672), 10)
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._answer()
        login = f"\0{target.username}\0{target.password}".encode()
        self._socket.sendall(
            frame(1, 0, struct.pack(">HHI", 10, 11, 0) + short("PLAIN") + sized(b"", login) + short("C"))
        )
        self._answer()
        self._socket.sendall(frame(1, 0, struct.pack(">HHHIH", 10, 31, 7, 131_072, 0)))
        self._socket.sendall(frame(1, 0, struct.pack(">HH", 10, 40) + short("/") + short("") + b"\0"))
        self._answer()
        self._socket.sendall(frame(1, 1, struct.pack(">HH", 20, 10) + short("")))
        self._answer()
        self._socket.sendall(frame(1, 1, struct.pack(">HH", 85, 10) + b"\0"))
        self._answer()

    def publish(self, exchange: str, body: bytes, properties: bytes, routing_key: str = "any") -> None:
        """Publishes with these flags and values; returns when the broker has confirmed it."""
        method = struct.pack(">HHH", 60, 40, 0) + short(exchange) + short(routing_key) + b"\0"
        header = struct.pack(">HHQ", 60, 0, len(body)) + properties
        self._socket.sendall(frame(1, 1, method) + frame(2, 1, header) + (frame(3, 1, body) if body else b""))
        answer = self._answer()
        assert answer[:4] == struct.pack(">HH", 60, 80), answer

    def close(self) -> None:
        self._socket.close()

    def _answer(self) -> bytes:
        head = self._exactly(7)
        body = self._exactly(struct.unpack(">BHI", head)[2] + 1)
        return body[:-1]

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data))
            assert more, "the broker hung up"
            data += more
        return data
