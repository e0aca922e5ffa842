"""Publishers: one for each broker, supervised; a destination finds its own by the routing.

The dispatcher never waits here. A reset runs beside it, and what is published to that broker meanwhile follows when it
is done. So one broker's trouble takes no time from the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final

from outboxkit.errors import OutboxKitError
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from outboxkit.brokers import Batch, Publisher, Receipts

__all__ = ["Publishers", "SupervisedPublisher"]

_log: Final = logging.getLogger(__name__)

_ENDS: Final = 3  # within …
_WITHIN: Final = 60.0  # … seconds: then it is no accident any more
_LONGEST_RESET: Final = 30.0  # seconds that a stop waits for one


class SupervisedPublisher:
    """A publisher that is opened again when its thread has ended, or when its login has changed.

    Args:
        broker: its name, empty for the default one.
        open_: opens a publisher; called again for each new one.
        address: tells what a new one would log in with; another answer than before is worth a new publisher.
    """

    def __init__(self, broker: str, open_: Callable[[], Publisher], address: Callable[[], str] = str) -> None:
        self.broker = broker
        self._open, self._address = open_, address
        self._opened_with = address()
        self._inner = open_()
        self._lock = threading.Lock()
        self._resetting: threading.Thread | None = None  # guarded by the lock, as is …
        self._deferred: deque[tuple[Batch, Future[Receipts]]] = deque()
        self._refused_login = False
        self._ends: deque[float] = deque(maxlen=_ENDS)

    @property
    def inner(self) -> Publisher:
        """The publisher of now."""
        return self._inner

    def publish(self, batch: Batch) -> Future[Receipts]:
        """Hands a batch over, or keeps it until a reset that is under way is done."""
        with self._lock:
            if self._resetting is not None:
                later: Future[Receipts] = Future()
                self._deferred.append((batch, later))
                return later
        return self._hand_over(batch)

    def reset(self) -> None:
        """Begins a reset, unless one is under way. Returns at once; every future in flight ends soon."""
        with self._lock:
            if self._resetting is None:
                name = f"outboxkit-reset-{self.broker or 'broker'}"
                self._resetting = threading.Thread(target=self._reset, name=name, daemon=True)
                self._resetting.start()

    def look(self) -> None:
        """Looks whether the publisher still works; to be called now and then.

        Raises:
            OutboxKitError: it has ended again and again: that is a defect, and a new process may be luckier.
        """
        if self._inner.has_ended:
            self._note_end()
            self.reset()
        elif self._refused_login:
            self._refused_login = False
            if self._address() != self._opened_with:
                _log.info("publisher.new_login", extra={"broker": self.broker})
                self.reset()

    def close(self) -> None:
        """Ends the session. Idempotent."""
        thread = self._resetting
        if thread is not None:
            thread.join(_LONGEST_RESET)
        self._inner.close()

    def _hand_over(self, batch: Batch) -> Future[Receipts]:
        answer = self._inner.publish(batch)
        answer.add_done_callback(self._note_answer)
        return answer

    def _note_answer(self, answer: Future[Receipts]) -> None:
        if any(refusal.failure is Failure.UNAUTHORIZED for refusal in answer.result().refusals):
            self._refused_login = True

    def _note_end(self) -> None:
        if self._resetting is not None:
            return  # it is seen to already
        now = time.monotonic()
        self._ends.append(now)
        _log.error("publisher.ended", extra={"broker": self.broker, "ends": len(self._ends)})
        if len(self._ends) == _ENDS and now - self._ends[0] < _WITHIN:
            raise OutboxKitError(f"the publisher {self._inner!r} has ended {_ENDS} times within a minute")

    def _reset(self) -> None:
        try:
            address = self._address()
            if self._inner.has_ended or address != self._opened_with:
                self._inner.close()
                self._inner, self._opened_with = self._open(), address
            else:
                self._inner.reset()
        except Exception as error:  # noqa: BLE001  what waits must get an answer, whatever went wrong
            _log.error("publisher.reset_failed", extra={"broker": self.broker, "error": type(error).__name__})
        self._release()

    def _release(self) -> None:
        """Publishes what has waited, in order; only then new batches go their direct way."""
        while True:
            with self._lock:
                if not self._deferred:
                    self._resetting = None
                    return
                batch, later = self._deferred.popleft()
            _follow(self._hand_over(batch), later)


def _follow(answer: Future[Receipts], later: Future[Receipts]) -> None:
    answer.add_done_callback(lambda done: later.set_result(done.result()))


class Publishers:
    """All publishers of a relay.

    Args:
        publishers: by the broker's name, the default one first.

    Attributes:
        broker_of: tells the broker of a destination; every destination is on the default one until it is set.
    """

    def __init__(self, publishers: Mapping[str, SupervisedPublisher]) -> None:
        self._publishers = publishers
        self.default = next(iter(publishers.values()))
        self.broker_of: Callable[[str], str] = lambda _destination: self.default.broker

    @classmethod
    def of(cls, publisher: Publisher) -> Publishers:
        """The publishers of a relay with one broker."""
        return cls({"": SupervisedPublisher("", lambda: publisher)})

    def __iter__(self) -> Iterator[SupervisedPublisher]:
        return iter(self._publishers.values())

    def __getitem__(self, broker: str) -> SupervisedPublisher:
        return self._publishers[broker]

    def transport_of(self, destination: str) -> str:
        """The kind of broker that a destination is on."""
        return self[self.broker_of(destination)].inner.features.name

    def publish(self, batch: Batch) -> Future[Receipts]:
        """Hands a batch to the broker of its destination."""
        return self[self.broker_of(batch.destination)].publish(batch)

    def reset(self, broker: str | None = None) -> None:
        """Resets the publisher of a broker, or all of them. Returns at once."""
        for publisher in self:
            if broker is None or publisher.broker == broker:
                publisher.reset()

    def look(self) -> None:
        """Looks whether all of them still work; see `SupervisedPublisher.look`."""
        for publisher in self:
            publisher.look()

    def close(self) -> None:
        """Ends all sessions. Idempotent."""
        for publisher in self:
            publisher.close()
