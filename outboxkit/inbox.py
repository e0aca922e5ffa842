"""The inbox: a message takes effect once, because its inbox row commits with the effect or not at all.

Invariants: one row per (consumer, source, message id). The row is inserted before the effect, as *unfinished*, and
finished by the last statement before the commit. A committed row that is unfinished belongs to a transaction that was
ended from inside: it is no duplicate, the message is handled again. A row with other content under the same id is a
conflict.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

from sqlalchemy import and_, bindparam, func, or_, select, tuple_
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import ClaimedHere
from outboxkit.dialects import commits_by_itself, insert_ignoring
from outboxkit.errors import ConfigurationError, InboxConflict, OutboxKitError
from outboxkit.message import content_hash

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from types import TracebackType

    from sqlalchemy import ColumnElement, Connection
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import SessionTransaction

    from outboxkit.message import Message

__all__ = [
    "MAX_ID_BYTES",
    "MAX_OUTCOME_BYTES",
    "Admission",
    "Admitted",
    "Claim",
    "Claiming",
    "admit",
    "admit_batch",
    "block",
    "claim",
    "fault_of",
    "finish",
    "finish_batch",
    "handled",
    "unblock",
]

MAX_OUTCOME_BYTES: Final = 64 * 1024  # an outcome is an answer to repeat, not a place to store documents
MAX_ID_BYTES: Final = 1024  #: of an id and of a source: an index entry has no room for much more
_OURS: Final = b"\0outboxkit: "  # begins the outcomes that say something of the row itself
_DEAD: Final = _OURS + b"dead"  # of a message that had no effect and became a dead letter
_UNFINISHED: Final = _OURS + b"claimed by "
_REPLAY: Final = _UNFINISHED + b"its replay"  # of a dead message that was sent again
_tokens: weakref.WeakKeyDictionary[SessionTransaction, bytes] = weakref.WeakKeyDictionary()
_KEYS_AT_ONCE: Final = 500  # in one statement: databases bound the number of values
_MUST_NOT: Final = "the handler must not roll back or commit, by any door; use session.begin_nested() for what may fail"
_MAX_TRIES: Final = 10  # each means that another transaction rolled back, or a purge ran, between two statements


class Admitted(StrEnum):
    """What a message is to an inbox."""

    FIRST = "first"  #: nobody handled it: go on, in this transaction
    DUPLICATE = "duplicate"  #: its effect is committed
    CONFLICT = "conflict"  #: its id is taken by other content


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer of `admit`; ``outcome`` is what `finish` stored for a duplicate."""

    kind: Admitted
    outcome: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row of the inbox: its key, and the hash of what came under it."""

    consumer: str
    source: str
    message_id: str
    digest: bytes | None

    @property
    def key(self) -> tuple[str, str, str]:
        """The primary key."""
        return self.consumer, self.source, self.message_id

    def where(self) -> ColumnElement[bool]:
        row = tables.inbox_messages.c
        return and_(row.consumer == self.consumer, row.source == self.source, row.message_id == self.message_id)


def admit(session: Session, consumer: str, message: Message) -> Admission:
    """Claims a message for a consumer, or tells what became of it.

    Transaction: joins the caller's; does not commit. A concurrent claim of the same message waits for the other one.
    Guarantee: FIRST holds only if the transaction commits after `finish`; then nobody else is told FIRST.

    Writes: ``inbox_messages``. Reads: the same, by primary key. Locks: the inserted row.

    Raises:
        ConfigurationError: the connection is in AUTOCOMMIT mode.
    """
    return _admit(session, _entry(consumer, message))


def admit_batch(session: Session, consumer: str, messages: Sequence[Message]) -> list[bool] | None:
    """Claims several messages by one statement, in the order of their ids; True for each that nobody handled.

    Transaction: joins the caller's; does not commit. None means that one of them must be looked at alone (other content
    under a known id, or an unfinished claim): then the transaction must be rolled back.
    Guarantee: as `admit`, and no deadlock between two batches that share messages.

    Writes: ``inbox_messages``. Reads: the same, by primary key. Locks: the inserted rows.
    """
    entries = [_entry(consumer, message) for message in messages]
    unique = {entry.key: entry for entry in reversed(entries)}
    if any(unique[entry.key].digest != entry.digest for entry in entries):
        return None
    connection, inbox = session.connection(), tables.inbox_messages
    _refuse_autocommit(connection, consumer)
    names = ("consumer", "source", "message_id")
    rows = [dict(zip(names, key, strict=True)) | {"content_hash": unique[key].digest} for key in sorted(unique)]
    insert = insert_ignoring(connection, inbox).values(outcome=_mark(session, connection))
    found = connection.execute(insert.returning(inbox.c.source, inbox.c.message_id), rows)
    inserted = {(consumer, source, message_id) for source, message_id in found}
    if not all(_is_duplicate(connection, unique[key]) for key in unique.keys() - inserted):
        return None
    firsts = []
    for entry in entries:
        firsts.append(entry.key in inserted)
        inserted.discard(entry.key)  # a second one of this batch is a duplicate
    return firsts


def finish_batch(session: Session, consumer: str, outcomes: Sequence[tuple[Message, bytes | None]]) -> None:
    """Stores the outcomes of messages that `admit_batch` claimed: the last statements before the commit.

    Transaction: joins the caller's; does not commit.
    Guarantee: as `finish`.

    Raises:
        OutboxKitError: a row is gone or no longer ours, because a handler rolled back or committed by itself.
    """
    connection, inbox = session.connection(), tables.inbox_messages
    plain = sorted(_entry(consumer, message).key for message, outcome in outcomes if outcome is None)
    identity = tuple_(inbox.c.consumer, inbox.c.source, inbox.c.message_id)
    for start in range(0, len(plain), _KEYS_AT_ONCE):
        keys = plain[start : start + _KEYS_AT_ONCE]
        mine = and_(identity.in_(keys), inbox.c.outcome == _mark(session, connection))
        if connection.execute(inbox.update().where(mine).values(outcome=None)).rowcount != len(keys):
            raise OutboxKitError(f"{consumer}: inbox rows of this batch are gone before the commit: {_MUST_NOT}")
    for message, outcome in outcomes:
        if outcome is not None:
            _finish(session, _entry(consumer, message), outcome)


def fault_of(message_id: str, source: str) -> str:
    """Returns why the inbox cannot keep this identity; empty when it can."""
    for name, text in (("id", message_id), ("source", source)):
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return f"the {name} holds half of a character (a lone surrogate), which is no text"
        if size > MAX_ID_BYTES:
            return f"the {name} has {size:,} bytes, at most {MAX_ID_BYTES:,} are kept"
        if "\0" in text:
            return f"the {name} holds a NUL character, which no database can store"
    return ""


def finish(session: Session, consumer: str, message: Message, outcome: bytes | None = None) -> None:
    """Stores the outcome: the last statement before the commit, always executed.

    Transaction: joins the caller's; does not commit.
    Guarantee: if it returns, the row of `admit` is still in this transaction, and the effect commits with it.

    Raises:
        OutboxKitError: the row is gone or no longer ours, because the handler rolled back or committed by itself.
    """
    _finish(session, _entry(consumer, message), outcome)


def block(connection: Connection, consumer: str, *, source: str, message_id: str, digest: bytes) -> bool:
    """Takes the row of a message that is dead, so that a redelivery has no effect; False when it was taken.

    Transaction: joins the caller's, which also stores the dead letter; does not commit.
    """
    inbox = tables.inbox_messages
    insert = insert_ignoring(connection, inbox).returning(inbox.c.message_id)
    values = {"consumer": consumer, "source": source, "message_id": message_id}
    if connection.execute(insert.values(content_hash=digest, outcome=_DEAD, **values)).one_or_none() is not None:
        return True
    is_unfinished = func.substr(inbox.c.outcome, 1, len(_UNFINISHED)) == _UNFINISHED
    mine = and_(_Entry(consumer, source, message_id, None).where(), is_unfinished)
    return connection.execute(inbox.update().where(mine).values(outcome=_DEAD)).rowcount == 1


def unblock(connection: Connection, messages: Collection[tuple[str, str, str]]) -> None:
    """Gives the rows of dead messages free again for their replays; a row of an effect stays.

    Transaction: joins the caller's, which also writes the replays; does not commit.

    Args:
        connection: the caller's.
        messages: consumer, source and message id of each.
    """
    inbox, keys = tables.inbox_messages, sorted(messages)
    which = tuple_(inbox.c.consumer, inbox.c.source, inbox.c.message_id)
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        these = which.in_(keys[start : start + _KEYS_AT_ONCE])
        connection.execute(inbox.update().where(these, inbox.c.outcome == _DEAD).values(outcome=_REPLAY))


def handled(connection: Connection, messages: Collection[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    """Returns those of these messages whose effect is committed: consumer, source and message id of each.

    Transaction: joins the caller's; reads only. Index used: the primary key.
    """
    inbox, keys = tables.inbox_messages, sorted(messages)
    identity = (inbox.c.consumer, inbox.c.source, inbox.c.message_id)
    found: set[tuple[str, str, str]] = set()
    for start in range(0, len(keys), _KEYS_AT_ONCE):
        these = tuple_(*identity).in_(keys[start : start + _KEYS_AT_ONCE])
        is_effect = or_(inbox.c.outcome.is_(None), func.substr(inbox.c.outcome, 1, len(_OURS)) != _OURS)
        found |= {tuple(row) for row in connection.execute(select(*identity).where(these, is_effect))}
    return found


def claim(
    session: Session | AsyncSession,
    *,
    message_id: str,
    consumer: str,
    source: str = "",
    content: bytes | None = None,
) -> Claiming:
    """The inbox alone, for another framework's handler: ``with inbox.claim(…) as first: if first: …``.

    Takes ``with`` for a Session and ``async with`` for an AsyncSession.

    Transaction: joins the session's; does not commit.
    Guarantee: as `admit` and `finish`, when the session commits after the block.

    Args:
        session: whose transaction holds the effect.
        message_id: identity of the message, or the idempotency key of a request.
        consumer: who handles it; each consumer handles it once.
        source: who produced it, where ids are unique only per producer.
        content: its bytes; the same id with other content is then refused.

    Raises:
        InboxConflict: at the start of the block.
        OutboxKitError: at its end, if the block ended the transaction.
    """
    digest = None if content is None else hashlib.sha256(content).digest()
    return Claiming(session, _Entry(consumer, source, message_id, digest))


class Claim:
    """A claimed message: true when this is the first time.

    Attributes:
        first: whether the effect is still to be made, in this transaction.
        outcome: what the first handling stored (duplicates), or what `set_outcome` was given.
    """

    __slots__ = ("first", "outcome")

    def __init__(self, admission: Admission) -> None:
        self.first = admission.kind is Admitted.FIRST
        self.outcome = admission.outcome

    def __bool__(self) -> bool:
        return self.first

    def set_outcome(self, outcome: bytes) -> None:
        """Stores a result for duplicates; a no-op on a duplicate, which keeps the first result."""
        if self.first:
            self.outcome = _bounded(outcome)


class Claiming:
    """The block of `claim`."""

    __slots__ = ("_claim", "_entry", "_session")

    def __init__(self, session: Session | AsyncSession, entry: _Entry) -> None:
        self._session, self._entry = session, entry
        self._claim: Claim | None = None

    def __enter__(self) -> Claim:
        if not isinstance(self._session, Session):
            raise ConfigurationError("inbox.claim of an AsyncSession needs `async with`")
        return self._begin(self._session)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(self._session, Session) and error is None:
            self._end(self._session)

    async def __aenter__(self) -> Claim:
        if isinstance(self._session, Session):
            raise ConfigurationError("inbox.claim of a Session needs `with`")
        return await self._session.run_sync(self._begin)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _: TracebackType | None,
    ) -> None:
        if not isinstance(self._session, Session) and error is None:
            await self._session.run_sync(self._end)

    def _begin(self, session: Session) -> Claim:
        admission = _admit(session, self._entry)
        if admission.kind is Admitted.CONFLICT:
            raise InboxConflict(
                f"{self._entry.consumer}: the id {self._entry.message_id!r} came again with other content"
            )
        self._claim = Claim(admission)
        return self._claim

    def _end(self, session: Session) -> None:
        if self._claim is not None and self._claim.first:
            _finish(session, self._entry, self._claim.outcome)


def _entry(consumer: str, message: Message) -> _Entry:
    return _Entry(consumer, message.source, message.id, content_hash(message))


def _mark(session: Session, connection: Connection) -> ClaimedHere:
    """The mark of this transaction's claims. PostgreSQL knows its transactions by number; elsewhere we keep a token."""
    transaction = session.get_transaction()
    token = b""
    if connection.dialect.name != "postgresql" and transaction is not None:
        token = _tokens.setdefault(transaction, uuid4().bytes)
    return ClaimedHere(bindparam("unfinished", _UNFINISHED + token, tables.inbox_messages.c.outcome.type))


