"""Order, checked where it matters: whether the messages of each key take effect in the order of their ``ce_sequence``.

The relay promises that order; this is how a consumer can watch it. Pure, bounded, and of one process: what another one
has handled is not known, so nothing is said about it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from outboxkit.headers import REPLAY_FOR

if TYPE_CHECKING:
    from outboxkit.message import Message

__all__ = ["OrderCheck"]

_MAX_KEYS: Final = 100_000  # remembered, those that were handled last: some 20 MB


class OrderCheck:
    """Remembers the highest sequence of each key.

    Args:
        max_keys: keys to remember.
    """

    def __init__(self, max_keys: int = _MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._highest: OrderedDict[tuple[str, str, bytes], int] = OrderedDict()

    def handled(self, message: Message) -> int | None:
        """Takes in a message that has taken effect for the first time.

        Returns:
            The sequence of a later message of its key that has taken effect before; None when all is well. Nothing is
            said of messages without a key or a sequence, and of replays, which come late by nature.
        """
        if message.key is None or message.sequence is None or message.header(REPLAY_FOR) is not None:
            return None
        key = (message.source, message.topic, message.key)
        highest = self._highest.pop(key, message.sequence)
        self._highest[key] = max(highest, message.sequence)
        if len(self._highest) > self._max_keys:
            self._highest.popitem(last=False)
        return highest if highest > message.sequence else None
