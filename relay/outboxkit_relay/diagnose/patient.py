"""Patient: what the checks of `outboxkit doctor` look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData

    from outboxkit.brokers import Subscription
    from outboxkit_relay.settings import Settings

__all__ = ["Patient", "Thresholds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From where on something counts as wrong.

    Attributes:
        transaction: age of a transaction that keeps vacuum from removing published rows.
        dead_rows: rows of the outbox that vacuum has not removed.
        skew: between the clocks of this machine and of the database.
        pause: age of a pause without an end.
        replay: age of a replay that nobody has closed.
        behind: how long after its retention something may still be there.
        absence: how long a consumer may not have run.
    """

    transaction: timedelta = timedelta(minutes=5)
    dead_rows: int = 50_000
    skew: timedelta = timedelta(seconds=2)
    pause: timedelta = timedelta(days=7)
    replay: timedelta = timedelta(minutes=15)
    behind: timedelta = timedelta(days=1)
    absence: timedelta = timedelta(days=7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A set-up that is examined.

    Attributes:
        settings: of the relay.
        connection: by ``database_url``, in AUTOCOMMIT.
        direct: by ``database_direct_url``; the same one where there is no pooler.
        metadata: the application's, None when it is not known.
        subscriptions: of known consumers.
        role: whose rights the login should have.
        thresholds: from where on something counts as wrong.
        clock: of this machine.
    """

    settings: Settings
    connection: Connection
    direct: Connection
    metadata: MetaData | None
    subscriptions: tuple[Subscription, ...]
    role: str
    thresholds: Thresholds
    clock: Callable[[], datetime]
