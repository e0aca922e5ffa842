"""Events and commands: how the relay's core and its shell talk. Events go in, commands come out. Pure values.

One event or command stands for a batch or a page, never for a message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING

from outboxkit.brokers import Batch, Receipts
from outboxkit.policy import Failure, Followers
from outboxkit.rows import NOTHING_PAUSED, Page, PauseSet, Reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from outboxkit.rows import Evidence, Row

__all__ = [
    "Answered",
    "Burial",
    "Command",
    "ConfirmLease",
    "Event",
    "FailedHead",
    "Fenced",
    "Fetch",
    "Fetched",
    "GiveUp",
    "LeaseConfirmed",
    "Leave",
    "Owned",
    "Publish",
    "Rebalance",
    "Rejoin",
    "Rescan",
    "RescanResult",
    "Settle",
    "Settled",
    "StopRelay",
    "StoppedKey",
    "Tick",
    "Woken",
]

StoppedKey = tuple[str, bytes]  #: (topic, key)

# --- events ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Owned:
    """The relay holds a lease.

    Attributes:
        shards: that it owns.
        has_surplus: it should give some back.
        stopped: the keys of these shards that are stopped.
        paused: what operators have paused.
        work_elsewhere: (once) something is unpublished elsewhere, or waits for its next try.
    """

    shards: frozenset[int]
    has_surplus: bool
    stopped: frozenset[StoppedKey]
    paused: PauseSet = NOTHING_PAUSED
    work_elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Fetched:
    """A page was read.

    Attributes:
        lane: its name.
        page: the rows, under a confirmed lease.
        due: rows of the waiting room that may go out now.
        until: until when the lease is safe; None when nothing was read.
        flaws: reasons why rows among these can never be sent, by position.
    """

    lane: str
    page: Page
    due: Sequence[Row]
    until: datetime | None
    flaws: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LeaseConfirmed:
    """The lease is safe until an instant."""

    until: datetime


@dataclass(frozen=True, slots=True)
class RescanResult:
    """A rescan has ended.

    Attributes:
        rows: present, although the lanes' memory says that they were read; under a confirmed lease.
        until: until when the lease is safe; None when nothing was found.
        flaws: reasons why rows among these can never be sent, by position.
    """

    rows: Sequence[Row]
    until: datetime | None
    flaws: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answered:
    """A batch has its receipts."""

    number: int
    receipts: Receipts


@dataclass(frozen=True, slots=True)
class Settled:
    """A settlement is committed.

    Attributes:
        settlement: what was asked.
        stopped: the keys that are stopped now; None when that did not change.
        left: fresh rows of it that could not be moved, and are still where they were.
    """

    settlement: Settle
    stopped: frozenset[StoppedKey] | None
    left: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Fenced:
    """The lease, or the server session of the reader, is lost."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class StopRelay:
    """An operator asks the relay to finish what is in flight, until an instant, and to leave."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Woken:
    """A writer has committed messages: it is worth a look."""


Event = Owned | Fetched | LeaseConfirmed | RescanResult | Answered | Settled | Fenced | Tick | StopRelay | Woken

# --- commands ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a page of a lane and confirm the lease; look into the waiting room, too.

    Attributes:
        lane: its name.
        reading: the page.
        without: topics of which nothing is due.
        look: whether to look into the waiting room.
        paused: what is not due, either.
    """

    lane: str
    reading: Reading
    without: frozenset[str]
    look: bool
    paused: PauseSet = NOTHING_PAUSED


@dataclass(frozen=True, slots=True)
class ConfirmLease:
    """Confirm the lease."""


@dataclass(frozen=True, slots=True)
class Rescan:
    """Look for rows that a lane should have delivered."""

    reading: Reading


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Renew the lease and take free shards; give surplus ones back only if ``release`` is True."""

    release: bool


@dataclass(frozen=True, slots=True)
class Publish:
    """Hand a batch to the broker; its receipts come back under this number."""

    number: int
    batch: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedHead:
    """A head that failed and waits for its next try, with the followers that must wait behind it.

    Attributes:
        row: the head.
        failure: its class.
        text: what went wrong.
        attempts: tries so far.
        delay: time until the next one.
        followers: later rows of its key that were read, but not acknowledged.
    """

    row: Row
    failure: str
    text: str
    attempts: int
    delay: timedelta
    followers: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Burial:
    """A head that becomes a dead letter.

    Attributes:
        row: the head.
        failure: its class.
        text: what went wrong.
        attempts: tries so far.
        fate: of its followers.
        followers: later rows of its key that were read, but not acknowledged.
    """

    row: Row
    failure: Failure
    text: str
    attempts: int
    fate: Followers
    followers: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Commit the outcome of rows.

    Attributes:
        evidence: acknowledged and expired rows: they are removed, the ledger keeps the proof.
        failed: heads that wait for their next try.
        buried: heads that are dead.
        to_waiting: fresh rows of stopped keys, which go to the waiting room.
        freed: stopped keys whose head went out: their next follower is due.
    """

    evidence: tuple[Evidence, ...] = ()
    failed: tuple[FailedHead, ...] = ()
    buried: tuple[Burial, ...] = ()
    to_waiting: tuple[Row, ...] = ()
    freed: tuple[StoppedKey, ...] = ()

    @property
    def needs_fence(self) -> bool:
        """Whether anything but the removal of published rows changes."""
        return bool(self.failed or self.buried or self.to_waiting or self.freed)

    def rows(self) -> Iterable[Row]:
        """Every row that leaves the relay's hands."""
        return chain(
            *(batch.rows for batch in self.evidence),
            *((failed.row, *failed.followers) for failed in self.failed),
            *((burial.row, *burial.followers) for burial in self.buried),
            self.to_waiting,
        )


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Reset the publisher of a broker: every batch in flight there gets its answer, unknown ones ``indeterminate``.

    Attributes:
        broker: its name; None: all of them.
    """

    broker: str | None = None


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Forget everything and join under a new token."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Give back shards and lease: the work is done."""


Command = Fetch | ConfirmLease | Rescan | Rebalance | Publish | Settle | GiveUp | Rejoin | Leave
