"""Progress of a consumer in one partition. Pure."""

from __future__ import annotations

__all__ = ["Progress"]


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
