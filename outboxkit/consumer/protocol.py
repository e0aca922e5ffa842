"""Values between the consumer's core and its shell: jobs, facts and commands. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from outboxkit.policy import Failure, Followers, RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from outboxkit.brokers import Delivery

__all__ = [
    "MAX_DEATHS",
    "Append",
    "Attempt",
    "Bury",
    "Command",
    "ConsumerPolicy",
    "Drop",
    "Failed",
    "Hold",
    "Job",
    "OrderingKey",
    "Seen",
    "Standing",
    "Store",
    "WhileWaiting",
]

OrderingKey = tuple[str, bytes | None]  #: (topic, key)

MAX_DEATHS: Final = 3  #: processes that a message may take with it before it is buried


class WhileWaiting(StrEnum):
    """Treatment of the later messages of a key while one of them waits for its next try."""

    BLOCK = "block"  #: they wait behind it
    SKIP = "skip"  #: they go on: the key's order is given up for those that fail


class Standing(StrEnum):
    """Facts from a delivery's headers."""

    WANTED = "wanted"
    IGNORED = "ignored"  #: of another type, or a replay for another consumer
    EXPIRED = "expired"  #: its time is over, and the consumer skips such messages
    UNREADABLE = "unreadable"  #: it cannot be handled: `Job.fault` says why


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A failed attempt.

    Attributes:
        failure: what kind of failure it is.
        delay: how long to wait, when the handler has asked for a time.
        is_free: whether it spends no try: the handler asked for later.
        cause: the shell's own; the core does not look at it.
    """

    failure: Failure
    delay: timedelta | None = None
    is_free: bool = False
    cause: object = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Job:
    """One delivery to settle.

    Attributes:
        delivery: as the broker handed it out, now or before it waited.
        identity: its name in the crash marker.
        lane: its ordering key; None when nothing must keep its order.
        standing: whether it is wanted.
        fault: why it is unreadable.
        room_id: its row in the waiting room; None for a fresh delivery.
        spent: attempts that it has had before.
        first_failed_at: when the first of them failed.
        shares: whether it may share a transaction with others; replays do not.
        subject: the shell's own (message and handler); the core does not look at it.
    """

    delivery: Delivery
    identity: str
    lane: OrderingKey | None = None
    standing: Standing = Standing.WANTED
    fault: Failed | None = None
    room_id: int | None = None
    spent: int = 0
    first_failed_at: datetime | None = None
    shares: bool = True
    subject: object = None

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return len(self.delivery.payload or b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerPolicy:
    """Rules by which a consumer decides.

    Attributes:
        retry: when a failed message is tried again, and how often.
        on_dead: what happens to the later messages of a key when one dies.
        while_waiting: what happens to them while one waits.
        concurrency: how many attempts run at once.
        batch: how many messages share a transaction as long as all goes well.
        patience: how old a message may become that asks for later again and again.
    """

    retry: RetryPolicy
    on_dead: Followers = Followers.SKIP
    while_waiting: WhileWaiting = WhileWaiting.BLOCK
    concurrency: int = 16
    batch: int = 1
    patience: timedelta = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Facts from the database when deliveries were admitted.

    Attributes:
        suspects: deaths by identity, of what vanished processes were handling.
        waiting: keys that have rows in the waiting room.
    """

    suspects: Mapping[str, int]
    waiting: Collection[OrderingKey] = ()


# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """Handle these jobs in one transaction; ``alone`` means under a crash marker of its own."""

    jobs: tuple[Job, ...]
    number: int
    alone: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Hold:
    """Let a job wait for its next try, and its followers behind it, in one transaction."""

    job: Job
    delay: timedelta
    attempts: int
    failed: Failed
    followers: tuple[Job, ...] = ()

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All that it settles."""
        return (self.job, *self.followers)


@dataclass(frozen=True, slots=True, eq=False)
class Append:
    """Let jobs wait behind what waits of their key already."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Bury:
    """Make a job a dead letter; ``parks`` keeps its key stopped, with these followers.

    ``reduced`` means: the letter could not be stored as it is, store what can be kept.
    """

    job: Job
    failed: Failed
    attempts: int
    parks: bool = False
    followers: tuple[Job, ...] = ()
    reduced: bool = False

    @property
    def jobs(self) -> tuple[Job, ...]:
        """All that it settles."""
        return (self.job, *self.followers)


@dataclass(frozen=True, slots=True, eq=False)
class Drop:
    """Take a job out of the waiting room that nobody wants any more."""

    jobs: tuple[Job, ...]


Store = Hold | Append | Bury | Drop  #: what writes down what becomes of a job
Command = Attempt | Store
