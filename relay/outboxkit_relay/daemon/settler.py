"""The settler's work, on a thread of its own: commits the outcome of messages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final

from outboxkit import dead_letters, outbox
from outboxkit._failpoints import failpoint
from outboxkit.policy import Followers
from outboxkit_relay.core.protocol import Settled
from outboxkit_relay.daemon.membership import Membership
from outboxkit_relay.store import stopped_keys

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.core.protocol import Burial, Event, Settle

__all__ = ["Settler"]

_MERGED: Final = 4  # settlements in one transaction, at most


class Settler:
    """Carries out settlements.

    Args:
        take: gives the next settlements that wait, as long as they fit.
        shards: the shards that the relay owns now.

    Attributes:
        member: under which lease it works; set when the relay joins.
    """

    def __init__(
        self, take: Callable[[int, Callable[[Settle], bool]], list[Settle]], shards: Callable[[], Collection[int]]
    ) -> None:
        self.member = Membership.none()
        self._take, self._shards = take, shards

    def settle(self, connection: Connection, first: Settle) -> list[Event]:
        """Commits a settlement, and with it those that wait behind it and need no fence either.

        Transaction: its own.
        """
        together = [first]
        if not first.needs_fence:
            together += self._take(_MERGED - 1, lambda other: not other.needs_fence)
        stopped = None
        with connection.begin():
            if first.needs_fence:
                outbox.fence(connection, self.member.id)
            evidence = [evidence for settlement in together for evidence in settlement.evidence]
            outbox.remove(connection, self.member.id, evidence)
            if first.needs_fence:
                _settle_troubled(connection, first)
                stopped = stopped_keys.stopped_in(connection, self._shards())
            failpoint("settle.before_commit")
        failpoint("settle.after_commit")
        return [Settled(settlement, stopped) for settlement in together]


def _settle_troubled(connection: Connection, settlement: Settle) -> None:
    stopped_keys.append_followers(connection, settlement.to_waiting)
    for failed in settlement.failed:
        stopped_keys.stop_key(connection, failed)
    for burial in settlement.buried:
        _bury(connection, burial)
    stopped_keys.resume_key(connection, settlement.freed)


def _bury(connection: Connection, burial: Burial) -> None:
    row = burial.row
    failpoint("dead.before_insert")
    dead_letters.bury(connection, dead_letters.of_row(row, burial.failure, burial.text, burial.attempts))
    failpoint("dead.after_insert")
    if burial.fate is Followers.PARK:
        stopped_keys.park(connection, row, burial.followers)
    else:
        stopped_keys.remove_dead(connection, row)
        if row.key is not None:
            stopped_keys.resume_key(connection, [(row.topic, row.key)])
