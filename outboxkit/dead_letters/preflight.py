"""Preflight: whether a letter may be replayed, decided from facts that are read for many letters at once.

What is refused is refused with a reason that says what to do. `force` takes the operator's word for what cannot be
known; it never sends what a schema shows to be unreadable.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final
from uuid import UUID

from sqlalchemy import and_, func, select

from outboxkit import inbox, schema_store, tables
from outboxkit._sql import Instant, database_now
from outboxkit.codecs import codec_named
from outboxkit.dead_letters.letter import DeadLetter, Side, Stage, State
from outboxkit.errors import CodecError, DecodeError, SchemaError
from outboxkit.events import EventType
from outboxkit.inbox.rename import IS_START
from outboxkit.policy import Failure, duration
from outboxkit.rows import StopReason

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit.message import Message

__all__ = ["MAX_REPLAYS", "Decision", "Terms", "decide"]

MAX_REPLAYS: Final = 3  #: replays of one message before it takes ``force`` to go on: stops loops
_INBOX_RETENTION: Final = timedelta(days=14)
_ABSENCE: Final = timedelta(days=7)
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
_READING: Final = (Stage.READ, Stage.DECODE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The way that a replay takes with one letter.

    Attributes:
        id: of the letter.
        action: ``publish`` (a new outbox row), ``repair`` (the relay puts it back before its followers), ``none``.
        reason: the refusal, or what else is to be known; empty when there is nothing to say.
        refused: whether the reason is a refusal.
    """

    id: UUID
    action: str
    reason: str = ""
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The terms of a replay.

    Attributes:
        force: also what the inbox may have forgotten, what was replayed too often, what is being replayed now, what
            has expired, what is for a consumer that nobody has seen, and what the consumer that runs now could not
            read.
        to: another consumer than the one that failed.
        resolve: schema text for a fingerprint that ``outbox_schemas`` does not know.
        inbox_retention: how long inboxes remember; text such as ``14d`` is read.
        absence: how long a consumer may not have been seen before it counts as gone; likewise.

    Raises:
        ConfigurationError: a duration is none.
    """

    force: bool = False
    to: str | None = None
    resolve: Callable[[str], str] | None = None
    inbox_retention: timedelta = _INBOX_RETENTION
    absence: timedelta = _ABSENCE

    def __post_init__(self) -> None:
        for name in ("inbox_retention", "absence"):
            object.__setattr__(self, name, duration(getattr(self, name), name=f"Terms({name}=…)"))


def decide(
    connection: Connection, letters: Sequence[DeadLetter], terms: Terms, payloads: Mapping[UUID, bytes] | None = None
) -> list[Decision]:
    """Decides what a replay would do with each of these letters.

    Transaction: joins the caller's; reads only.

    Args:
        connection: the caller's.
        letters: as they are now.
        terms: of the replay.
        payloads: repaired payloads, by letter.
    """
    preflight = _Preflight(connection, letters, terms)
    return [preflight.decide(letter, (payloads or {}).get(letter.id)) for letter in letters]


class _Preflight:
    """The facts that decide about some letters, read once for all of them."""

    def __init__(self, connection: Connection, letters: Sequence[DeadLetter], terms: Terms) -> None:
        self.connection, self.terms = connection, terms
        handled_ones = [letter for letter in letters if letter.side is Side.CONSUMER]
        names = {terms.to or letter.consumer for letter in handled_ones}
        identities = {(one.consumer, one.source, one.message_id) for one in handled_ones if one.message_id}
        self.now: datetime = connection.execute(select(database_now())).scalar_one()
        self.handled = inbox.handled(connection, identities)
        self.parked = _parked(connection) if len(handled_ones) < len(letters) else set()
        self.gone = _gone(connection, names, terms.absence)
        self.started = _started(connection)
        self.readers: dict[tuple[str, str], str | None] = {}

    def decide(self, letter: DeadLetter, payload: bytes | None) -> Decision:
        """Decides about one letter; ``payload`` is a repaired one."""
        if letter.state is State.REPLAYING and not self.terms.force:
            return Decision(id=letter.id, action="none", reason="it is being replayed already")
        refusal = self._closed(letter, payload) or self._receiver(letter, payload) or self._content(letter, payload)
        if refusal:
            return Decision(id=letter.id, action="none", reason=refusal, refused=True)
        is_head = letter.side is Side.RELAY and (letter.topic, letter.key, letter.source_position) in self.parked
        return Decision(id=letter.id, action="repair" if is_head else "publish")

    def _closed(self, letter: DeadLetter, payload: bytes | None) -> str:
        if letter.state in (State.REPLAYED, State.DISCARDED):
            return f"{letter.id} is {letter.state.value}"
        if not self.terms.force and letter.generation >= MAX_REPLAYS:
            return f"{letter.id} was replayed {letter.generation} times and died each time; force it to go on"
        if letter.payload is None and payload is None:
            return f"{letter.id} has no payload (a tombstone): there is nothing to publish"
        return ""

    def _receiver(self, letter: DeadLetter, payload: bytes | None) -> str:
        """Says why the consumer cannot or need not have it."""
        if letter.side is Side.RELAY:
            return ""
        if not self.terms.force and (absence := self.gone.get(self.terms.to or letter.consumer)):
            return absence
        is_same = payload is None and self.terms.to is None
        if is_same and (letter.consumer, letter.source, letter.message_id) in self.handled:
            if letter.failure is Failure.CONFLICT:
                return f"{letter.id} has the id of another message, which was handled: a repaired payload gets a new id"
            return f"{letter.consumer} has handled the message of {letter.id} already: discard it"
        horizon = self.terms.inbox_retention
        if not self.terms.force and letter.first_failed_at and letter.first_failed_at < self.now - horizon:
            return f"{letter.id} is older than the inbox remembers ({horizon}); force it if it had no effect"
        return ""

    def _content(self, letter: DeadLetter, payload: bytes | None) -> str:
        """Says why the message cannot be read, or is not wanted any more."""
        try:
            message = letter.message if payload is None else replace(letter.message, payload=payload)
        except DecodeError as error:
            return f"the headers of {letter.id} cannot be read: {error.message}"
        if payload is not None and (fault := self._invalid(message)):
            return f"the repaired payload is not valid: {fault}"
        if not self.terms.force and message.expires_at is not None and message.expires_at < self.now:
            return f"{letter.id} expired at {message.expires_at:%Y-%m-%d %H:%M:%S}; force it if it is still wanted"
        if payload is None and (doubt := self._as_before(letter, message)):
            return doubt
        return self._unreadable(letter, message)

    def _as_before(self, letter: DeadLetter, message: Message) -> str:
        """Says that what could not be read, and has no schema to check, would come to the same run again."""
        if self.terms.force or self.terms.to or letter.stage not in _READING or self._reader(letter, message):
            return ""
        started = self.started.get(letter.consumer)
        if letter.died_at is None or started is None or started > letter.died_at:
            return ""
        return (
            f"{letter.consumer}, as it runs now, could not read {letter.id}: "
            "stop it and start what can read it, repair the payload, or force it"
        )

    def _invalid(self, message: Message) -> str:
        """Says why a repaired payload is not what its content type says; empty when it is."""
        try:
            if "json" in message.content_type:
                json.loads(message.payload)
            elif message.schema or "avro" in message.content_type:
                contract = EventType(name=message.type, codec="avro")
                codec_named("avro").decode(message, contract, self._schema_text)
        except UnicodeDecodeError as error:
            return f"it is not UTF-8 at byte {error.start}"
        except json.JSONDecodeError as error:
            return f"it is not JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        except (CodecError, SchemaError) as error:
            return error.message
        return ""

    def _schema_text(self, name: str) -> str:
        return schema_store.schema_text(self.connection, name, self.terms.resolve)

    def _unreadable(self, letter: DeadLetter, message: Message) -> str:
        reader = self._reader(letter, message)
        fault = schema_store.unreadable(self.connection, reader, message, self.terms.resolve) if reader else ""
        return f"{self.terms.to or letter.consumer} cannot read {message.type} yet: {fault}" if fault else ""

    def _reader(self, letter: DeadLetter, message: Message) -> str | None:
        """The schema that it will be read with, None when it is read without one."""
        if letter.side is Side.RELAY or "json" in message.content_type:
            return None
        wanted = (self.terms.to or letter.consumer, message.type)
        if wanted not in self.readers:
            self.readers[wanted] = schema_store.current(self.connection, *wanted)
        return self.readers[wanted]


# --- facts -------------------------------------------------------------------------------------------------------


def _parked(connection: Connection) -> set[tuple[str, bytes, int]]:
    stopped = tables.outbox_stopped_keys.c
    found = connection.execute(
        select(stopped.topic, stopped.key, stopped.position).where(stopped.reason == StopReason.PARKED)
    )
    return {(topic, bytes(key), position) for topic, key, position in found}


def _gone(connection: Connection, names: set[str], absence: timedelta) -> dict[str, str]:
    """Says for each consumer that nobody has seen so. Where no start is recorded at all, nothing is known."""
    consumers = tables.inbox_consumers.c
    latest = func.max(consumers.expires_at, type_=Instant())
    lately = select(consumers.consumer, latest.label("seen")).where(IS_START)
    rows = connection.execute(lately.group_by(consumers.consumer)).all()
    seen: dict[str, datetime] = {row.consumer: row.seen for row in rows}
    recent = connection.execute(select(database_now(-absence))).scalar_one()
    here = ", ".join(sorted(name for name, at in seen.items() if at >= recent)) or "none"
    return {
        name: f"no consumer named {name} {_last(seen.get(name))}, so that nobody would handle it: "
        f"name the one that does (seen lately: {here}), or force it"
        for name in names
        if seen and seen.get(name, _NEVER) < recent
    }


def _started(connection: Connection) -> dict[str, datetime]:
    """The last start of each consumer that runs."""
    consumers = tables.inbox_consumers.c
    runs = and_(consumers.stopped_at.is_(None), consumers.expires_at > database_now())
    latest = func.max(consumers.started_at, type_=Instant()).label("at")
    rows = connection.execute(select(consumers.consumer, latest).where(runs).group_by(consumers.consumer))
    return {row.consumer: row.at for row in rows}


def _last(seen: datetime | None) -> str:
    return "was ever started" if seen is None else f"was seen since {seen.astimezone(UTC):%Y-%m-%d}"
