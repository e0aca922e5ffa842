"""The book of what a publisher has taken over and not yet answered: batches by destination, one outcome per row.

Thread-safe where it says so; the outcomes of one batch belong to the thread that sends it.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from outboxkit.brokers import NO_PLACE, Receipts, Refusal
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from outboxkit.brokers import Batch

__all__ = ["InFlight", "OwnThread", "Pending", "unsendable"]

_MESSAGES_PER_DESTINATION: Final = 10_000  # a window of 8 batches of 1,000, and some
_BYTES: Final = 64 << 20  # bounds memory, whatever the size of the messages
_TEXT_LIMIT: Final = 300
_CLOSED: Final = "the publisher is closed"
_PAYLOAD: Final = attrgetter("payload")
_INDEX: Final = attrgetter("index")


class Pending:
    """A batch under way: collects one outcome per row, then resolves the future.

    Attributes:
        batch: the rows.
        future: ends when every row has its outcome.
        left: rows without an outcome.
        size: bytes of all payloads.
        sent: some of it may have reached the broker.
    """

    __slots__ = ("_is_settled", "_offsets", "_partitions", "_refusals", "batch", "future", "left", "sent", "size")

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.future: Future[Receipts] = Future()
        self.future.set_running_or_notify_cancel()  # from here on nobody can cancel it: the outcome is a fact
        self.left = len(batch.rows)
        self.size = sum(map(len, map(_PAYLOAD, batch.rows)))
        self.sent = False
        self._is_settled = bytearray(self.left)
        self._partitions = [NO_PLACE] * self.left
        self._offsets = [NO_PLACE] * self.left
        self._refusals: list[Refusal] = []

    def accept(self, index: int, partition: int = NO_PLACE, offset: int = NO_PLACE) -> None:
        """Notes that the broker has stored a row; a second outcome changes nothing."""
        if not self._is_settled[index]:
            self._is_settled[index] = 1
            self._partitions[index] = partition
            self._offsets[index] = offset
            self.left -= 1

    def refuse(self, index: int, failure: Failure, text: str) -> None:
        """Notes why a row was not stored; a second outcome changes nothing."""
        if not self._is_settled[index]:
            self._is_settled[index] = 1
            self._refusals.append(Refusal(index, failure, text[:_TEXT_LIMIT]))
            self.left -= 1

    def refuse_rest(self, failure: Failure, text: str) -> None:
        """Ends every row that has no outcome yet."""
        for index in range(len(self._is_settled)):
            self.refuse(index, failure, text)

    def has(self, failure: Failure) -> bool:
        """Whether a row was refused for this reason."""
        return any(refusal.failure is failure for refusal in self._refusals)

    def restate(self, failure: Failure, truth: Failure, text: str) -> None:
        """Corrects the reason of every row that was refused for another."""
        self._refusals = [Refusal(one.index, truth, text) if one.failure is failure else one for one in self._refusals]

    def resolve(self) -> None:
        """Ends the future."""
        refusals = tuple(sorted(self._refusals, key=_INDEX))
        self.future.set_result(Receipts(self._partitions, self._offsets, refusals))


class InFlight:
    """All batches that were handed over and have no answer yet. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, list[Pending]] = {}  # by destination, in order
        self._closed = False

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed

    def take(self, batch: Batch, hand_over: Callable[[Pending], None]) -> Future[Receipts]:
        """Notes a batch and hands it over, in one step; what a closed book is given is refused at once."""
        pending = Pending(batch)
        with self._lock:
            if not self._closed and batch.rows:
                self._open.setdefault(batch.destination, []).append(pending)
                hand_over(pending)
                return pending.future
        pending.refuse_rest(Failure.BROKER_DOWN, _CLOSED)
        pending.resolve()
        return pending.future

    def capacity(self, destination: str) -> int:
        """Returns the number of messages that a destination may take on top; bytes bound all destinations together."""
        with self._lock:
            mine = sum(pending.left for pending in self._open.get(destination, ()))
            size = sum(pending.size for batches in self._open.values() for pending in batches)
        return 0 if size >= _BYTES else max(0, _MESSAGES_PER_DESTINATION - mine)

    def close(self) -> None:
        """Takes nothing more."""
        with self._lock:
            self._closed = True

    def finish(self, pending: Pending) -> None:
        """Ends a batch whose rows all have their outcome; does nothing for any other, and for one that has ended."""
        if pending.left or pending.future.done():
            return
        with self._lock:
            batches = self._open[pending.batch.destination]
            batches.remove(pending)
            if not batches:
                del self._open[pending.batch.destination]
        pending.resolve()

    def refuse(self, pending: Pending, failure: Failure, text: str) -> None:
        """Ends a batch: what has no outcome yet is refused."""
        pending.refuse_rest(failure, text)
        self.finish(pending)

    def refuse_unsent(self, destination: str, failure: Failure, text: str) -> None:
        """Refuses all that waits for a destination: a later batch must not overtake the one that was refused."""
        with self._lock:
            waiting = [pending for pending in self._open.get(destination, ()) if not pending.sent]
        for pending in waiting:
            self.refuse(pending, failure, text)

    def refuse_all(self, text: str, destination: str | None = None) -> None:
        """Gives everything up, or all of one destination: what may have reached the broker is indeterminate."""
        with self._lock:
            chosen = self._open.values() if destination is None else [self._open.get(destination, [])]
            left = [pending for batches in chosen for pending in batches]
        for pending in left:
            self.refuse(pending, Failure.INDETERMINATE if pending.sent else Failure.BROKER_DOWN, text)


def unsendable(error: Exception) -> str:
    """Words for a row that cannot be put on the wire at all; never with its content."""
    return f"the row cannot be sent: its headers are not packed as outboxkit packs them ({type(error).__name__})"


class OwnThread:
    """A publisher with a thread of its own, which ends with the publisher, or before it by a defect."""

    _thread: threading.Thread | None

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended."""
        return self._thread is not None and not self._thread.is_alive()
