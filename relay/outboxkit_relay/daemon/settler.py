"""The settler's work, on a thread of its own: commits the outcome of messages."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from outboxkit import dialects, outbox
from outboxkit._failpoints import failpoint
from outboxkit_relay.core.protocol import Settled
from outboxkit_relay.daemon.membership import Membership
from outboxkit_relay.store import burial, stopped_keys

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.rows import Row
    from outboxkit_relay.core.protocol import Event, Settle

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
        if first.needs_fence:
            return [self._settle_fenced(connection, first)]
        together = [first, *self._take(_MERGED - 1, lambda other: not other.needs_fence)]
        with connection.begin():
            evidence = [evidence for settlement in together for evidence in settlement.evidence]
            outbox.remove(connection, self.member.id, evidence)
            failpoint("settle.before_commit")
        failpoint("settle.after_commit")
        return [Settled(settlement, None) for settlement in together]

    def _settle_fenced(self, connection: Connection, settlement: Settle) -> Settled:
        """Commits what only the owner of the shards may change; a row that the database refuses hinders no other."""
        try:
            return self._in_one_go(connection, settlement, _settle_troubled)
        except DBAPIError as error:
            if not dialects.is_about_the_row(error):
                raise
            return self._in_one_go(connection, settlement, _settle_each)

    def _in_one_go(
        self, connection: Connection, settlement: Settle, verb: Callable[[Connection, Settle], list[Row]]
    ) -> Settled:
        with connection.begin():
            outbox.fence(connection, self.member.id)
            outbox.remove(connection, self.member.id, settlement.evidence)
            left = verb(connection, settlement)
            stopped = stopped_keys.stopped_in(connection, self._shards())
            failpoint("settle.before_commit")
        failpoint("settle.after_commit")
        return Settled(settlement, stopped, tuple(row for row in left if row.waiting_id is None))


def _settle_troubled(connection: Connection, settlement: Settle) -> list[Row]:
    stopped_keys.append_followers(connection, settlement.to_waiting)
    for failed in settlement.failed:
        stopped_keys.stop_key(connection, failed)
    for one in settlement.buried:
        burial.bury(connection, one)
    stopped_keys.resume_key(connection, settlement.freed)
    return []


def _settle_each(connection: Connection, settlement: Settle) -> list[Row]:
    """Settles row by row; returns followers that stay where they are, because their head could not stop their key."""
    left: list[Row] = []
    for row in settlement.to_waiting:
        _or_bury(connection, row, partial(stopped_keys.append_followers, connection, [row]))
    for failed in settlement.failed:
        if not _or_bury(connection, failed.row, partial(stopped_keys.stop_key, connection, failed)):
            left += failed.followers
    for one in settlement.buried:
        if not _or_bury(connection, one.row, partial(burial.bury, connection, one)):
            left += one.followers
    stopped_keys.resume_key(connection, settlement.freed)
    return left


def _or_bury(connection: Connection, row: Row, verb: Callable[[], None]) -> bool:
    """Does something with a row; when the database refuses its values, the row becomes a dead letter instead."""
    try:
        with connection.begin_nested():
            verb()
    except DBAPIError as error:
        if not dialects.is_about_the_row(error):
            raise
        burial.bury_in_place(connection, row, error)
        return False
    return True
