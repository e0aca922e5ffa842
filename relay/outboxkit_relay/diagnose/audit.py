"""Audit: the conservation law in one snapshot. Every message that was committed is in exactly one account.

``emitted = pending + retry + follower + scheduled + dead + replaying + discarded + expired + published``, in distinct
ids. A message that stands in two places, because a crash repeated it or an operator replayed it, is counted in the
first of them, in this order: what is still to be done comes before what is done. How many messages were committed the
application knows: a count of its own rows in the same transaction must be ``emitted``, as far back as the ledger goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Select, case, func, literal, select, union_all

from outboxkit import tables
from outboxkit._sql import Instant, database_now
from outboxkit.dead_letters import Side, State
from outboxkit.inbox.rows import Standing, standing
from outboxkit.rows import WaitReason
from outboxkit_relay.diagnose.contradictions import Contradiction, contradictions, id_text, ledger_ids

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection

__all__ = ["ACCOUNTS", "Audit", "audit", "count_messages"]

_HOT: Final = tables.outbox_messages.c
_WAITING: Final = tables.outbox_waiting.c
_LETTERS: Final = tables.dead_letters.c
_INBOX: Final = tables.inbox_messages.c

#: accounts of the way out, in the order in which a message is counted
ACCOUNTS: Final = (
    "pending",
    WaitReason.RETRY.value,
    WaitReason.FOLLOWER.value,
    WaitReason.SCHEDULED.value,
    State.DEAD.value,
    State.REPLAYING.value,
    State.DISCARDED.value,
    "published",
    "expired",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """The content of one snapshot.

    Attributes:
        at: by the database's clock.
        since: how far back the ledger goes, None when it is empty.
        emitted: distinct messages that are known; the sum of the accounts.
        accounts: how many messages are in each of `ACCOUNTS`.
        inbox: of each consumer how many messages are ``handled``, ``dead``, ``open`` (claimed, their replay under
            way) and ``waiting``.
        contradictions: what no run of ours leaves behind.
    """

    at: datetime
    since: datetime | None
    emitted: int
    accounts: Mapping[str, int]
    inbox: Mapping[str, Mapping[str, int]]
    contradictions: tuple[Contradiction, ...]


def audit(connection: Connection) -> Audit:
    """Counts every message once, and looks for contradictions.

    Transaction: joins the caller's, which should see one snapshot (REPEATABLE READ); reads only. Index used: none:
    the ledger is read as a whole.
    """
    oldest = func.min(tables.outbox_ledger.c.published_at, type_=Instant())
    at, since = connection.execute(select(database_now(), select(oldest).scalar_subquery())).one()
    accounts = count_messages(connection)
    return Audit(
        at=at,
        since=since,
        emitted=sum(accounts.values()),
        accounts=accounts,
        inbox=_inbox(connection),
        contradictions=tuple(contradictions(connection)),
    )


def count_messages(connection: Connection) -> dict[str, int]:
    """Counts each message in exactly one of `ACCOUNTS`.

    Transaction: joins the caller's; reads only. Index used: none.
    """
    places = [
        _place(select(id_text(_HOT.message_id)), literal(ACCOUNTS.index("pending"))),
        _place(select(id_text(_WAITING.message_id)), _rank(_WAITING.reason, WaitReason.RETRY)),
        _place(
            select(id_text(_LETTERS.message_id)).where(_LETTERS.side == Side.RELAY, _LETTERS.state != State.REPLAYED),
            _rank(_LETTERS.state, State.DEAD),
        ),
        *(_place(ledger_ids(connection, outcome), literal(ACCOUNTS.index(outcome))) for outcome in _LEDGER_OUTCOMES),
    ]
    every = union_all(*places).subquery()
    ranked = select(func.min(every.c.rank).label("rank")).group_by(every.c.id).subquery()
    counted = select(ranked.c.rank, func.count()).group_by(ranked.c.rank)
    numbers = {ACCOUNTS[row[0]]: row[1] for row in connection.execute(counted)}
    return {name: numbers.get(name, 0) for name in ACCOUNTS}


_LEDGER_OUTCOMES: Final = ("published", "expired")


def _place(ids: Select[Any], rank: Any) -> Select[Any]:
    (name,) = ids.selected_columns
    return ids.with_only_columns(name.label("id"), rank.label("rank"), maintain_column_froms=True)


def _rank(column: Any, otherwise: str) -> Any:
    return case({name: at for at, name in enumerate(ACCOUNTS)}, value=column, else_=ACCOUNTS.index(otherwise))


def _inbox(connection: Connection) -> dict[str, dict[str, int]]:
    rows = select(_INBOX.consumer, standing().label("kind")).subquery().c
    room = tables.inbox_waiting.c
    counted = union_all(
        select(rows.consumer, rows.kind, func.count()).group_by(rows.consumer, rows.kind),
        select(room.consumer, literal("waiting"), func.count()).group_by(room.consumer),
    )
    found: dict[str, dict[str, int]] = {}
    for consumer, name, number in connection.execute(counted):
        found.setdefault(consumer, dict.fromkeys((*Standing, "waiting"), 0))[name] = number
    return dict(sorted(found.items()))
