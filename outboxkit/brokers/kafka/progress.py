"""Progress of a consumer in one partition, and the handle by which a delivery finds it again. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from outboxkit.brokers import Delivery

__all__ = ["Progress", "Token", "place_of_delivery", "token_of"]


class Progress:
    """Keeps the offsets of one partition that are handed out, and the first one that is not settled.

    A lap is one pass over the offsets: after `rewind` they come again in a new lap, and a late acknowledgement of the
    old one counts no more.
    """

    __slots__ = ("_handed", "_lap", "_next")

    def __init__(self) -> None:
        self._handed: dict[int, int] = {}  # offset -> lap; ascending, because offsets come in order
        self._lap = 0
        self._next = -1  # after the highest offset handed out

    def hand_out(self, offset: int) -> int:
        """Notes a delivery; returns its lap."""
        self._handed[offset] = self._lap
        self._next = offset + 1
        return self._lap

    def settle(self, offset: int, lap: int) -> bool:
        """Notes an acknowledgement; False when it came too late to count."""
        if self._handed.get(offset) != lap:
            return False
        del self._handed[offset]
        return True

    @property
    def position(self) -> int:
        """The first offset that is not settled."""
        return next(iter(self._handed), self._next)

    def rewind(self, offset: int) -> None:
        """The partition is read again from this offset on."""
        self._handed = {handed: lap for handed, lap in self._handed.items() if handed < offset}
        self._next = offset
        self._lap += 1


class Token(NamedTuple):
    """The handle of a delivery: whose it is, and of which lap."""

    progress: Progress
    lap: int


def place_of_delivery(delivery: Delivery) -> tuple[tuple[str, int], int]:
    """The (topic, partition) and the offset of a delivery of ours."""
    return (delivery.topic, delivery.partition), delivery.offset  # type: ignore[return-value]  # set when it was made


def token_of(delivery: Delivery) -> Token:
    """The handle that was given to a delivery."""
    token: Token = delivery.token  # type: ignore[assignment]  # made with the delivery
    return token
