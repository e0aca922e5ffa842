"""Membership: the lease of one start of a relay, and a clock that follows the database's."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Self
from uuid import UUID, uuid4

from outboxkit.errors import LeaseLost
from outboxkit_relay.store import leases

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = ["Membership"]


@dataclass(frozen=True, slots=True)
class Membership:
    """One lease.

    Attributes:
        id: the fencing token of this start.
        now: the database's clock, carried on by a monotonic one: no step of the local clock can hurt.
    """

    id: UUID
    now: Callable[[], datetime]

    @classmethod
    def none(cls) -> Self:
        """The membership of a relay that has not joined yet: it has no clock."""
        return cls(uuid4(), _no_clock)

    @classmethod
    def register(cls, connection: Connection, *, version: str, lease: timedelta, routing: str) -> Self:
        """Enters the table of relays under a new token.

        Transaction: the caller's.
        """
        token = uuid4()
        at = leases.register(
            connection, token, host=socket.gethostname(), version=version, lease=lease, routing=routing
        )
        began = time.monotonic()
        return cls(token, lambda: at + timedelta(seconds=time.monotonic() - began))


def _no_clock() -> datetime:
    raise LeaseLost("the relay has not joined yet")
