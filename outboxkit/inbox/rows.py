"""Rows of the inbox: how a message is claimed and finished, in the caller's transaction."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import and_, bindparam, case, func, literal, select

from outboxkit import tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import ClaimedHere, database_now
from outboxkit.dialects import commits_by_itself, dialect_named
from outboxkit.errors import ConfigurationError, OutboxKitError
from outboxkit.inbox.prepared import Prepared
from outboxkit.message import content_hash

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement, Connection, UpdateBase
    from sqlalchemy.orm import Session, SessionTransaction

    from outboxkit.message import Message

__all__ = [
    "DEAD",
    "KEYS_AT_ONCE",
    "MARK",
    "MAX_ID_BYTES",
    "MAX_OUTCOME_BYTES",
    "MUST_NOT",
    "OURS",
    "REPLAY",
    "THIS",
    "UNFINISHED",
    "Admission",
    "Admitted",
    "Entry",
    "Standing",
    "admit",
    "bounded",
    "entry_of",
    "finish",
    "is_duplicate",
    "mark_of",
    "refuse_autocommit",
    "standing",
]

MAX_OUTCOME_BYTES: Final = 64 * 1024  # an outcome is an answer to repeat, not a place to store documents
MAX_ID_BYTES: Final = 1024  #: of an id and of a source: an index entry has no room for much more
OURS: Final = b"\0outboxkit: "  # begins the outcomes that say something of the row itself
DEAD: Final = OURS + b"dead"  # of a message that had no effect and became a dead letter
UNFINISHED: Final = OURS + b"claimed by "
REPLAY: Final = UNFINISHED + b"its replay"  # of a dead message that was sent again
_tokens: weakref.WeakKeyDictionary[SessionTransaction, bytes] = weakref.WeakKeyDictionary()
KEYS_AT_ONCE: Final = 500  # in one statement: databases bound the number of values
MUST_NOT: Final = "the handler must not roll back or commit, by any door; use session.begin_nested() for what may fail"
_MAX_TRIES: Final = 10  # each means that another transaction rolled back, or a purge ran, between two statements


class Admitted(StrEnum):
    """A message as an inbox knows it."""

    FIRST = "first"  #: nobody handled it: go on, in this transaction
    DUPLICATE = "duplicate"  #: its effect is committed
    CONFLICT = "conflict"  #: its id is taken by other content


class Standing(StrEnum):
    """A message by its row in an inbox: only one that was handled had an effect."""

    HANDLED = "handled"
    DEAD = "dead"  #: it became a dead letter
    OPEN = "open"  #: claimed and not finished: its replay is under way


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer of `admit`; ``outcome`` is what `finish` stored for a duplicate."""

    kind: Admitted
    outcome: bytes | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the inbox: its key, and the hash of what came under it."""

    consumer: str
    source: str
    message_id: str
    digest: bytes | None

    @property
    def key(self) -> tuple[str, str, str]:
        """The primary key."""
        return self.consumer, self.source, self.message_id

    @property
    def bound(self) -> dict[str, str]:
        """The key as parameters of the statements below."""
        return {"of_consumer": self.consumer, "of_source": self.source, "of_id": self.message_id}


# --- statements, made once: to build one costs as much as to run it ----------------------------------------------

_row: Final = tables.inbox_messages.c
THIS: Final = and_(
    _row.consumer == bindparam("of_consumer"),
    _row.source == bindparam("of_source"),
    _row.message_id == bindparam("of_id"),
)
MARK: Final = ClaimedHere(bindparam("unfinished", type_=_row.outcome.type))
_KNOWN: Final = select(_row.content_hash, _row.outcome, MARK.label("mine")).where(THIS)
_FINISH: Final = Prepared(
    lambda _dialect: (
        tables.inbox_messages
        .update()
        .where(THIS, _row.outcome == MARK)
        .values(outcome=bindparam("final", type_=_row.outcome.type))
    )
)
_TAKE_OVER: Final = (
    tables.inbox_messages
    .update()
    .where(THIS, _row.outcome == bindparam("found", type_=_row.outcome.type))
    .values(outcome=MARK, handled_at=database_now())  # the inbox remembers from the effect on, not from its death
)


def _claim(dialect: str) -> UpdateBase:
    """The INSERT of a claim."""
    columns = {"consumer": "of_consumer", "source": "of_source", "message_id": "of_id", "content_hash": "digest"}
    values = {name: bindparam(given, type_=_row[name].type) for name, given in columns.items()}
    return dialect_named(dialect).insert(tables.inbox_messages).on_conflict_do_nothing().values(**values, outcome=MARK)


_CLAIM: Final = Prepared(_claim)


def standing() -> ColumnElement[str]:
    """Returns the `Standing` of a row in ``inbox_messages`` as a column."""
    return case(
        (_row.outcome == literal(DEAD), Standing.DEAD.value),
        (func.substr(_row.outcome, 1, len(UNFINISHED)) == UNFINISHED, Standing.OPEN.value),
        else_=Standing.HANDLED.value,
    )


def entry_of(consumer: str, message: Message) -> Entry:
    """Returns the row that a message has in the inbox of a consumer."""
    return Entry(consumer, message.source, message.id, content_hash(message))


def mark_of(session: Session, connection: Connection) -> bytes:
    """The mark of this transaction's claims. PostgreSQL knows its transactions by number; elsewhere we keep a token."""
    if connection.dialect.name == "postgresql" or (transaction := session.get_transaction()) is None:
        return UNFINISHED
    return UNFINISHED + _tokens.setdefault(transaction, uuid4().bytes)


