"""Leases and shards: which relay reads what.

The database is authoritative and its clock the only one that counts; a relay's own clock only bounds how long it
trusts its lease. A relay registers a row under a UUID of this start, its fencing token, and renews it every third of
the lease. Shards have an owner and are spread evenly: the quota is ceil(shards / live relays). A take-over locks and
deletes the expired relay's row first, so that a late renewal and a take-over exclude each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import delete, insert, literal, select, update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dialects import insert_ignoring
from outboxkit.errors import ConfigurationError, LeaseLost
from outboxkit.outbox import shards_of
from outboxkit_relay.store import due

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime, timedelta
    from uuid import UUID

    from sqlalchemy import Connection

    from outboxkit.rows import PauseSet

__all__ = ["balance", "is_anything_left", "leave", "register", "renew"]

_RELAYS = tables.outbox_relays
_SHARDS = tables.outbox_shards


def register(
    connection: Connection, relay: UUID, *, host: str, version: str, lease: timedelta, routing: str = ""
) -> datetime:
    """Enters a relay under its fencing token; returns the database's time.

    Transaction: the caller's.

    Raises:
        ConfigurationError: a relay that is alive sends messages elsewhere: together they would split the stream.
    """
    if routing:
        _refuse_other_routing(connection, routing)
    connection.execute(delete(_RELAYS).where(_RELAYS.c.ended.is_not(None), _RELAYS.c.host == host))
    values = {"id": relay, "host": host, "version": version, "expires_at": database_now(lease)}
    connection.execute(insert(_RELAYS).values(**values, routing=routing or None))
    return connection.execute(select(database_now())).scalar_one()


def renew(connection: Connection, relay: UUID, lease: timedelta) -> None:
    """Extends a lease that has not ended.

    Transaction: the caller's.

    Raises:
        LeaseLost: it had ended: a take-over may have happened.
    """
    held = (_RELAYS.c.id == relay, _RELAYS.c.expires_at > database_now())
    if not connection.execute(update(_RELAYS).where(*held).values(expires_at=database_now(lease))).rowcount:
        raise LeaseLost


def balance(connection: Connection, relay: UUID, *, release: bool) -> tuple[frozenset[int], bool]:
    """Deletes expired relays, takes free shards up to the quota, and gives surplus ones back if told so.

    A relay must not have messages of a shard in flight when it gives the shard back.

    Returns:
        The owned shards, and whether there are more of them than the quota.

    Transaction: the caller's; the new owner reads only after it has committed.
    Locks: all rows of outbox_shards, in order: two relays never balance at once.
    """
    every = select(_SHARDS.c.shard, _SHARDS.c.owner).order_by(_SHARDS.c.shard).with_for_update()
    owners = {row.shard: row.owner for row in connection.execute(every)}
    if not owners:  # emptied, as test suites do with all tables
        _refill(connection)
        owners = {row.shard: row.owner for row in connection.execute(every)}
    alive = _expire_relays(connection)
    mine = [shard for shard, owner in owners.items() if owner == relay]
    free = [shard for shard, owner in owners.items() if owner not in alive]
    quota = -(-len(owners) // max(1, len(alive)))
    taken = free[: max(0, quota - len(mine))]
    _assign(connection, taken, relay)
    if release:
        _assign(connection, mine[quota:], None)
        mine = mine[:quota]
    return frozenset((*mine, *taken)), len(mine) > quota


def _refill(connection: Connection) -> None:
    rows = [{"shard": shard} for shard in range(shards_of(connection))]
    connection.execute(insert_ignoring(connection, _SHARDS), rows)


def leave(connection: Connection, relay: UUID) -> None:
    """Gives everything back at once, so that others need not wait for the lease to end.

    Transaction: the caller's.
    """
    connection.execute(update(_SHARDS).where(_SHARDS.c.owner == relay).values(owner=None))
    connection.execute(delete(_RELAYS).where(_RELAYS.c.id == relay))


def is_anything_left(connection: Connection, shards: Collection[int], paused: PauseSet) -> bool:
    """Tells whether messages are unpublished in shards of other relays, live or dead, or are tried again anywhere.

    What operators have paused, what is parked and what is scheduled for later does not count.

    Transaction: the caller's; reads only.
    """
    hot = tables.outbox_messages.c
    elsewhere = select(literal(1)).where(
        hot.shard.not_in(sorted(shards)), hot.topic.not_in(sorted(paused.destinations))
    )
    if connection.execute(elsewhere.limit(1)).first() is not None:
        return True
    every = connection.execute(select(_SHARDS.c.shard)).scalars().all()
    found, _ = due.due_rows(connection, every, without=paused.destinations, limit=1, paused=paused, whenever=True)
    return bool(found)


def _refuse_other_routing(connection: Connection, routing: str) -> None:
    # Locked as for balancing: of two that start at once the second one sees the first.
    connection.execute(select(_SHARDS.c.shard).order_by(_SHARDS.c.shard).with_for_update())
    alive = (_RELAYS.c.expires_at > database_now(), _RELAYS.c.routing != routing)
    other = connection.execute(select(_RELAYS.c.host, _RELAYS.c.routing).where(*alive).limit(1)).one_or_none()
    if other is not None:
        raise ConfigurationError(
            f"this relay sends {routing}; the relay on {other.host} sends {other.routing}: give all relays of this "
            "database the same [brokers] and [destinations]. docs/operate/runbooks.md says how to move a topic"
        )


def _expire_relays(connection: Connection) -> frozenset[UUID]:
    """Deletes expired relays; returns the live ones."""
    # The lock waits for a renewal or a fenced write that is under way; the condition is then checked again.
    is_over = (_RELAYS.c.expires_at <= database_now(), _RELAYS.c.ended.is_(None))
    expired = select(_RELAYS.c.id).where(*is_over).with_for_update()
    dead = connection.execute(expired).scalars().all()
    if dead:
        connection.execute(delete(_RELAYS).where(_RELAYS.c.id.in_(dead)))
    return frozenset(connection.execute(select(_RELAYS.c.id).where(_RELAYS.c.ended.is_(None))).scalars())


def _assign(connection: Connection, shards: list[int], owner: UUID | None) -> None:
    if shards:
        connection.execute(update(_SHARDS).where(_SHARDS.c.shard.in_(shards)).values(owner=owner))
