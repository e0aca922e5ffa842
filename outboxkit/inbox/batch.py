"""Messages that share a transaction: claimed by one statement, finished by one for each of their sources."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ARRAY, LargeBinary, Text, bindparam, column, func, select

from outboxkit import tables
from outboxkit._sql import any_bound
from outboxkit.dialects import dialect_of, insert_ignoring
from outboxkit.errors import OutboxKitError
from outboxkit.inbox import rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import Connection, Executable
    from sqlalchemy.orm import Session

    from outboxkit.message import Message

__all__ = ["admit_batch", "finish_batch"]

_row: Final = tables.inbox_messages.c
_FINISH: Final = (
    tables.inbox_messages
    .update()
    .where(
        _row.consumer == bindparam("of_consumer"),
        _row.source == bindparam("of_source"),
        any_bound(_row.message_id, "ids"),
        _row.outcome == rows.MARK,
    )
    .values(outcome=None)
)


def _claim() -> tuple[Any, list[str]]:
    """The rows of a claim, from one array for each column: the text is the same for every number of messages."""
    types: dict[str, Any] = {"source": Text(), "message_id": Text(), "content_hash": LargeBinary()}
    arrays = [bindparam(f"{name}s", type_=ARRAY(type_)) for name, type_ in types.items()]
    given = func.unnest(*arrays).table_valued(*(column(name, type_) for name, type_ in types.items()), name="given")
    consumer = bindparam("of_consumer", type_=_row.consumer.type)
    return select(consumer, *given.render_derived().c, rows.MARK), ["consumer", *types, "outcome"]


_GIVEN, _COLUMNS = _claim()


def admit_batch(session: Session, consumer: str, messages: Sequence[Message]) -> list[bool] | None:
    """Claims several messages by one statement, in the order of their ids; True for each that nobody handled.

    Transaction: joins the caller's; does not commit. None means that one of them must be looked at alone (other content
    under a known id, or an unfinished claim): then the transaction must be rolled back.
    Guarantee: as `admit`, and no deadlock between two batches that share messages.

    Writes: ``inbox_messages``. Reads: the same, by primary key. Locks: the inserted rows.
    """
    entries = [rows.entry_of(consumer, message) for message in messages]
    unique = {entry.key: entry for entry in reversed(entries)}
    if any(unique[entry.key].digest != entry.digest for entry in entries):
        return None
    connection = session.connection()
    rows.refuse_autocommit(connection, consumer)
    inserted = _insert(connection, rows.mark_of(session, connection), [unique[key] for key in sorted(unique)])
    if not all(rows.is_duplicate(connection, unique[key]) for key in unique.keys() - inserted):
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
    connection, plain = session.connection(), defaultdict(list)
    for message, outcome in outcomes:
        if outcome is None:
            plain[message.source].append(message.id)
        else:
            rows.finish(session, rows.entry_of(consumer, message), outcome)
    mark = rows.mark_of(session, connection)
    for source, ids in sorted(plain.items()):
        bound = {"of_consumer": consumer, "of_source": source, "ids": ids, "unfinished": mark}
        if connection.execute(_FINISH, bound).rowcount != len(ids):
            raise OutboxKitError(f"{consumer}: inbox rows of this batch are gone before the commit: {rows.MUST_NOT}")


def _insert(connection: Connection, mark: bytes, entries: Sequence[rows.Entry]) -> set[tuple[str, str, str]]:
    """Inserts rows in this order; returns the keys of those that were not there."""
    insert: Any = insert_ignoring(connection, tables.inbox_messages)
    wanted: Any
    if dialect_of(connection).features.arrays:
        insert = insert.from_select(_COLUMNS, _GIVEN)
        wanted = {
            "of_consumer": entries[0].consumer,
            "sources": [entry.source for entry in entries],
            "message_ids": [entry.message_id for entry in entries],
            "content_hashs": [entry.digest for entry in entries],
            "unfinished": mark,
        }
    else:
        insert = insert.values(outcome=rows.MARK)
        names = ("consumer", "source", "message_id")
        own = [dict(zip(names, entry.key, strict=True)) | {"content_hash": entry.digest} for entry in entries]
        wanted = [one | {"unfinished": mark} for one in own]
    statement: Executable = insert.returning(_row.source, _row.message_id)
    return {(entries[0].consumer, *found) for found in connection.execute(statement, wanted)}