def admit(session: Session, entry: Entry) -> Admission:
    """Claims a message, as `outboxkit.inbox.admit` says."""
    connection = session.connection()
    refuse_autocommit(connection, entry.consumer)
    bound: dict[str, object] = {**entry.bound, "unfinished": mark_of(session, connection)}
    for _ in range(_MAX_TRIES):
        if _CLAIM.run(connection, bound | {"digest": entry.digest}) == 1:
            failpoint("inbox.inserted")
            return Admission(Admitted.FIRST)
        if (found := connection.execute(_KNOWN, bound).first()) is not None:
            if None not in (found.content_hash, entry.digest) and found.content_hash != entry.digest:
                return Admission(Admitted.CONFLICT)
            if not _is_unfinished(found):
                return Admission(Admitted.DUPLICATE, _of_user(found.outcome))
            if connection.execute(_TAKE_OVER, bound | {"found": found.outcome}).rowcount == 1:
                return Admission(Admitted.FIRST)
    raise OutboxKitError(
        f"{entry.consumer}: the inbox row of {entry.message_id!r} appears and disappears; is a purge running?"
    )


def refuse_autocommit(connection: Connection, consumer: str) -> None:
    """Refuses a connection where a rollback takes nothing back."""
    if commits_by_itself(connection):
        raise ConfigurationError(
            f"{consumer}: the connection is in AUTOCOMMIT mode, where a failed handler takes nothing back and its "
            "message counts as handled; use an engine with a transactional isolation level"
        )


def is_duplicate(connection: Connection, entry: Entry) -> bool:
    """True if the effect of this very message is committed, or it is dead."""
    found = connection.execute(_KNOWN, entry.bound | {"unfinished": UNFINISHED}).first()
    if found is None or (None not in (found.content_hash, entry.digest) and found.content_hash != entry.digest):
        return False
    return not bytes(found.outcome or b"").startswith(UNFINISHED)


def _is_unfinished(found: Any) -> bool:
    """True if another transaction claimed the message, was ended from inside, and never finished."""
    outcome = bytes(found.outcome or b"")
    return outcome.startswith(UNFINISHED) and outcome != bytes(found.mine)


def _of_user(outcome: bytes | None) -> bytes | None:
    return None if outcome is None or bytes(outcome).startswith(OURS) else outcome


def finish(session: Session, entry: Entry, outcome: bytes | None) -> None:
    """Stores an outcome, as `outboxkit.inbox.finish` says."""
    connection = session.connection()
    final = None if outcome is None else bounded(outcome)
    bound = {**entry.bound, "unfinished": mark_of(session, connection), "final": final}
    if _FINISH.run(connection, bound) != 1:
        raise OutboxKitError(
            f"{entry.consumer}: the inbox row of {entry.message_id!r} is gone before the commit: {MUST_NOT}"
        )


def bounded(outcome: bytes) -> bytes:
    """Returns the outcome, unless it is too long or pretends to be ours."""
    if outcome.startswith(OURS):
        raise OutboxKitError(f"an outcome cannot begin with {OURS!r}: such outcomes are ours")
    if len(outcome) > MAX_OUTCOME_BYTES:
        raise OutboxKitError(
            f"an outcome has at most {MAX_OUTCOME_BYTES:,} bytes, got {len(outcome):,}; store a reference"
        )
    return outcome
