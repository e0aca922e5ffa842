"""Replay: dead letters go through the outbox again, in the original order of each key, to the consumer that failed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, update

from outboxkit import inbox, outbox, tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import database_now
from outboxkit.dead_letters import preflight
from outboxkit.dead_letters.burial import store
from outboxkit.dead_letters.letter import DeadLetter, Side, State
from outboxkit.dead_letters.preflight import Decision, Terms
from outboxkit.dead_letters.search import in_order
from outboxkit.dialects import naming_missing_tables
from outboxkit.errors import ReplayError
from outboxkit.headers import LETTER, REPLAY_FOR, pack_headers, unpack_headers
from outboxkit.policy import duration
from outboxkit.rows import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import timedelta

    from sqlalchemy import Connection

__all__ = ["audit", "carry_out", "discard", "outgoing", "repair_and_replay", "replay"]

_LETTERS: Final = tables.dead_letters
_REPLACED: Final = (REPLAY_FOR, LETTER, "outboxkit-attempt", "ce_sequence", "ce_recordedtime")  # there are new ones
_IDS_AT_ONCE: Final = 500  # in one statement: databases bound the number of values


@naming_missing_tables()
def replay(
    connection: Connection,
    ids: Sequence[UUID],
    *,
    by: str,
    why: str,
    payload: bytes | None = None,
    to: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    resolve: Callable[[str], str] | None = None,
    inbox_retention: timedelta | str | None = None,
) -> list[Decision]:
    """Sends dead letters through the outbox again, each to the consumer that failed, under its old id.

    For many letters, with a rate, a canary and a memory of how far it came, there is `outboxkit.dead_letters.plan`.

    Transaction: joins the caller's; does not commit. Locks the letters.
    Guarantee: a letter's change of state and its outbox row commit together; calling it again does nothing twice. The
    rows stand in the original order of each key, however the ids are given.

    Args:
        connection: the caller's.
        ids: which letters; find them by `find` first, so that what was looked at is what is replayed.
        by: who asks, for the audit.
        why: the reason, and the filter that found them, for the audit.
        payload: a repaired payload: the message gets a new id, in a new letter that has the old one as parent.
        to: another consumer than the one that failed: it was renamed.
        force: see `Terms`.
        dry_run: decides the same and writes nothing.
        resolve: see `Terms`.
        inbox_retention: see `Terms`; 14 days unless given.

    Raises:
        ReplayError: every letter is refused; it says why the first one is.
    """
    if payload is not None and len(ids) != 1:
        raise ReplayError(f"a repaired payload belongs to one letter, {len(ids)} were given")
    terms = Terms(force=force, to=to, resolve=resolve)
    if inbox_retention is not None:
        terms = replace(terms, inbox_retention=duration(inbox_retention, name="inbox_retention"))
    payloads = {} if payload is None else {ids[0]: payload}
    letters = in_order(connection, ids, lock=not dry_run)
    decisions = preflight.decide(connection, letters, terms, payloads)
    known = {letter.id for letter in letters}
    missing = [one for one in dict.fromkeys(ids) if one not in known]
    decisions += [
        Decision(id=one, action="none", reason=f"there is no dead letter {one}", refused=True) for one in missing
    ]
    if decisions and all(decision.refused for decision in decisions):
        raise ReplayError(decisions[0].reason)
    if not dry_run:
        carry_out(connection, letters, decisions, by=by, to=to, payloads=payloads)
        done = [decision.id for decision in decisions if decision.action != "none"]
        audit(connection, "dlq.replay", done, by=by, why=why)
    return decisions


@naming_missing_tables()
def repair_and_replay(
    connection: Connection,
    payloads: Mapping[UUID, bytes],
    terms: Terms,
    *,
    by: str,
    why: str,
    dry_run: bool = False,
) -> list[Decision]:
    """Replays letters with repaired payloads, each under a new id, in a new letter that has the old one as parent.

    Transaction: joins the caller's; does not commit. Locks the letters.
    Guarantee: as `replay`; the bytes of the old letters never change.

    Args:
        connection: the caller's.
        payloads: the repaired payload of each letter.
        terms: of the replay.
        by: who asks, for the audit.
        why: the reason, for the audit.
        dry_run: decides the same and writes nothing.
    """
    letters = in_order(connection, list(payloads), lock=not dry_run)
    decisions = preflight.decide(connection, letters, terms, payloads)
    if not dry_run:
        carry_out(connection, letters, decisions, by=by, to=terms.to, payloads=payloads)
        if done := [decision.id for decision in decisions if decision.action != "none"]:
            audit(connection, "dlq.repair", done, by=by, why=why)
    return decisions


@naming_missing_tables()
def discard(connection: Connection, ids: Sequence[UUID], *, by: str, why: str) -> int:
    """Closes dead letters without a replay; returns how many were dead.

    Transaction: joins the caller's; does not commit.
    """
    dead = and_(_LETTERS.c.id.in_(ids), _LETTERS.c.state == State.DEAD)
    values = {"state": State.DISCARDED, "closed_at": database_now()}
    audit(connection, "dlq.discard", ids, by=by, why=why)
    return connection.execute(update(_LETTERS).where(dead).values(values)).rowcount


def outgoing(letter: DeadLetter, to: str | None = None) -> DeadLetter:
    """Returns the letter as its message goes out again: it carries its number, and the name of its only receiver."""
    kept = tuple(header for header in unpack_headers(letter.headers) if header[0] not in _REPLACED)
    kept = (*kept, (LETTER, str(letter.id).encode()))
    if letter.side is Side.CONSUMER:
        kept = (*kept, (REPLAY_FOR, (to or letter.consumer).encode()))
    return replace(letter, headers=pack_headers(kept))


def carry_out(
    connection: Connection,
    letters: Sequence[DeadLetter],
    decisions: Sequence[Decision],
    *,
    by: str,
    to: str | None = None,
    payloads: Mapping[UUID, bytes] | None = None,
) -> None:
    """Writes what was decided: outbox rows, states of letters, requests to the relay.

    Transaction: joins the caller's, which has locked the letters; does not commit.

    Args:
        connection: the caller's.
        letters: in the order in which they go out.
        decisions: about them.
        by: who asks.
        to: another consumer than the one that failed.
        payloads: repaired payloads, by letter.
    """
    actions = {decision.id: decision.action for decision in decisions}
    going = [letter for letter in letters if actions[letter.id] != "none"]
    heads = [letter for letter in going if actions[letter.id] == "repair"]
    repaired = _repair(connection, going, payloads or {})
    final = {letter.id: repaired.get(letter.id, letter) for letter in going}
    sent = [final[letter.id] for letter in going if actions[letter.id] == "publish"]
    if to is None:
        inbox.unblock(connection, {_identity(one) for one in sent if one.side is Side.CONSUMER and one.message_id})
    outbox.rewrite(connection, [outgoing(letter, to) for letter in sent])
    failpoint("replay.written")
    for head in heads:
        _ask_for_repair(connection, head, by)
    under_way = {one.id for old, one in final.items() if one.side is Side.CONSUMER or actions[old] == "repair"}
    _set_state(connection, under_way, state=State.REPLAYING, replaying_since=database_now(), replay_to=to)
    closed = ({one.id for one in final.values()} | {*final}) - under_way
    _set_state(connection, closed, state=State.REPLAYED, closed_at=database_now())
    failpoint("replay.claimed")


def audit(connection: Connection, action: str, ids: Sequence[UUID], *, by: str, why: str) -> None:
    """Writes who did what with which letters.

    Transaction: joins the caller's; does not commit.
    """
    target = " ".join(map(str, ids))
    connection.execute(tables.outbox_audit.insert().values(who=by, action=action, target=target, why=why))


def _repair(
    connection: Connection, letters: Sequence[DeadLetter], payloads: Mapping[UUID, bytes]
) -> dict[UUID, DeadLetter]:
    """Stores a repaired letter for each that has a payload; returns them by the letters that they are made of."""
    children = {letter.id: _repaired(letter, payloads[letter.id]) for letter in letters if letter.id in payloads}
    for child in children.values():
        store(connection, child)
    return children


def _repaired(letter: DeadLetter, payload: bytes) -> DeadLetter:
    # The new id goes into the headers also where there was none: else a Consumer(message_id=…) would find the old one.
    new_id = str(uuid4())
    others = tuple(header for header in unpack_headers(letter.headers) if header[0] != "ce_id")
    return replace(
        letter,
        id=uuid4(),
        message_id=new_id,
        headers=pack_headers((("ce_id", new_id.encode()), *others)),
        payload=payload,
        parent_id=letter.id,
        generation=letter.generation + 1,
    )


def _identity(letter: DeadLetter) -> tuple[str, str, str]:
    return letter.consumer, letter.source, letter.message_id


def _ask_for_repair(connection: Connection, head: DeadLetter, by: str) -> None:
    stopped = tables.outbox_stopped_keys
    this = and_(stopped.c.topic == head.topic, stopped.c.key == head.key)
    connection.execute(update(stopped).where(this).values(request=Request.REPAIR, requested_by=by))


def _set_state(connection: Connection, ids: Collection[UUID], **values: Any) -> None:
    some = sorted(ids)
    for start in range(0, len(some), _IDS_AT_ONCE):
        these = _LETTERS.c.id.in_(some[start : start + _IDS_AT_ONCE])
        connection.execute(update(_LETTERS).where(these).values(values))
