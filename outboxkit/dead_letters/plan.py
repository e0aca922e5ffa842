"""Plans: a replay of many letters that is decided first, kept in a table, and carried out portion by portion.

`draft` looks and decides and writes nothing; `freeze` keeps what was looked at; `advance` carries out the next portion
in a transaction of its own. A replay that is cut off at any point goes on where its table says; two operators may carry
out the same one, or two that share letters: each letter is queued once. What was chosen is at every moment the sum of
what waits, what was queued, what was refused and what is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, func, select, update

from outboxkit import tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import database_now
from outboxkit.dead_letters import preflight
from outboxkit.dead_letters.letter import DeadLetter, Filter, State
from outboxkit.dead_letters.preflight import Decision, Terms
from outboxkit.dead_letters.replay import audit, carry_out
from outboxkit.dead_letters.search import IN_ORDER, in_order
from outboxkit.dialects import naming_missing_tables
from outboxkit.errors import ReplayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection, Row

__all__ = [
    "Draft",
    "Health",
    "Item",
    "Outcome",
    "Replay",
    "advance",
    "draft",
    "freeze",
    "health",
    "items",
    "replays",
    "resume",
    "stop",
]

_REPLAYS: Final = tables.dead_letter_replays
_ITEMS: Final = tables.dead_letter_replay_items
_LETTERS: Final = tables.dead_letters
_PORTION: Final = 500
_FEWEST: Final = 100  # letters that are looked at together: where few are wanted, many may be refused
_NAMED_IN_AUDIT: Final = 20


class Outcome(StrEnum):
    """The outcome of one letter of a replay."""

    WAITING = "waiting"  #: its turn has not come
    QUEUED = "queued"  #: its outbox row is written, or its relay is asked to bring it back
    REFUSED = "refused"
    GONE = "gone"  #: somebody else replayed, discarded or deleted it meanwhile


@dataclass(frozen=True, slots=True)
class Draft:
    """A replay that was looked at: the letters chosen, in the original order of each key, and what was decided."""

    letters: tuple[UUID, ...]
    decisions: tuple[Decision, ...]

    @property
    def eligible(self) -> int:
        """Number of letters that would be queued."""
        return sum(decision.action != "none" for decision in self.decisions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A letter of a replay, and its outcome."""

    number: int
    letter_id: UUID
    outcome: Outcome
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replay: who asked for it, and how far it is. ``chosen`` is the sum of the four numbers after it.

    Attributes:
        state: ``ready`` (it can go on), ``stopped``, ``done``.
        options: ``to``, ``force``, and the inbox retention in seconds.
    """

    id: UUID
    state: str
    requested_by: str
    why: str
    options: dict[str, Any]
    created_at: datetime
    finished_at: datetime | None
    waiting: int
    queued: int
    refused: int
    gone: int

    @property
    def chosen(self) -> int:
        """Number of letters that were chosen."""
        return self.waiting + self.queued + self.refused + self.gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """The fate of the letters that a replay has queued.

    Attributes:
        under_way: not closed yet.
        replayed: their effect is committed, or (the relay's own) they were sent.
        died_again: each has a new letter.
    """

    under_way: int
    replayed: int
    died_again: int


@naming_missing_tables()
def draft(connection: Connection, which: Filter | Sequence[UUID], terms: Terms, *, limit: int | None = None) -> Draft:
    """Chooses letters and decides about each; writes nothing.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        which: a filter, or the letters themselves.
        terms: of the replay.
        limit: at most so many are queued; what is refused does not fill it.
    """
    chosen: list[UUID] = []
    decisions: list[Decision] = []
    eligible = 0
    for letters in _portions(connection, which, _PORTION if limit is None else min(_PORTION, max(limit, _FEWEST))):
        for letter, decision in zip(letters, preflight.decide(connection, letters, terms), strict=True):
            if limit is not None and eligible >= limit:
                return Draft(tuple(chosen), tuple(decisions))
            chosen.append(letter.id)
            decisions.append(decision)
            eligible += decision.action != "none"
    found = set(chosen)
    missing = [] if isinstance(which, Filter) else [one for one in dict.fromkeys(which) if one not in found]
    decisions += [_missing(one) for one in missing]
    return Draft((*chosen, *missing), tuple(decisions))


@naming_missing_tables()
def freeze(
    connection: Connection, drafted: Draft, terms: Terms, *, by: str, why: str, replay_id: UUID | None = None
) -> UUID:
    """Keeps a draft: what was looked at is what is carried out, whatever dies meanwhile.

    Transaction: joins the caller's; does not commit. Writes: the replay, its items, the audit.

    Args:
        connection: the caller's.
        drafted: what was looked at.
        terms: of the replay.
        by: who asks, for the audit.
        why: the reason, for the audit.
        replay_id: the number of the replay, where a form has it: sent twice, it is one replay.

    Returns:
        The number of the replay, for `advance`.
    """
    replay_id = replay_id or uuid4()
    retention = terms.inbox_retention.total_seconds()
    options = {"force": terms.force, "to": terms.to, "inbox_retention": retention}
    state = "ready" if drafted.eligible else "done"
    connection.execute(_REPLAYS.insert().values(id=replay_id, requested_by=by, why=why, options=options, state=state))
    rows = [_row(replay_id, number, decision) for number, decision in enumerate(drafted.decisions, 1)]
    if rows:
        connection.execute(_ITEMS.insert(), rows)
    named = drafted.letters if len(drafted.letters) <= _NAMED_IN_AUDIT else ()
    audit(connection, "dlq.replay", (replay_id, *named), by=by, why=why)
    return replay_id


@naming_missing_tables()
def advance(
    connection: Connection, replay_id: UUID, *, limit: int = _PORTION, resolve: Callable[[str], str] | None = None
) -> list[Item]:
    """Queues the next letters of a replay, at most ``limit``; returns what became of them, empty when it is over.

    Transaction: the caller's own short one, which must commit. Locks the replay, then the letters.
    Guarantee: a letter's outcome, its state and its outbox row commit together. Called again after a crash, it does the
    rest and nothing twice.

    Raises:
        ReplayError: there is no such replay.
    """
    replay = _locked(connection, replay_id)
    if replay.state != "ready":
        return []
    waiting = and_(_ITEMS.c.replay_id == replay_id, _ITEMS.c.outcome == Outcome.WAITING)
    rows = connection.execute(select(_ITEMS).where(waiting).order_by(_ITEMS.c.number).limit(limit)).all()
    done = _carry_out(connection, replay, rows, resolve)
    if connection.execute(select(_ITEMS.c.number).where(waiting).limit(1)).first() is None:
        _set_state(connection, replay_id, "done")
    return done


@naming_missing_tables()
def stop(connection: Connection, replay_id: UUID, *, by: str, why: str) -> bool:
    """Stops a replay where it is; False when it was over already.

    Transaction: joins the caller's; does not commit. A portion that is being queued is finished first.
    """
    if _locked(connection, replay_id).state != "ready":
        return False
    _set_state(connection, replay_id, "stopped")
    audit(connection, "dlq.replay.stop", [replay_id], by=by, why=why)
    return True


@naming_missing_tables()
def resume(connection: Connection, replay_id: UUID, *, by: str, why: str) -> Replay:
    """Lets a stopped replay go on with `advance`.

    Transaction: joins the caller's; does not commit.

    Raises:
        ReplayError: there is no such replay, or it is over.
    """
    _locked(connection, replay_id)
    found = replays(connection, replay_id)[0]
    if found.state == "done":
        raise ReplayError(f"the replay {replay_id} is over: {found.queued:,} of {found.chosen:,} were queued")
    _set_state(connection, replay_id, "ready")
    audit(connection, "dlq.replay.resume", [replay_id], by=by, why=why)
    return replace(found, state="ready")


@naming_missing_tables()
def replays(connection: Connection, replay_id: UUID | None = None, *, limit: int = 20) -> list[Replay]:
    """Returns the latest replays, or the one asked for.

    Transaction: joins the caller's; reads only.
    """
    query = select(_REPLAYS).order_by(_REPLAYS.c.created_at.desc()).limit(limit)
    rows = connection.execute(query if replay_id is None else query.where(_REPLAYS.c.id == replay_id)).all()
    return [_replay(connection, row) for row in rows]


@naming_missing_tables()
def items(connection: Connection, replay_id: UUID) -> list[Item]:
    """Returns the letters of a replay in their order, and the outcome of each.

    Transaction: joins the caller's; reads only.
    """
    rows = connection.execute(select(_ITEMS).where(_ITEMS.c.replay_id == replay_id).order_by(_ITEMS.c.number))
    return [
        Item(number=row.number, letter_id=row.letter_id, outcome=Outcome(row.outcome), reason=row.reason)
        for row in rows
    ]


@naming_missing_tables()
def health(connection: Connection, replay_id: UUID) -> Health:
    """Counts what became of the letters that a replay has queued.

    Transaction: joins the caller's; reads only.
    """
    queued = and_(
        _ITEMS.c.replay_id == replay_id, _ITEMS.c.outcome == Outcome.QUEUED, _ITEMS.c.letter_id == _LETTERS.c.id
    )
    states = select(_LETTERS.c.state, func.count()).select_from(_ITEMS).join(_LETTERS, queued)
    counted: dict[str, int] = {row[0]: row[1] for row in connection.execute(states.group_by(_LETTERS.c.state))}
    child = _LETTERS.alias()
    has_died = and_(_ITEMS.c.replay_id == replay_id, _ITEMS.c.decided_at <= child.c.died_at)
    again = (
        select(func.count()).select_from(_ITEMS).join(child, and_(child.c.parent_id == _ITEMS.c.letter_id, has_died))
    )
    died_again = connection.execute(again).scalar_one()
    return Health(
        under_way=counted.get(State.REPLAYING, 0),
        replayed=counted.get(State.REPLAYED, 0) - died_again,
        died_again=died_again,
    )


# --- parts -------------------------------------------------------------------------------------------------------


def _portions(connection: Connection, which: Filter | Sequence[UUID], size: int) -> Iterator[list[DeadLetter]]:
    """Yields the letters in the original order of each key, some at a time: payloads are large, ids are not."""
    chosen = which.clause() if isinstance(which, Filter) else _LETTERS.c.id.in_(list(which))
    ids = connection.execute(select(_LETTERS.c.id).where(chosen).order_by(*IN_ORDER)).scalars().all()
    for start in range(0, len(ids), size):
        yield in_order(connection, ids[start : start + size])


def _carry_out(
    connection: Connection, replay: Row[Any], rows: Sequence[Row[Any]], resolve: Callable[[str], str] | None
) -> list[Item]:
    letters = {one.id: one for one in in_order(connection, [row.letter_id for row in rows], lock=True)}
    ours = [letters[row.letter_id] for row in rows if row.letter_id in letters]
    terms = _terms(replay, resolve)
    decided = {one.id: one for one in preflight.decide(connection, ours, terms)}
    going = [one for one in ours if decided[one.id].action != "none"]
    carry_out(connection, going, [decided[one.id] for one in going], by=replay.requested_by, to=terms.to)
    done = [
        Item(number=row.number, letter_id=row.letter_id, **_outcome(letters.get(row.letter_id), decided))
        for row in rows
    ]
    for outcome in {(item.outcome, item.reason) for item in done}:
        numbers = [item.number for item in done if (item.outcome, item.reason) == outcome]
        these = and_(_ITEMS.c.replay_id == replay.id, _ITEMS.c.number.in_(numbers))
        values = {"outcome": outcome[0], "reason": outcome[1], "decided_at": database_now()}
        connection.execute(update(_ITEMS).where(these).values(**values))
    failpoint("replay.decided")
    return done


def _outcome(letter: DeadLetter | None, decided: dict[UUID, Decision]) -> dict[str, Any]:
    if letter is None:
        return {"outcome": Outcome.GONE, "reason": "it is not there any more"}
    decision = decided[letter.id]
    if decision.action != "none":
        return {"outcome": Outcome.QUEUED}
    if letter.state is not State.DEAD:
        return {"outcome": Outcome.GONE, "reason": f"it is {letter.state.value} by now"}
    return {"outcome": Outcome.REFUSED, "reason": decision.reason}


def _row(replay_id: UUID, number: int, decision: Decision) -> dict[str, Any]:
    outcome = Outcome.WAITING if decision.action != "none" else Outcome.REFUSED if decision.refused else Outcome.GONE
    return {
        "replay_id": replay_id,
        "number": number,
        "letter_id": decision.id,
        "outcome": outcome,
        "reason": decision.reason,
    }


def _missing(letter_id: UUID) -> Decision:
    return Decision(id=letter_id, action="none", reason=f"there is no dead letter {letter_id}", refused=True)


def _locked(connection: Connection, replay_id: UUID) -> Row[Any]:
    query = select(_REPLAYS).where(_REPLAYS.c.id == replay_id).with_for_update()
    if (found := connection.execute(query).one_or_none()) is None:
        raise ReplayError(f"there is no replay {replay_id}")
    return found


def _replay(connection: Connection, row: Row[Any]) -> Replay:
    counted = select(_ITEMS.c.outcome, func.count()).where(_ITEMS.c.replay_id == row.id).group_by(_ITEMS.c.outcome)
    numbers: Counter[str] = Counter({row[0]: row[1] for row in connection.execute(counted)})
    values: dict[str, Any] = {**row._asdict(), **{outcome.value: numbers[outcome] for outcome in Outcome}}
    return Replay(**values)


def _terms(replay: Row[Any], resolve: Callable[[str], str] | None) -> Terms:
    told = replay.options
    retention = timedelta(seconds=told["inbox_retention"])
    return Terms(force=told["force"], to=told["to"], resolve=resolve, inbox_retention=retention)


def _set_state(connection: Connection, replay_id: UUID, state: str) -> None:
    finished = database_now() if state == "done" else None
    values = {"state": state, "finished_at": finished}
    connection.execute(update(_REPLAYS).where(_REPLAYS.c.id == replay_id).values(**values))
