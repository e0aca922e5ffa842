"""Unpublished messages that operators send elsewhere or give up: a mistyped destination is mended here.

A row of the outbox may be in a relay's hands, and then at the broker. It is not while no relay is alive, while every
relay reports that the destination does not exist, or once its destination has been paused for long enough. Only then is
a row taken, which a relay that settles it at the same time waits for: each message goes to one destination, unless a
relay died after it had sent it and before it could settle it.

A report is as old as the relay's last try, and is written a second later: whoever creates the destination while its
messages are sent elsewhere pauses it first, or some may go to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from sqlalchemy import LargeBinary, Select, Table, and_, delete, func, insert, literal, select, union_all, update

from outboxkit import dead_letters, outbox, tables
from outboxkit._legible import Lost, flaw_of, legible
from outboxkit._sql import database_now
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope
from outboxkit.policy import Failure
from outboxkit.rows import Row, WaitReason, shard_of
from outboxkit_relay.store.stopped_keys import COPIED

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection

__all__ = ["PENDING", "Unpublished", "discard", "find", "redirect"]

PENDING: Final = "pending"  #: the place of a message that is in the outbox itself

_HOT: Final = tables.outbox_messages
_WAITING: Final = tables.outbox_waiting
_RELAYS: Final = tables.outbox_relays.c
_READ: Final = [name for name in COPIED if not isinstance(_HOT.c[name].type, LargeBinary)]
_LETTER: Final = ("position", "message_id", "topic", "key", "type", "kind", "payload", "headers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpublished:
    """A message that is not published, and whether it may be touched.

    Attributes:
        id: of the message; `outboxkit._legible.Lost` when the row has none.
        topic: where it would go.
        place: ``pending``, or why it waits.
        refusal: why it may not be touched; empty when it may.
    """

    id: UUID | Lost
    topic: str
    place: str
    refusal: str


def find(
    connection: Connection, *, ids: Sequence[str] = (), topic: str | None = None, rest: timedelta, limit: int
) -> list[Unpublished]:
    """Finds unpublished messages by their ids, or all of a destination, in their order.

    Transaction: joins the caller's; reads only. Index used: none.

    Args:
        connection: the caller's.
        ids: which messages.
        topic: or which destination.
        rest: how long after a pause a relay may still have messages at the broker.
        limit: at most so many.
    """
    in_hand = _Hands(connection, rest)
    rows = connection.execute(_query(ids, topic).limit(limit)).all()
    return [
        Unpublished(id=row.message_id, topic=row.topic, place=row.place, refusal=_why_not(row, in_hand)) for row in rows
    ]


def place_of(state: str, at: int) -> str:
    """Names a row by its table and its position there, for one that cannot be named by its id."""
    return f"position {at} of outbox_messages" if state == PENDING else f"id {at} of outbox_waiting"


def _why_not(row: Any, in_hand: Callable[[str], str]) -> str:
    flaw = flaw_of(row._asdict())
    if flaw:
        return f"{place_of(row.place, row.at)}: {flaw}; a relay makes it a dead letter"
    return _refusal(row.place, row.is_later, in_hand, row.topic)


def _query(ids: Sequence[str], topic: str | None) -> Select[Any]:
    """The wanted rows, the outbox before the waiting room, each in its order."""
    fresh: Select[Any] = select(
        literal(0).label("room"),
        _HOT.c.position.label("at"),
        literal(PENDING).label("place"),
        literal(value=False).label("is_later"),
        *(_HOT.c[name] for name in _READ),
    )
    waits = _WAITING.c
    is_later = func.coalesce(waits.due_at > database_now(), literal(value=False))
    waiting: Select[Any] = select(
        literal(1), waits.id, waits.reason, is_later.label("is_later"), *(waits[name] for name in _READ)
    )
    every: Any = union_all(fresh, waiting).subquery().c
    stored = list(map(outbox.stored_id, ids))
    wanted = every.message_id.in_(stored) if topic is None else every.topic == topic
    shown = (legible(every[name]) for name in _READ)
    return select(every.at, every.place, every.is_later, *shown).where(wanted).order_by(every.room, every.at)


def _refusal(place: str, is_later: bool, in_hand: Callable[[str], str], topic: str) -> str:  # noqa: FBT001  a row's column
    if place in (WaitReason.RETRY, WaitReason.FOLLOWER):
        return "its key is stopped: outboxkit quarantine skip makes it a dead letter, which can be edited"
    if place == WaitReason.SCHEDULED:
        return "" if is_later else "it is due, and may be at the broker"
    return in_hand(topic)


class _Hands:
    """Whether relays may have messages of a destination in their hands; each is looked up once."""

    def __init__(self, connection: Connection, rest: timedelta) -> None:
        self._connection, self._rest, self._known = connection, rest, dict[str, str]()

    def __call__(self, topic: str) -> str:
        if topic not in self._known:
            self._known[topic] = _in_hand(self._connection, topic, self._rest)
        return self._known[topic]


def _in_hand(connection: Connection, topic: str, rest: timedelta) -> str:
    """Says why messages of a destination may be at the broker; empty when they are not."""
    now = connection.execute(select(database_now())).scalar_one()
    alive = and_(_RELAYS.expires_at > database_now(), _RELAYS.ended.is_(None))
    states = connection.execute(select(_RELAYS.state).where(alive)).scalars().all()
    if all(_is_missing(state, topic) for state in states):
        return ""
    since = _paused_since(connection, topic)
    if since is None:
        return f"a relay may have it at the broker: outboxkit relay pause {topic} --why … first"
    left = rest - (now - since)
    return f"it may still be at the broker: ask again in {left.total_seconds():.0f} s" if left > timedelta(0) else ""


def _is_missing(state: str | None, topic: str) -> bool:
    """True if this relay reports that there was no such destination when it tried last.

    Another version may write its report otherwise.
    """
    try:
        told = json.loads(state or "[]")
        return any((one["topic"], one["failure"]) == (topic, Failure.UNKNOWN_TOPIC) for one in told)
    except (ValueError, TypeError, KeyError):
        return False


def _paused_since(connection: Connection, topic: str) -> datetime | None:
    mine = (one for one in pauses.pauses(connection) if one.target.scope is Scope.DESTINATION)
    return next((one.since for one in mine if one.target.name == topic), None)


# --- changes -----------------------------------------------------------------------------------------------------


def redirect(connection: Connection, ids: Sequence[UUID | Lost], to: str, *, by: str, why: str) -> set[UUID]:
    """Sends messages to another destination, in their order; returns those that were still there.

    Transaction: joins the caller's; does not commit. A relay that settles one of them at the same time waits.
    Guarantee: a message keeps its id, its bytes and its key; in the new destination it stands behind what is there.

    Writes: ``outbox_messages``, ``outbox_waiting``, ``outbox_audit``.

    Args:
        connection: the caller's.
        ids: of messages that `find` does not refuse.
        to: the destination.
        by: who asks, for the audit.
        why: the reason, for the audit.
    """
    shards = outbox.shards_of(connection)

    def there(row: dict[str, Any]) -> dict[str, Any]:
        return {"topic": to, "shard": shard_of(to, row["key"], row["message_id"], shards)}

    moved = [{**row, **there(row)} for row in _taken(connection, _HOT, ids, COPIED)]
    if moved:
        connection.execute(insert(_HOT), moved)
    later = []
    columns = (_WAITING.c.message_id, legible(_WAITING.c.key))
    for found in connection.execute(select(*columns).where(_mine(_WAITING, ids))).all():
        row = found._asdict()
        mine = _mine(_WAITING, [row["message_id"]])
        if connection.execute(update(_WAITING).where(mine).values(**there(row))).rowcount:
            later.append(row)
    return _told(connection, [*moved, *later], "messages.redirect", by=by, why=f"to {to}: {why}")


def discard(connection: Connection, ids: Sequence[UUID | Lost], *, by: str, why: str) -> set[UUID]:
    """Gives messages up: each becomes a discarded dead letter, which keeps what it was.

    Transaction: joins the caller's; does not commit. A relay that settles one of them at the same time waits.

    Returns:
        Those that were still there.

    Writes: ``outbox_messages``, ``outbox_waiting``, ``dead_letters``, ``outbox_audit``.
    """
    found = []
    for row in [one for table in (_HOT, _WAITING) for one in _taken(connection, table, ids, _LETTER)]:
        values: list[Any] = [row["position"] or 0, *(row[name] for name in _LETTER[1:]), 0, None]
        letter = dead_letters.of_row(
            Row.stored(*values), Failure.REJECTED, "an operator gave it up before it was published", 0
        )
        dead_letters.store(connection, letter)
        dead_letters.discard(connection, [letter.id], by=by, why=why)
        found.append(row)
    return _told(connection, found, "messages.discard", by=by, why=why)


def _mine(table: Table, ids: Sequence[UUID | Lost]) -> ColumnElement[bool]:
    """These messages; of the waiting room only what is scheduled for later."""
    these: ColumnElement[bool] = table.c.message_id.in_([one for one in ids if isinstance(one, UUID)])
    if table is _HOT:
        return these
    return and_(these, _WAITING.c.reason == WaitReason.SCHEDULED, _WAITING.c.due_at > database_now())


def _taken(
    connection: Connection, table: Table, ids: Sequence[UUID | Lost], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Deletes the rows of these messages; returns what was there, in their order."""
    (at,) = table.primary_key.columns
    statement = (
        delete(table).where(_mine(table, ids)).returning(at.label("at"), *(legible(table.c[name]) for name in names))
    )
    rows = sorted(map(dict, connection.execute(statement).mappings()), key=lambda row: row["at"])
    return [{name: row[name] for name in names} for row in rows]


def _told(connection: Connection, rows: Sequence[dict[str, Any]], action: str, *, by: str, why: str) -> set[UUID]:
    done = {row["message_id"] for row in rows}
    if done:
        entry = {"who": by, "action": action, "target": " ".join(sorted(map(str, done))), "why": why}
        connection.execute(tables.outbox_audit.insert().values(**entry))
    return done
