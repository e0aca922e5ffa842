"""Crash markers: find the message that kills the process.

A marker names what a process is about to handle. It is committed before anything is decoded, renewed while handlers
run, and taken away when the work is done or the process stops in order. What the marker of a vanished process names is
*suspect*: it runs under a marker of its own, so that a further death counts against it alone.

Beside its markers a run has a row in ``inbox_consumers``: who runs now, how it stands, and who ran lately.

All verbs are Core statements in a transaction of the caller. All instants are the database's.
"""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, delete, select, update

from outboxkit import tables
from outboxkit._sql import database_now
from outboxkit.dialects import insert_ignoring
from outboxkit.errors import ConfigurationError
from outboxkit.inbox.rename import new_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from sqlalchemy import Connection, Row
    from sqlalchemy.orm import Session

    from outboxkit.brokers import Delivery

__all__ = [
    "Owner",
    "began",
    "clear",
    "ended",
    "identity",
    "is_alive",
    "mark",
    "named_elsewhere",
    "renew",
    "suspects",
    "unmark",
]

_SUSPICION: Final = timedelta(days=1)  # a suspect that was not seen again for so long was settled elsewhere
_MAX_PLACE: Final = 300  # characters: topic, partition and offset of every broker that is known
_START: Final = uuid4().hex[:8]  # tells this process from an earlier one under the same number
_batches: Final = tables.inbox_batches
_suspects: Final = tables.inbox_suspects
_starts: Final = tables.inbox_consumers
_REMEMBERED: Final = timedelta(days=30)  # a consumer's name counts as known for so long


def identity(delivery: Delivery) -> str:
    """Names a delivery before decoding: by its place in the log, else by the hash of its id or content."""
    if delivery.offset is not None:
        place = f"{delivery.topic}/{delivery.partition}/{delivery.offset}"
        return place if len(place) <= _MAX_PLACE else _digest(place.encode("utf-8", "replace"))
    given = next((value for name, value in delivery.headers if name == "ce_id"), b"") or delivery.payload or b""
    return _digest(delivery.topic.encode("utf-8", "replace") + b"\0" + given)


def _digest(named: bytes) -> str:
    return hashlib.sha256(named).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Owner:
    """One run of one consumer: whose markers are its own.

    Attributes:
        consumer: its name.
        lease: how long a marker counts without renewal.
        ids: the markers that it holds now: the common one first, then those of suspects.
    """

    consumer: str
    lease: timedelta
    ids: list[UUID]

    @property
    def host(self) -> str:
        """Machine and process, so that the next start on this machine recognises a dead predecessor at once."""
        return f"{socket.gethostname()}/{os.getpid()}/{_START}"


def began(session: Session, owner: Owner, trouble: str | None) -> None:
    """Records the start of a run, and forgets those that nobody needs to know any more.

    Transaction: joins the caller's short one, because other runs that begin wait for it; does not commit. Writes:
    ``inbox_consumers``.

    Raises:
        ConfigurationError: the consumer has another name now.
    """
    connection, name = session.connection(), owner.consumer
    old = and_(_starts.c.consumer == name, _starts.c.expires_at < database_now(-_REMEMBERED))
    connection.execute(delete(_starts).where(old))
    _refuse_old_name(connection, name)
    values = {"id": owner.ids[0], "consumer": owner.consumer, "host": owner.host, "trouble": trouble}
    connection.execute(insert_ignoring(connection, _starts).values(expires_at=database_now(owner.lease), **values))


def is_alive(session: Session, owner: Owner, *, in_hand: int, lag: int | None, trouble: str | None) -> None:
    """Says that a run is alive, and how it stands; ``trouble`` is the text of a `CutOff`.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_consumers``.

    Raises:
        ConfigurationError: the consumer was renamed while this process was frozen, or could not reach the database.
    """
    connection = session.connection()
    this = and_(_starts.c.id == owner.ids[0], _starts.c.consumer == owner.consumer)
    values = {"expires_at": database_now(owner.lease), "in_hand": in_hand, "lag": lag, "trouble": trouble}
    if connection.execute(update(_starts).where(this).values(values)).rowcount == 0:
        _refuse_old_name(connection, owner.consumer)


def ended(session: Session, owner: Owner) -> None:
    """Says that a run has ended in order, and takes its markers away.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_consumers`` and ``inbox_batches``.
    """
    now = database_now()
    values = {"stopped_at": now, "expires_at": now, "in_hand": 0, "trouble": None}
    session.connection().execute(update(_starts).where(_starts.c.id == owner.ids[0]).values(values))
    unmark(session, owner.ids)


