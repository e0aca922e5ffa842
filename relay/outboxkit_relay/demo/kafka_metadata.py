"""The beginning of Kafka's answer to Metadata: the addresses of its brokers, and the same answer with others."""

from __future__ import annotations

import struct
from typing import Final

__all__ = ["METADATA", "Address", "BrokerAddresses", "with_addresses"]

METADATA: Final = 3  # Kafka's number of the request whose answer names brokers
_FLEXIBLE: Final = 9  # its version from which on sizes are variable, and tags may follow
_THROTTLED: Final = 3  # its version from which on the answer begins with a throttle time

Address = tuple[str, int]


class BrokerAddresses:
    """The addresses of brokers in an answer, and their places in the frame.

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


def with_addresses(frame: bytes, version: int, addresses: dict[Address, Address]) -> bytes:
    """Returns the answer with other addresses for its brokers."""
    named = BrokerAddresses(frame, version)
    parts, end = [], 0
    for broker, (begin, after) in zip(named.addresses, named.places, strict=True):
        host, port = addresses[broker]
        size = bytes([len(host) + 1]) if version >= _FLEXIBLE else len(host).to_bytes(2, "big")
        parts += [frame[end:begin], size, host.encode(), port.to_bytes(4, "big")]
        end = after
    return b"".join([*parts, frame[end:]])
