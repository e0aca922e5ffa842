"""Dead letters: messages that could not be published or handled, understood, repaired and replayed from here.

Invariants: the original bytes never change. A consumer's message is dead or its effect is committed, never both: the
letter takes the inbox row. States go ``dead → replaying → replayed`` or ``dead → discarded``. A replay that dies again
is a new letter with ``parent_id`` and the next ``generation``; its parent is ``replayed``: the replay was carried out,
the child tells how it ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, select, update

from outboxkit import inbox, outbox, schema_store, tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import database_now
from outboxkit.dead_letters.letter import (
    DeadLetter,
    Filter,
    Side,
    Stage,
    State,
    count,
    find,
    get,
    letter_of,
    of_delivery,
    of_row,
    words_of,
)
from outboxkit.errors import DecodeError, ReplayError
from outboxkit.headers import REPLAY_FOR, pack_headers, unpack_headers
from outboxkit.message import Headers, Message, content_hash
from outboxkit.policy import Failure

if TYPE_CHECKING:
    from sqlalchemy import Connection

__all__ = [
    "MAX_REPLAYS",
    "DeadLetter",
    "Filter",
    "Plan",
    "Side",
    "Stage",
    "State",
    "bury",
    "count",
    "discard",
    "find",
    "get",
    "of_delivery",
    "of_row",
    "replay",
    "settled",
    "words_of",
]

MAX_REPLAYS: Final = 3  #: replays of one message before it takes ``force`` to go on: stops loops
_ERROR_LENGTH: Final = 2_000
_LETTERS: Final = tables.dead_letters
_REPLACED: Final = (REPLAY_FOR, "outboxkit-attempt", "ce_sequence", "ce_recordedtime")  # the relay adds new ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a replay does, or would do, with one letter.

    Attributes:
        id: of the letter.
        action: ``publish`` (a new outbox row), ``repair`` (the relay puts it back before its followers), ``none``.
        reason: why not, or why nothing is left to do; empty when it is done.
        refused: whether the reason is a refusal.
    """

    id: UUID
    action: str
    reason: str = ""
    refused: bool = False


# --- dying -------------------------------------------------------------------------------------------------------


def bury(connection: Connection, letter: DeadLetter) -> DeadLetter | None:
    """Stores a dead letter; None when the message needs none: its effect is committed, or it is dead already.

    Transaction: joins the caller's, which also settles the message; must be committed before the broker is told.
    Guarantee: from the commit on, redeliveries of a consumer's dead message have no effect until it is replayed.

    Writes: ``dead_letters``, ``inbox_messages``. Index used: ``dead_letters_message``.
    """
    parent = _replaying(connection, letter)
    if not _block(connection, letter):
        return None
    if parent is not None:
        _close(connection, parent.id, State.REPLAYED)
        letter = replace(letter, parent_id=parent.id, generation=parent.generation + 1)
    _insert(connection, letter)
    return letter


def settled(connection: Connection, consumer: str, message: Message) -> None:
    """Closes the letter whose replay this consumer has handled.

    Transaction: joins the handler's: the letter is replayed if and only if the effect is committed.
    """
    mine = and_(
        _LETTERS.c.consumer == consumer, _LETTERS.c.message_id == message.id, _LETTERS.c.source == message.source
    )
    this = and_(mine, _LETTERS.c.side == Side.CONSUMER, _LETTERS.c.state == State.REPLAYING)
    connection.execute(update(_LETTERS).where(this).values(state=State.REPLAYED, closed_at=database_now()))


def _block(connection: Connection, letter: DeadLetter) -> bool:
    # A conflict's id belongs to another message, and without an id nothing can be recognised.
    if letter.side is Side.RELAY or not letter.message_id or letter.failure is Failure.CONFLICT:
        return True
    digest = content_hash(letter.message)
    return inbox.block(connection, letter.consumer, source=letter.source, message_id=letter.message_id, digest=digest)


def _replaying(connection: Connection, letter: DeadLetter) -> DeadLetter | None:
    same = Filter(state=State.REPLAYING, side=letter.side, consumer=letter.consumer, message_id=letter.message_id)
    found = find(connection, same, limit=1) if letter.message_id else []
    return found[0] if found and found[0].source == letter.source else None