def mark(session: Session, owner: Owner, marker: UUID, identities: Sequence[str]) -> None:
    """Names what this process is about to handle.

    Transaction: joins the caller's short one; it must be committed before the first delivery is decoded.
    Writes: ``inbox_batches``.
    """
    connection = session.connection()
    values = {"messages": list(identities), "expires_at": database_now(owner.lease)}
    if connection.execute(update(_batches).where(_batches.c.id == marker).values(values)).rowcount == 0:
        values |= {"id": marker, "consumer": owner.consumer, "host": owner.host}
        connection.execute(_batches.insert().values(values))


def renew(session: Session, owner: Owner) -> None:
    """Extends the leases of a run's markers.

    Transaction: joins the caller's; does not commit.
    """
    until = database_now(owner.lease)
    session.connection().execute(update(_batches).where(_batches.c.id.in_(owner.ids)).values(expires_at=until))


def unmark(session: Session, markers: Collection[UUID]) -> None:
    """Takes markers away: their work is done, or it was given up in order.

    Transaction: joins the caller's; does not commit.
    """
    session.connection().execute(delete(_batches).where(_batches.c.id.in_(markers)))


def suspects(session: Session, owner: Owner, *, starting: bool = False) -> dict[str, int]:
    """Returns the deaths of each suspect, after counting those of processes that have just vanished.

    Transaction: joins the caller's; does not commit. Writes: ``inbox_suspects`` and ``inbox_batches``, when somebody
    died.

    Args:
        session: of the caller.
        owner: of the caller.
        starting: also count dead processes of this machine whose lease still runs.
    """
    connection = session.connection()
    for marked in _dead(session, owner, starting=starting):
        # Another process may have counted the same death: the one that deletes the marker counts.
        if connection.execute(delete(_batches).where(_batches.c.id == marked.id)).rowcount == 1 and marked.messages:
            _count_death(session, owner.consumer, sorted(set(marked.messages)))
    fresh = _suspects.c.seen_at > database_now(-_SUSPICION)
    query = select(_suspects.c.identity, _suspects.c.deaths).where(_suspects.c.consumer == owner.consumer, fresh)
    return {row.identity: row.deaths for row in connection.execute(query)}


def named_elsewhere(session: Session, owner: Owner, identities: Collection[str]) -> set[str]:
    """Returns those that another living marker names: its process may have died within its lease.

    Transaction: joins the caller's; only reads.
    """
    others = select(_batches.c.messages).where(
        _batches.c.consumer == owner.consumer, _batches.c.id.not_in(owner.ids), _batches.c.host != owner.host
    )
    return {name for messages in session.connection().scalars(others) for name in messages} & set(identities)


def clear(session: Session, owner: Owner, settled: Iterable[str]) -> None:
    """Forgets suspects that are settled.

    Transaction: joins the caller's; does not commit.
    """
    these = and_(_suspects.c.consumer == owner.consumer, _suspects.c.identity.in_(list(settled)))
    session.connection().execute(delete(_suspects).where(these))


def _refuse_old_name(connection: Connection, name: str) -> None:
    if now := new_name(connection, name):
        raise ConfigurationError(
            f"{name} was renamed to {now}, which knows what {name} has handled: start it as {now}, or rename it back"
        )


def _count_death(session: Session, consumer: str, names: Sequence[str]) -> None:
    connection = session.connection()
    rows = [{"consumer": consumer, "identity": name, "deaths": 0} for name in names]
    connection.execute(insert_ignoring(connection, _suspects), rows)
    these = and_(_suspects.c.consumer == consumer, _suspects.c.identity.in_(names))
    values: dict[str, Any] = {"deaths": _suspects.c.deaths + 1, "seen_at": database_now()}
    connection.execute(update(_suspects).where(these).values(values))


def _dead(session: Session, owner: Owner, *, starting: bool) -> list[Row[Any]]:
    expired = _batches.c.expires_at < database_now()
    query = select(_batches.c.id, _batches.c.host, _batches.c.messages, expired.label("expired"))
    query = query.where(_batches.c.consumer == owner.consumer, _batches.c.id.not_in(owner.ids))
    found = session.connection().execute(query if starting else query.where(expired))
    return [marked for marked in found if marked.expired or _is_dead(marked.host)]


def _is_dead(host: str) -> bool:
    machine, process, start = (*host.split("/"), "", "")[:3]
    if machine != socket.gethostname() or not process.isdigit():
        return False
    if int(process) == os.getpid():
        return start != _START  # a predecessor in a container, where every process has the same number
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
