"""Steps of one message: what each table tells of it, as sentences with their times. No payloads."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import literal, select, tuple_

from outboxkit import dead_letters, outbox, tables
from outboxkit._sql import contains_bytes
from outboxkit.dead_letters import DeadLetter, Filter, State, progress
from outboxkit.inbox.rows import DEAD, OURS
from outboxkit.rows import WaitReason
from outboxkit_relay.diagnose import find_message
from outboxkit_relay.words import count, instant

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sqlalchemy import Connection

    from outboxkit.message import Message

__all__ = ["Step", "emitted", "steps_of"]

_MAX: Final = 100  # rows of one kind
_INBOX: Final = tables.inbox_messages.c
_ROOM: Final = tables.inbox_waiting
_ITEMS: Final = tables.dead_letter_replay_items
_REPLAYS: Final = tables.dead_letter_replays.c
_AUDIT: Final = tables.outbox_audit


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that happened to a message, or is so now.

    Attributes:
        at: when it happened; None for what is so now.
        message_id: of the message.
        what: ``emitted``, ``published``, ``handled``, ``failed``, ``died``, ``replay``, ``closed``, ``operator``,
            ``waits``.
        text: a sentence for people, without payload.
        facts: the same for machines.
    """

    at: datetime | None
    message_id: str
    what: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def emitted(message: Message) -> Step:
    """Tells of the emit of a message that is still stored somewhere."""
    key = "no key" if message.key is None else f"key {message.key.decode('utf-8', 'backslashreplace')}"
    caused = f", caused by {message.causation_id}" if message.causation_id else ""
    facts = {"topic": message.topic, "type": message.type, "source": message.source, "causation": message.causation_id}
    return Step(
        at=message.occurred_at or message.recorded_at or _made_at(message.id),
        message_id=message.id,
        what="emitted",
        text=f"{message.type or 'a message without a type'} to {message.topic}, {key}{caused}",
        facts={**facts, "correlation": message.correlation_id},
    )


def steps_of(connection: Connection, message_id: str) -> list[Step]:
    """Reads all that the tables tell of one message, in no order.

    Transaction: joins the caller's; reads only. Index used: of the inbox the primary key, of letters and ledger
    theirs; of the outbox and both waiting rooms none.
    """
    return [
        *_on_the_way_out(connection, message_id),
        *_handled(connection, message_id),
        *_retried(connection, message_id),
        *_dead(connection, message_id),
    ]


def _made_at(message_id: str) -> datetime | None:
    return find_message.made_at(outbox.stored_id(message_id))


# --- the relay's side --------------------------------------------------------------------------------------------


def _on_the_way_out(connection: Connection, message_id: str) -> Iterator[Step]:
    for place in find_message.find(connection, message_id):
        if place["place"] == "broker":
            yield _published(message_id, place)
        elif place["place"] == "outbox":
            alive = "" if progress.is_relay_alive(connection) else ": no relay is alive"
            text = f"in the outbox for {place['topic']}, recorded {_read(place['since'])}{alive}"
            yield Step(at=None, message_id=message_id, what="waits", text=text, facts=place)
        elif place["place"] == "waiting":
            yield Step(at=None, message_id=message_id, what="waits", text=_waiting(place), facts=place)


def _published(message_id: str, place: dict[str, Any]) -> Step:
    there = place["topic"] if place["offset"] < 0 else f"{place['topic']}[{place['partition']}]@{place['offset']}"
    by = f"by the relay {place['relay'][:8]}"
    text = f"acknowledged by the broker at {there}, {by}"
    if place["outcome"] != "published":
        text = f"{place['outcome']}: taken out of the outbox for {place['topic']}, {by}"
    at = datetime.fromisoformat(place["since"])
    return Step(at=at, message_id=message_id, what=place["outcome"], text=text, facts=place)


def _waiting(place: dict[str, Any]) -> str:
    if place["reason"] == "scheduled":
        return f"scheduled for {_read(place['due_at'])}, to {place['topic']}"
    if place["reason"] == "follower":
        return f"behind the failed head of its key in {place['topic']} (the key is {place['key']})"
    tried = f"tried {count(place['attempts'], 'time')} to {place['topic']}"
    return f"{tried}, again at {_read(place['due_at'])}: {place['error']}"


def _read(at: str | None) -> str:
    return "-" if at is None else instant(datetime.fromisoformat(at))


# --- the consumers' side -----------------------------------------------------------------------------------------


def _handled(connection: Connection, message_id: str) -> Iterator[Step]:
    for consumer, source in list(_inboxes(connection)):
        mine = (_INBOX.consumer == consumer, _INBOX.source == source, _INBOX.message_id == message_id)
        row = connection.execute(select(_INBOX.handled_at, _INBOX.outcome).where(*mine)).one_or_none()
        outcome = bytes(row.outcome or b"") if row else DEAD
        if row is None or outcome == DEAD:  # of a dead one the letter tells
            continue
        is_open = outcome.startswith(OURS)
        text = f"{consumer} has claimed it and not finished: its replay is under way" if is_open else f"by {consumer}"
        facts = {"consumer": consumer, "source": source}
        what, at = ("waits", None) if is_open else ("handled", row.handled_at)
        yield Step(at=at, message_id=message_id, what=what, text=text, facts=facts)