def _admit(session: Session, entry: _Entry) -> Admission:
    connection, inbox = session.connection(), tables.inbox_messages
    _refuse_autocommit(connection, entry.consumer)
    mark = _mark(session, connection)
    insert = insert_ignoring(connection, inbox).returning(inbox.c.message_id)
    values = {"consumer": entry.consumer, "source": entry.source, "message_id": entry.message_id}
    known = select(inbox.c.content_hash, inbox.c.outcome, mark.label("mine")).where(entry.where())
    for _ in range(_MAX_TRIES):
        # RETURNING tells what was inserted; psycopg's rowcount does not.
        row = values | {"content_hash": entry.digest, "outcome": mark}
        if connection.execute(insert.values(row)).one_or_none() is not None:
            failpoint("inbox.inserted")
            return Admission(Admitted.FIRST)
        if (found := connection.execute(known).one_or_none()) is not None:
            if None not in (found.content_hash, entry.digest) and found.content_hash != entry.digest:
                return Admission(Admitted.CONFLICT)
            if not _is_unfinished(found):
                return Admission(Admitted.DUPLICATE, _of_user(found.outcome))
            if _take_over(connection, entry, found.outcome, mark):
                return Admission(Admitted.FIRST)
    raise OutboxKitError(
        f"{entry.consumer}: the inbox row of {entry.message_id!r} appears and disappears; is a purge running?"
    )


