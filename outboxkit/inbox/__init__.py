"""The inbox: a message takes effect once, because its inbox row commits with the effect or not at all.

Invariants: one row per (consumer, source, message id). The row is inserted before the effect, as *unfinished*, and
finished by the last statement before the commit. A committed row that is unfinished belongs to a transaction that was
ended from inside: it is no duplicate, the message is handled again. A row with other content under the same id is a
conflict.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from sqlalchemy import and_, func, or_, select, tuple_
from sqlalchemy.orm import Session

from outboxkit import tables
from outboxkit._failpoints import failpoint
from outboxkit._sql import database_now
from outboxkit.dialects import commits_by_itself, insert_ignoring, naming_missing_tables
from outboxkit.errors import ConfigurationError, InboxConflict
from outboxkit.inbox import rows
from outboxkit.inbox.batch import admit_batch, finish_batch
from outboxkit.inbox.rows import MAX_ID_BYTES, MAX_OUTCOME_BYTES, Admission, Admitted
from outboxkit.message import content_hash

if TYPE_CHECKING:
    from collections.abc import Collection
    from types import TracebackType

    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncSession

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
    "commits_by_itself",
    "content_hash",
    "failpoint",
    "fault_of",
    "finish",
    "finish_batch",
    "handled",
    "unblock",
]


@naming_missing_tables()
def admit(session: Session, consumer: str, message: Message) -> Admission:
    """Claims a message for a consumer, or tells what became of it.

    Transaction: joins the caller's; does not commit. A concurrent claim of the same message waits for the other one.
    Guarantee: FIRST holds only if the transaction commits after `finish`; then nobody else is told FIRST.

    Writes: ``inbox_messages``. Reads: the same, by primary key. Locks: the inserted row.

    Raises:
        ConfigurationError: the connection is in AUTOCOMMIT mode, or the tables are missing.
    """
    return rows.admit(session, rows.entry_of(consumer, message))


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
    rows.finish(session, rows.entry_of(consumer, message), outcome)


def block(connection: Connection, consumer: str, *, source: str, message_id: str, digest: bytes) -> bool:
    """Takes the row of a message that is dead, so that a redelivery has no effect; False when it was taken.

    Transaction: joins the caller's, which also stores the dead letter; does not commit.
    """
    inbox = tables.inbox_messages
    insert = insert_ignoring(connection, inbox).returning(inbox.c.message_id)
    values = {"consumer": consumer, "source": source, "message_id": message_id}
    if connection.execute(insert.values(content_hash=digest, outcome=rows.DEAD, **values)).one_or_none() is not None:
        return True
    is_unfinished = func.substr(inbox.c.outcome, 1, len(rows.UNFINISHED)) == rows.UNFINISHED
    mine = and_(rows.THIS, is_unfinished)
    bound = rows.Entry(consumer, source, message_id, None).bound
    dead = inbox.update().where(mine).values(outcome=rows.DEAD, handled_at=database_now())
    return connection.execute(dead, bound).rowcount == 1


def unblock(connection: Connection, messages: Collection[tuple[str, str, str]]) -> None:
    """Gives the rows of dead messages free again for their replays; a row of an effect stays.

    Transaction: joins the caller's, which also writes the replays; does not commit.

    Args:
        connection: the caller's.
        messages: consumer, source and message id of each.
    """
    inbox, keys = tables.inbox_messages, sorted(messages)
    which = tuple_(inbox.c.consumer, inbox.c.source, inbox.c.message_id)
    for start in range(0, len(keys), rows.KEYS_AT_ONCE):
        these = which.in_(keys[start : start + rows.KEYS_AT_ONCE])
        connection.execute(inbox.update().where(these, inbox.c.outcome == rows.DEAD).values(outcome=rows.REPLAY))


def handled(connection: Connection, messages: Collection[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    """Returns those of these messages whose effect is committed: consumer, source and message id of each.

    Transaction: joins the caller's; reads only. Index used: the primary key.
    """
    inbox, keys = tables.inbox_messages, sorted(messages)
    identity = (inbox.c.consumer, inbox.c.source, inbox.c.message_id)
    found: set[tuple[str, str, str]] = set()
    for start in range(0, len(keys), rows.KEYS_AT_ONCE):
        these = tuple_(*identity).in_(keys[start : start + rows.KEYS_AT_ONCE])
        is_effect = or_(inbox.c.outcome.is_(None), func.substr(inbox.c.outcome, 1, len(rows.OURS)) != rows.OURS)
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
        ConfigurationError: at the start of the block: the tables are missing.
        InboxConflict: likewise.
        OutboxKitError: at its end, if the block ended the transaction.
    """
    digest = None if content is None else hashlib.sha256(content).digest()
    return Claiming(session, rows.Entry(consumer, source, message_id, digest))


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
            self.outcome = rows.bounded(outcome)


class Claiming:
    """The block of `claim`."""

    __slots__ = ("_claim", "_entry", "_session")

    def __init__(self, session: Session | AsyncSession, entry: rows.Entry) -> None:
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

    @naming_missing_tables()
    def _begin(self, session: Session) -> Claim:
        admission = rows.admit(session, self._entry)
        if admission.kind is Admitted.CONFLICT:
            raise InboxConflict(
                f"{self._entry.consumer}: the id {self._entry.message_id!r} came again with other content"
            )
        self._claim = Claim(admission)
        return self._claim

    def _end(self, session: Session) -> None:
        if self._claim is not None and self._claim.first:
            rows.finish(session, self._entry, self._claim.outcome)
