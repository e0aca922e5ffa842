"""The reader's work, on a thread of its own: pages, the waiting room, the lease."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from outboxkit import outbox
from outboxkit._failpoints import failpoint
from outboxkit.outbox import pauses
from outboxkit_relay.core import protocol
from outboxkit_relay.core.flaws import flaws_of
from outboxkit_relay.daemon.membership import Membership
from outboxkit_relay.store import due, leases, mending, operator_requests, reports, salvage, stopped_keys

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from outboxkit.rows import Row
    from outboxkit_relay.core.state import RelayConfig

__all__ = ["Reader"]

_MEND_EVERY: Final = 60.0  # seconds
_LEASE_MARGIN: Final = 0.8  # of what is left: clocks of two machines do not run at exactly one speed


class Reader:
    """Carries out what the core wants to know of the database.

    Args:
        engine: of the database, for transactions.
        config: of the relay.

    Attributes:
        member: under which lease it works; set when the relay joins.
    """

    def __init__(self, engine: Engine, config: RelayConfig) -> None:
        self.member = Membership.none()
        self._engine, self._config = engine, config
        self._mend_at = 0.0  # by the monotonic clock: a start looks at once
        self._verbs: Final[dict[type, Callable[[Connection, Any], protocol.Event]]] = {
            protocol.Fetch: self._fetch,
            protocol.ConfirmLease: self._confirm_lease,
            protocol.Rescan: self._rescan,
            protocol.Rebalance: self._rebalance,
        }

    def carry_out(self, connection: Connection, command: protocol.Command) -> protocol.Event:
        """Carries a command out, and returns what came of it.

        Transaction: the connection is in autocommit, and always the same session: a read is one statement with a
            snapshot of its own. What writes opens transactions of its own.
        """
        return self._verbs[type(command)](connection, command)

    def report(self, connection: Connection, told: str) -> list[protocol.Event]:
        """Writes beside the lease what people on other machines want to know.

        Transaction: its own.
        """
        reports.report(connection, self.member.id, told)
        return []  # nothing for the core

    def _fetch(self, connection: Connection, command: protocol.Fetch) -> protocol.Fetched:
        looks = command.look and due.is_due(connection)
        waited, unreadable = self._waiting_room(command) if looks else ([], {})
        page, more = salvage.page_of(connection, command.reading)
        flaws = flaws_of([*page.rows, *waited]) | unreadable | more
        return protocol.Fetched(command.lane, page, waited, self._confirmed(connection, page.rows or waited), flaws)

    def _rescan(self, connection: Connection, command: protocol.Rescan) -> protocol.RescanResult:
        page, unreadable = salvage.page_of(connection, command.reading)
        return protocol.RescanResult(
            page.rows, self._confirmed(connection, page.rows), flaws_of(page.rows) | unreadable
        )

    def _confirm_lease(self, connection: Connection, _command: protocol.ConfirmLease) -> protocol.LeaseConfirmed:
        return protocol.LeaseConfirmed(self._safe_until(connection))

    def _confirmed(self, connection: Connection, rows: list[Row]) -> datetime | None:
        return self._safe_until(connection) if rows else None

    def _safe_until(self, connection: Connection) -> datetime:
        asked = self.member.now()
        failpoint("claim.before_commit")
        left: timedelta = outbox.confirm_lease(connection, self.member.id)
        failpoint("claim.after_commit")
        return asked + left * _LEASE_MARGIN

    def _waiting_room(self, command: protocol.Fetch) -> tuple[list[Row], dict[int, str]]:
        reading = command.reading
        with self._engine.begin() as connection:
            outbox.fence(connection, self.member.id)
            due.enqueue_scheduled(connection, reading.shards, reading.limit)
            return due.due_rows(
                connection,
                reading.shards,
                without=command.without,
                limit=reading.limit,
                paused=command.paused,
                max_bytes=reading.max_bytes,
            )

    def _rebalance(self, _connection: Connection, command: protocol.Rebalance) -> protocol.Owned:
        failpoint("lease.renew")
        with self._engine.begin() as connection:
            leases.renew(connection, self.member.id, self._config.lease)
            shards, has_surplus = leases.balance(connection, self.member.id, release=command.release)
        # Statements after the take-over has committed: what the previous owner did is all visible.
        with self._engine.begin() as connection:
            outbox.fence(connection, self.member.id)
            operator_requests.carry_out_requests(connection, shards)
            if time.monotonic() >= self._mend_at:
                mending.mend(connection, shards)
                self._mend_at = time.monotonic() + _MEND_EVERY
            stopped, paused = stopped_keys.stopped_in(connection, shards), pauses.pause_set(connection)
            more = self._config.once and leases.is_anything_left(connection, shards, paused)
            return protocol.Owned(shards, has_surplus, stopped, paused, work_elsewhere=more)