def _refuse_autocommit(connection: Connection, consumer: str) -> None:
    if commits_by_itself(connection):
        raise ConfigurationError(
            f"{consumer}: the connection is in AUTOCOMMIT mode, where a failed handler takes nothing back and its "
            "message counts as handled; use an engine with a transactional isolation level"
        )


def _is_duplicate(connection: Connection, entry: _Entry) -> bool:
    """True if the effect of this very message is committed, or it is dead."""
    inbox = tables.inbox_messages
    found = connection.execute(select(inbox.c.content_hash, inbox.c.outcome).where(entry.where())).one_or_none()
    if found is None or (None not in (found.content_hash, entry.digest) and found.content_hash != entry.digest):
        return False
    return not bytes(found.outcome or b"").startswith(_UNFINISHED)


def _is_unfinished(found: Any) -> bool:
    """True if another transaction claimed the message, was ended from inside, and never finished."""
    outcome = bytes(found.outcome or b"")
    return outcome.startswith(_UNFINISHED) and outcome != bytes(found.mine)


def _of_user(outcome: bytes | None) -> bytes | None:
    return None if outcome is None or bytes(outcome).startswith(_OURS) else outcome


def _take_over(connection: Connection, entry: _Entry, unfinished: bytes, mark: ClaimedHere) -> bool:
    this = and_(entry.where(), tables.inbox_messages.c.outcome == unfinished)
    return connection.execute(tables.inbox_messages.update().where(this).values(outcome=mark)).rowcount == 1


def _finish(session: Session, entry: _Entry, outcome: bytes | None) -> None:
    connection = session.connection()
    values = {"outcome": None if outcome is None else _bounded(outcome)}
    mine = and_(entry.where(), tables.inbox_messages.c.outcome == _mark(session, connection))
    if connection.execute(tables.inbox_messages.update().where(mine).values(values)).rowcount != 1:
        raise OutboxKitError(
            f"{entry.consumer}: the inbox row of {entry.message_id!r} is gone before the commit: {_MUST_NOT}"
        )


def _bounded(outcome: bytes) -> bytes:
    if outcome.startswith(_OURS):
        raise OutboxKitError(f"an outcome cannot begin with {_OURS!r}: such outcomes are ours")
    if len(outcome) > MAX_OUTCOME_BYTES:
        raise OutboxKitError(
            f"an outcome has at most {MAX_OUTCOME_BYTES:,} bytes, got {len(outcome):,}; store a reference"
        )
    return outcome