def _insert(connection: Connection, letter: DeadLetter) -> None:
    values = {field.name: getattr(letter, field.name) for field in fields(letter)}
    # PostgreSQL's text takes no NUL, and foreign headers may hold one; the headers' own bytes are kept as they are.
    clean = {name: value.replace("\0", "\ufffd") if isinstance(value, str) else value for name, value in values.items()}
    clean["error"] = clean["error"][:_ERROR_LENGTH]
    connection.execute(_LETTERS.insert().values({name: value for name, value in clean.items() if value is not None}))


def _close(connection: Connection, letter_id: UUID, state: State) -> None:
    values = {"state": state, "closed_at": database_now()}
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter_id).values(values))


# --- replaying ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A replay as it was asked for."""

    payload: bytes | None
    force: bool
    resolve: Callable[[str], str] | None
    horizon: timedelta


def replay(
    connection: Connection,
    ids: Sequence[UUID],
    *,
    by: str,
    why: str,
    payload: bytes | None = None,
    force: bool = False,
    dry_run: bool = False,
    resolve: Callable[[str], str] | None = None,
    inbox_retention: timedelta = timedelta(days=14),
) -> list[Plan]:
    """Sends dead letters through the outbox again, each to the consumer that failed, under its old id.

    Transaction: joins the caller's; does not commit. Locks the letters.
    Guarantee: a letter's change of state and its outbox row commit together; calling it again does nothing twice.

    Args:
        connection: the caller's.
        ids: which letters; find them by `find` first, so that what was looked at is what is replayed.
        by: who asks, for the audit.
        why: the reason, and the filter that found them, for the audit.
        payload: a repaired payload: the message gets a new id, in a new letter that has the old one as parent.
        force: also what the inbox may have forgotten, what was replayed too often, and what is being replayed now.
        dry_run: tells the same plans and writes nothing.
        resolve: schema text for a fingerprint that ``outbox_schemas`` does not know.
        inbox_retention: how long inboxes remember.

    Raises:
        ReplayError: every letter is refused; it says why the first one is.
    """
    request = _Request(payload=payload, force=force, resolve=resolve, horizon=inbox_retention)
    if payload is not None and len(ids) != 1:
        raise ReplayError(f"a repaired payload belongs to one letter, {len(ids)} were given")
    plans = []
    for letter_id in sorted(ids):  # in one order, so that two replays do not lock crosswise
        letter = _locked(connection, letter_id)
        plan = _plan(connection, letter_id, letter, request)
        if letter is not None and plan.action != "none" and not dry_run:
            _carry_out(connection, letter, request if plan.action == "publish" else None, by)
        plans.append(plan)
    if plans and all(plan.refused for plan in plans):
        raise ReplayError(plans[0].reason)
    if not dry_run:
        _audit(connection, "dlq.replay", [plan.id for plan in plans if plan.action != "none"], by=by, why=why)
    return plans


def discard(connection: Connection, ids: Sequence[UUID], *, by: str, why: str) -> int:
    """Closes dead letters without a replay; returns how many were dead.

    Transaction: joins the caller's; does not commit.
    """
    dead = and_(_LETTERS.c.id.in_(ids), _LETTERS.c.state == State.DEAD)
    values = {"state": State.DISCARDED, "closed_at": database_now()}
    _audit(connection, "dlq.discard", ids, by=by, why=why)
    return connection.execute(update(_LETTERS).where(dead).values(values)).rowcount


def _locked(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    row = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id).with_for_update()).one_or_none()
    return None if row is None else letter_of(row._asdict())


def _plan(connection: Connection, letter_id: UUID, letter: DeadLetter | None, request: _Request) -> Plan:
    if letter is None:
        return Plan(id=letter_id, action="none", reason=f"there is no dead letter {letter_id}", refused=True)
    if letter.state is State.REPLAYING and not request.force:
        return Plan(id=letter_id, action="none", reason="it is being replayed already")
    refusal = _refusal(connection, letter, request)
    if refusal:
        return Plan(id=letter_id, action="none", reason=refusal, refused=True)
    return Plan(
        id=letter_id, action="repair" if _is_parked(connection, letter) and request.payload is None else "publish"
    )


