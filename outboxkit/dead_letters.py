"""Dead letters: messages that could not be published or handled, understood, repaired and replayed from here.

Invariants: the original bytes never change. A consumer's letter and its inbox row exclude each other's effect: a message
is dead or its effect is committed, never both. States go ``dead → replaying → replayed`` or ``dead → discarded``; a replay
that dies again is a new letter with ``parent_id`` and the next ``generation``, and its parent is ``replayed``: the replay
was carried out, the child tells how it ended.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID, uuid4

from sqlalchemy import and_, func, select, update

from outboxkit import inbox, outbox, tables
from outboxkit.codecs import codec_named
from outboxkit.errors import CodecError, OutboxKitError, ReplayError, SchemaError, SchemaNotFound
from outboxkit.events import EventType
from outboxkit.failpoints import failpoint
from outboxkit.message import REPLAY_FOR, Headers, Message, content_hash, from_wire, pack_headers, unpack_headers
from outboxkit.policy import Failure
from outboxkit.schemas import check, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement, Connection

    from outboxkit.message import Row

__all__ = [
    "MOST_GENERATIONS",
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
    "group",
    "of_row",
    "replay",
    "schema_problems",
    "settled",
]

MOST_GENERATIONS: Final = 3  #: replays of one message before it takes ``force`` to go on: stops loops
_ERROR_LENGTH: Final = 2_000
_MOST_PROBLEMS: Final = 20
_PROBLEM_LENGTH: Final = 500
_LETTERS: Final = tables.dead_letters
_REPLACED: Final = (REPLAY_FOR, "outboxkit-attempt", "ce_sequence", "ce_recordedtime")  # the relay adds new ones


class Side(StrEnum):
    """Who gave up."""

    RELAY = "relay"
    CONSUMER = "consumer"


class State(StrEnum):
    """What became of a letter."""

    DEAD = "dead"
    REPLAYING = "replaying"  #: its outbox row is written, or the relay is asked to bring it back
    REPLAYED = "replayed"
    DISCARDED = "discarded"


class Stage(StrEnum):
    """Where on its way a message failed."""

    PUBLISH = "publish"
    READ = "read"  #: its headers
    ADMIT = "admit"
    DECODE = "decode"
    HANDLER = "handler"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One dead letter: the original, the failure, the schema facts. Named as the columns of ``dead_letters``.

    Attributes:
        headers: the original headers, packed (`outboxkit.message.unpack_headers`).
        error: our own words; never a text of a foreign error, which may quote data.
        fingerprint: the same for letters that have the same cause.
        problems: why the reader's schema cannot read the writer's.
    """

    id: UUID
    side: Side
    topic: str
    key: bytes | None
    message_id: str
    type: str
    kind: str
    headers: bytes
    payload: bytes | None
    failure: Failure
    stage: Stage
    error_class: str
    error: str
    attempts: int
    fingerprint: str
    consumer: str = ""
    source: str = ""
    origin: str = ""
    position: int | None = None
    path: str = ""
    byte_offset: int | None = None
    writer_schema: str = ""
    reader_schema: str = ""
    problems: Any = None
    state: State = State.DEAD
    generation: int = 0
    parent_id: UUID | None = None
    first_failed_at: datetime | None = None
    died_at: datetime | None = None
    closed_at: datetime | None = None

    @property
    def message(self) -> Message:
        """The message as its consumer saw it.

        Raises:
            DecodeError: its headers cannot be read.
        """
        return from_wire(self.topic, self.key, unpack_headers(self.headers), self.payload or b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters: by stable fields only, never by text. None and empty mean any."""

    state: State | None = State.DEAD
    side: Side | None = None
    consumer: str | None = None
    type: str | None = None
    topic: str | None = None
    key: bytes | None = None
    message_id: str | None = None
    stage: Stage | None = None
    error_class: str | None = None
    fingerprint: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def clause(self) -> ColumnElement[bool]:
        """The condition."""
        times = {"since": _LETTERS.c.died_at.__ge__, "until": _LETTERS.c.died_at.__lt__}
        given = {field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None}
        return and_(True, *(times.get(name, _LETTERS.c.get(name).__eq__)(value) for name, value in given.items()))  # type: ignore[union-attr]


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
    if letter.side is Side.CONSUMER and letter.message_id and letter.failure is not Failure.CONFLICT:
        if not inbox.condemn(connection, letter.consumer, letter.source, letter.message_id, content_hash(letter.message)):
            return None
    if parent is not None:
        _close(connection, parent.id, State.REPLAYED)
        letter = replace(letter, parent_id=parent.id, generation=parent.generation + 1)
    _insert(connection, letter)
    return letter


def of_row(row: Row, failure: Failure, text: str, attempts: int) -> DeadLetter:
    """The letter of an outbox row that the broker will never take."""
    headers = tuple(unpack_headers(row.headers))
    message = from_wire(row.topic, row.key, headers, row.payload)
    return DeadLetter(
        id=uuid4(),
        side=Side.RELAY,
        topic=row.topic,
        key=row.key,
        message_id=message.id or str(row.id),
        source=message.source,
        type=row.type,
        kind=row.kind,
        headers=row.headers,
        payload=row.payload,
        origin=f"outbox position {row.position}",
        position=row.position,
        failure=failure,
        stage=Stage.PUBLISH,
        error_class=failure.value,
        error=text,
        attempts=attempts,
        fingerprint=group("", row.type, failure.value, row.topic),
        writer_schema=message.schema,
    )


def group(consumer: str, type_name: str, error_class: str, place: str) -> str:
    """The fingerprint of a cause: the same for the same error at the same place."""
    return hashlib.sha256("\0".join((consumer, type_name, error_class, place)).encode()).hexdigest()[:16]


def settled(connection: Connection, consumer: str, message: Message) -> None:
    """Closes the letter whose replay this consumer has handled.

    Transaction: joins the handler's: the letter is replayed if and only if the effect is committed.
    """
    mine = and_(_LETTERS.c.consumer == consumer, _LETTERS.c.message_id == message.id, _LETTERS.c.source == message.source)
    this = and_(mine, _LETTERS.c.side == Side.CONSUMER, _LETTERS.c.state == State.REPLAYING)
    connection.execute(update(_LETTERS).where(this).values(state=State.REPLAYED, closed_at=tables.database_now()))


def schema_problems(reader: str, writer: str) -> list[dict[str, str]]:
    """Why a reader's Avro schema cannot read a writer's, as JSON, capped. Never raises."""
    try:
        found = [problem for problem in check(parse(reader), parse(writer)) if problem.is_error]
    except OutboxKitError as error:
        return [{"kind": error.code, "message": error.message[:_PROBLEM_LENGTH]}]
    return [
        {"kind": p.kind.value, "field": p.reader_path, "message": p.message[:_PROBLEM_LENGTH], "fix": p.fix}
        for p in found[:_MOST_PROBLEMS]
    ]


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
    values = {"state": state, "closed_at": tables.database_now()}
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter_id).values(values))


# --- looking -----------------------------------------------------------------------------------------------------


def find(connection: Connection, which: Filter, *, limit: int = 100) -> list[DeadLetter]:
    """Letters, the newest first.

    Transaction: joins the caller's.
    """
    query = select(_LETTERS).where(which.clause()).order_by(_LETTERS.c.died_at.desc(), _LETTERS.c.id).limit(limit)
    return [_letter(row._mapping) for row in connection.execute(query)]


def count(connection: Connection, which: Filter) -> int:
    """How many letters `find` would find without a limit.

    Transaction: joins the caller's.
    """
    return connection.execute(select(func.count()).select_from(_LETTERS).where(which.clause())).scalar_one()


def get(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    """One letter, or None.

    Transaction: joins the caller's.
    """
    row = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id)).one_or_none()
    return None if row is None else _letter(row._mapping)


def _letter(row: Any) -> DeadLetter:
    enums: dict[str, Callable[[Any], Any]] = {"side": Side, "state": State, "stage": Stage, "failure": Failure}
    values: dict[str, Any] = {field.name: row[field.name] for field in fields(DeadLetter)}
    return DeadLetter(**values | {name: enum(values[name]) for name, enum in enums.items()})


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
            _carry_out(connection, letter, plan, request.payload, by)
        plans.append(plan)
    if plans and all(plan.refused for plan in plans):
        raise ReplayError(plans[0].reason)
    if not dry_run:
        _audit(connection, "dlq.replay", by, why, [plan.id for plan in plans if plan.action != "none"])
    return plans


def discard(connection: Connection, ids: Sequence[UUID], *, by: str, why: str) -> int:
    """Closes dead letters without a replay; returns how many were dead.

    Transaction: joins the caller's; does not commit.
    """
    dead = and_(_LETTERS.c.id.in_(ids), _LETTERS.c.state == State.DEAD)
    values = {"state": State.DISCARDED, "closed_at": tables.database_now()}
    _audit(connection, "dlq.discard", by, why, ids)
    return connection.execute(update(_LETTERS).where(dead).values(values)).rowcount


def _locked(connection: Connection, letter_id: UUID) -> DeadLetter | None:
    row = connection.execute(select(_LETTERS).where(_LETTERS.c.id == letter_id).with_for_update()).one_or_none()
    return None if row is None else _letter(row._mapping)


def _plan(connection: Connection, letter_id: UUID, letter: DeadLetter | None, request: _Request) -> Plan:
    if letter is None:
        return Plan(id=letter_id, action="none", reason=f"there is no dead letter {letter_id}", refused=True)
    if letter.state is State.REPLAYING and not request.force:
        return Plan(id=letter_id, action="none", reason="it is being replayed already")
    refusal = _refusal(connection, letter, request)
    if refusal:
        return Plan(id=letter_id, action="none", reason=refusal, refused=True)
    return Plan(id=letter_id, action="repair" if _is_parked(connection, letter) and request.payload is None else "publish")


def _refusal(connection: Connection, letter: DeadLetter, request: _Request) -> str:
    if letter.state in (State.REPLAYED, State.DISCARDED):
        return f"{letter.id} is {letter.state.value}"
    if not request.force and letter.generation >= MOST_GENERATIONS:
        return f"{letter.id} was replayed {letter.generation} times and died each time; force it to go on"
    if letter.payload is None and request.payload is None:
        return f"{letter.id} has no payload (a tombstone): there is nothing to publish"
    if letter.side is Side.RELAY:
        return ""
    if not request.force and _is_forgotten(connection, letter, request.horizon):
        return f"{letter.id} is older than the inbox remembers ({request.horizon}); force it if it had no effect"
    return _unreadable(connection, letter, request)


def _is_forgotten(connection: Connection, letter: DeadLetter, horizon: timedelta) -> bool:
    old = and_(_LETTERS.c.id == letter.id, _LETTERS.c.first_failed_at < tables.database_now(-horizon))
    return connection.execute(select(_LETTERS.c.id).where(old)).one_or_none() is not None


def _unreadable(connection: Connection, letter: DeadLetter, request: _Request) -> str:
    """Why the consumer's current reader cannot read the message, naming the field; empty when it can."""
    schemas = tables.outbox_schemas
    current = and_(schemas.c.role == "reader", schemas.c.consumer == letter.consumer, schemas.c.type == letter.type)
    reader = connection.execute(select(schemas.c.text).where(current).order_by(schemas.c.seen_at.desc()).limit(1)).scalar()
    writers: list[str] = []

    def resolve(name: str) -> str:
        writers.append(_writer_text(connection, name, request.resolve))
        return writers[-1]

    try:
        message = replace(letter.message, payload=letter.payload if request.payload is None else request.payload)  # type: ignore[arg-type]
        if reader is not None and "json" not in message.content_type:
            contract = EventType(name=letter.type, schema=json.loads(reader), codec="avro")
            codec_named("avro").decode(message, contract, resolve)
    except (CodecError, SchemaError) as error:
        problems = schema_problems(reader or "", writers[-1]) if writers else []
        places = "; ".join(f"{p['field']}: {p['message']}" for p in problems if "field" in p)
        return f"{letter.consumer} cannot read {letter.type} yet: {places or error.message}"
    return ""


def _writer_text(connection: Connection, name: str, resolve: Callable[[str], str] | None) -> str:
    schemas = tables.outbox_schemas
    known = select(schemas.c.text).where(schemas.c.fingerprint == name).limit(1)
    if (text := connection.execute(known).scalar()) is not None:
        return str(text)
    if resolve is None:
        raise SchemaNotFound(f"the writer's schema {name} is in no table; give its text by a registry")
    return resolve(name)


def _is_parked(connection: Connection, letter: DeadLetter) -> bool:
    stopped = tables.outbox_stopped_keys
    head = and_(stopped.c.topic == letter.topic, stopped.c.key == letter.key, stopped.c.position == letter.position)
    found = connection.execute(select(stopped.c.position).where(head, stopped.c.reason == "parked"))
    return letter.side is Side.RELAY and found.one_or_none() is not None


def _carry_out(connection: Connection, letter: DeadLetter, plan: Plan, payload: bytes | None, by: str) -> None:
    _close_as = State.REPLAYED if letter.side is Side.RELAY else State.REPLAYING
    if plan.action == "repair":
        stopped = tables.outbox_stopped_keys
        this = and_(stopped.c.topic == letter.topic, stopped.c.key == letter.key)
        connection.execute(update(stopped).where(this).values(request="repair", requested_by=by))
        _close_as = State.REPLAYING  # the relay closes it when it has put the message back
    elif payload is None:
        _publish(connection, letter)
    else:
        child = _repaired(letter, payload)
        _insert(connection, replace(child, state=_close_as))
        _publish(connection, child)
        _close_as = State.REPLAYED  # the child goes on
    closed = None if _close_as is State.REPLAYING else tables.database_now()
    connection.execute(update(_LETTERS).where(_LETTERS.c.id == letter.id).values(state=_close_as, closed_at=closed))
    failpoint("replay.claimed")


def _repaired(letter: DeadLetter, payload: bytes) -> DeadLetter:
    new_id = str(uuid4())
    headers = ((name, new_id.encode() if name == "ce_id" else value) for name, value in unpack_headers(letter.headers))
    return replace(
        letter, id=uuid4(), message_id=new_id, headers=pack_headers(tuple(headers)), payload=payload, parent_id=letter.id,
        generation=letter.generation + 1,
    )


def _publish(connection: Connection, letter: DeadLetter) -> None:
    kept: Headers = tuple(header for header in unpack_headers(letter.headers) if header[0] not in _REPLACED)
    if letter.side is Side.CONSUMER:
        kept = (*kept, (REPLAY_FOR, letter.consumer.encode()))
        inbox.pardon(connection, letter.consumer, letter.source, letter.message_id)
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


def _audit(connection: Connection, action: str, by: str, why: str, ids: Sequence[UUID]) -> None:
    target = " ".join(str(letter_id) for letter_id in ids)
    connection.execute(tables.outbox_audit.insert().values(who=by, action=action, target=target, why=why))