def _inboxes(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yields each (consumer, source) by one look into the primary key: there are few, and millions of rows."""
    pair = tuple_(_INBOX.consumer, _INBOX.source)
    first = select(_INBOX.consumer, _INBOX.source).order_by(_INBOX.consumer, _INBOX.source).limit(1)
    found = connection.execute(first).one_or_none()
    while found is not None:
        yield found.consumer, found.source
        found = connection.execute(first.where(pair > tuple_(*map(literal, found)))).one_or_none()


def _retried(connection: Connection, message_id: str) -> Iterator[Step]:
    room = _ROOM.c
    columns = (room.consumer, room.topic, room.key, room.headers, room.origin, room.reason, room.due_at)
    found = select(*columns, room.attempts, room.error, room.first_failed_at)
    for row in connection.execute(found.where(contains_bytes(room.headers, message_id.encode())).limit(_MAX)):
        if find_message.id_of(row.headers) != message_id:
            continue
        facts = {"consumer": row.consumer, "origin": row.origin, "reason": row.reason, "attempts": row.attempts}
        if row.attempts:
            yield Step(
                at=row.first_failed_at,
                message_id=message_id,
                what="failed",
                text=f"at {row.consumer}, from {row.origin}",
                facts=facts,
            )
        yield Step(at=None, message_id=message_id, what="waits", text=_in_the_room(row), facts=facts)


def _in_the_room(row: Any) -> str:
    if row.reason == WaitReason.RETRY:
        so_far = f"{count(row.attempts, 'attempt')} so far, {row.error}"
        return f"{row.consumer} tries it again at {instant(row.due_at)}: {so_far}"
    what = "it is dead and keeps its place" if row.reason == WaitReason.PARKED else "behind the head of its key"
    return f"at {row.consumer}: {what}"


# --- dead letters ------------------------------------------------------------------------------------------------


def _dead(connection: Connection, message_id: str) -> Iterator[Step]:
    letters = dead_letters.find(connection, Filter(state=None, message_id=message_id), limit=_MAX)
    for letter in letters:
        parent = dead_letters.get(connection, letter.parent_id) if letter.parent_id else None
        original = parent if parent is not None and parent.message_id != message_id else None
        if original is None:
            yield from _died(letter)
        else:
            yield _repaired(letter, letter, f"made of {original.message_id or 'a message without an id'} by a repair")
        yield from _sent_again(letter)
        yield from _replayed(connection, letter)
        yield from _decided(connection, letter)
        for child in dead_letters.find(connection, Filter(state=None, parent_id=letter.id), limit=_MAX):
            if child.message_id != message_id:
                yield _repaired(letter, child, f"repaired as {child.message_id}")


def _repaired(letter: DeadLetter, child: DeadLetter, text: str) -> Step:
    """Tells of a repair: the repaired message has an id and a letter of its own, and no death yet."""
    short, facts = str(letter.id)[:8], {"letter": str(letter.id), "repaired": child.message_id}
    at = child.replaying_since or child.closed_at
    return Step(at=at, message_id=letter.message_id, what="replay", text=f"{text} (letter {short})", facts=facts)


def _died(letter: DeadLetter) -> Iterator[Step]:
    who, short = letter.consumer or "the relay", str(letter.id)[:8]
    error = letter.error if letter.error.startswith(letter.error_class) else f"{letter.error_class}: {letter.error}"
    again = f", replay {letter.generation} of it" if letter.generation else ""
    gave_up = f"{who} gave up after {count(letter.attempts, 'attempt')}: {error} (letter {short}{again})"
    failed = (letter.first_failed_at, "failed", f"at {who}, in {letter.stage.value}")
    yield from _steps(letter, failed, (letter.died_at, "died", gave_up))


def _sent_again(letter: DeadLetter) -> Iterator[Step]:
    who, short = letter.replay_to or letter.consumer or "the relay", str(letter.id)[:8]
    state = f"the letter {short} is {letter.state.value}"
    queued = (letter.replaying_since, "replay", f"of the letter {short} to {who} queued")
    yield from _steps(letter, queued, (letter.closed_at, "closed", state))
    if letter.state in (State.DEAD, State.REPLAYING):
        yield Step(at=None, message_id=letter.message_id, what="waits", text=state, facts=_facts(letter))


def _steps(letter: DeadLetter, *told: tuple[datetime | None, str, str]) -> Iterator[Step]:
    """Yields those that have happened."""
    for at, what, text in told:
        if at is not None:
            yield Step(at=at, message_id=letter.message_id, what=what, text=text, facts=_facts(letter))


def _facts(letter: DeadLetter) -> dict[str, Any]:
    state = letter.state.value
    return {"letter": str(letter.id), "consumer": letter.consumer, "group": letter.group, "state": state}


def _replayed(connection: Connection, letter: DeadLetter) -> Iterator[Step]:
    found = (
        select(_ITEMS.c.replay_id, _ITEMS.c.outcome, _ITEMS.c.reason, _ITEMS.c.decided_at, _REPLAYS.requested_by)
        .join(tables.dead_letter_replays, _REPLAYS.id == _ITEMS.c.replay_id)
        .where(_ITEMS.c.letter_id == letter.id)
        .limit(_MAX)
    )
    for row in connection.execute(found):
        why = f": {row.reason}" if row.reason else ""
        text = f"{row.outcome} in the replay {str(row.replay_id)[:8]} of {row.requested_by}{why}"
        facts = {"letter": str(letter.id), "replay": str(row.replay_id), "outcome": row.outcome}
        yield Step(at=row.decided_at, message_id=letter.message_id, what="replay", text=text, facts=facts)


def _decided(connection: Connection, letter: DeadLetter) -> Iterator[Step]:
    named = _AUDIT.c.target.contains(str(letter.id), autoescape=True)
    found = select(_AUDIT).where(_AUDIT.c.action.startswith("dlq."), named).order_by(_AUDIT.c.id).limit(_MAX)
    for row in connection.execute(found):
        why = f": {row.why}" if row.why else ""
        facts = {"letter": str(letter.id), "who": row.who, "action": row.action, "why": row.why}
        text = f"{row.who}: {row.action}{why}"
        yield Step(at=row.at, message_id=letter.message_id, what="operator", text=text, facts=facts)