def _refusal(connection: Connection, letter: DeadLetter, request: _Request) -> str:
    if letter.state in (State.REPLAYED, State.DISCARDED):
        return f"{letter.id} is {letter.state.value}"
    if not request.force and letter.generation >= MAX_REPLAYS:
        return f"{letter.id} was replayed {letter.generation} times and died each time; force it to go on"
    if letter.payload is None and request.payload is None:
        return f"{letter.id} has no payload (a tombstone): there is nothing to publish"
    if letter.side is Side.RELAY:
        return ""
    if not request.force and _is_forgotten(connection, letter, request.horizon):
        return f"{letter.id} is older than the inbox remembers ({request.horizon}); force it if it had no effect"
    return _unreadable(connection, letter, request)


def _is_forgotten(connection: Connection, letter: DeadLetter, horizon: timedelta) -> bool:
    old = and_(_LETTERS.c.id == letter.id, _LETTERS.c.first_failed_at < database_now(-horizon))
    return connection.execute(select(_LETTERS.c.id).where(old)).one_or_none() is not None


def _unreadable(connection: Connection, letter: DeadLetter, request: _Request) -> str:
    try:
        message = replace(letter.message, payload=letter.payload if request.payload is None else request.payload)  # type: ignore[arg-type]
    except DecodeError as error:
        return f"the headers of {letter.id} cannot be read: {error.message}"
    return schema_store.refusal(connection, letter.consumer, message, request.resolve)


def _is_parked(connection: Connection, letter: DeadLetter) -> bool:
    stopped = tables.outbox_stopped_keys
    head = and_(stopped.c.topic == letter.topic, stopped.c.key == letter.key, stopped.c.position == letter.position)
    found = connection.execute(select(stopped.c.position).where(head, stopped.c.reason == "parked"))
    return letter.side is Side.RELAY and found.one_or_none() is not None


def _carry_out(connection: Connection, letter: DeadLetter, publish: _Request | None, by: str) -> None:
    state = State.REPLAYED if letter.side is Side.RELAY else State.REPLAYING
    if publish is None:
        stopped = tables.outbox_stopped_keys
        this = and_(stopped.c.topic == letter.topic, stopped.c.key == letter.key)
        connection.execute(update(stopped).where(this).values(request="repair", requested_by=by))
        state = State.REPLAYING  # the relay closes it when it has put the message back
    elif publish.payload is None:
        _publish(connection, letter)
    else:
        child = _repaired(letter, publish.payload)
        _insert(connection, replace(child, state=state))
        _publish(connection, child)
        state = State.REPLAYED  # the child goes on
    closed = None if state is State.REPLAYING else database_now()
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter.id).values(state=state, closed_at=closed))
    failpoint("replay.claimed")


def _repaired(letter: DeadLetter, payload: bytes) -> DeadLetter:
    new_id = str(uuid4())
    headers = ((name, new_id.encode() if name == "ce_id" else value) for name, value in unpack_headers(letter.headers))
    return replace(
        letter,
        id=uuid4(),
        message_id=new_id,
        headers=pack_headers(tuple(headers)),
        payload=payload,
        parent_id=letter.id,
        generation=letter.generation + 1,
    )


def _publish(connection: Connection, letter: DeadLetter) -> None:
    kept: Headers = tuple(header for header in unpack_headers(letter.headers) if header[0] not in _REPLACED)
    if letter.side is Side.CONSUMER:
        kept = (*kept, (REPLAY_FOR, letter.consumer.encode()))
        inbox.unblock(connection, letter.consumer, letter.source, letter.message_id)
    outbox.rewrite(
        connection,
        message_id=letter.message_id,
        topic=letter.topic,
        key=letter.key,
        type_name=letter.type,
        kind=letter.kind,
        payload=letter.payload or b"",
        headers=kept,
    )
    failpoint("replay.written")


def _audit(connection: Connection, action: str, ids: Sequence[UUID], *, by: str, why: str) -> None:
    target = " ".join(str(letter_id) for letter_id in ids)
    connection.execute(tables.outbox_audit.insert().values(who=by, action=action, target=target, why=why))
