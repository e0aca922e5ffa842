"""The tables of dead letters: what died, what people know about the causes, and the replays that were planned."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    Uuid,
    text,
)

from outboxkit._sql import Instant, database_now

__all__ = ["letter_tables"]

_EMPTY: Final = text("''")  # not "", whose quotes Alembic does not recognise on SQLite


def letter_tables(metadata: MetaData) -> tuple[Table, Table, Table, Table]:
    """Defines the letters, the groups of their causes, the replays, and the items of each replay."""
    return _letters(metadata), _groups(metadata), _replays(metadata), _items(metadata)


def _letters(metadata: MetaData) -> Table:
    return Table(
        "dead_letters",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("side", String(8), nullable=False),
        Column("consumer", Text, nullable=False, server_default=_EMPTY),
        Column("state", String(10), nullable=False, server_default="dead"),
        Column("generation", Integer, nullable=False, server_default="0"),
        Column("parent_id", Uuid),
        # the original, byte for byte: never changed
        Column("topic", Text, nullable=False),
        Column("key", LargeBinary),
        Column("message_id", Text, nullable=False),
        Column("source", Text, nullable=False, server_default=_EMPTY),
        Column("type", Text, nullable=False),
        Column("kind", String(8), nullable=False),
        Column("headers", LargeBinary, nullable=False),
        Column("payload", LargeBinary),
        Column("origin", Text, nullable=False, server_default=_EMPTY),
        Column("source_position", BigInteger),  # orders its key: outbox position, offset, or sequence
        # the failure
        Column("failure", String(16), nullable=False),
        Column("stage", String(16), nullable=False),
        Column("error_class", Text, nullable=False),
        Column("error", Text, nullable=False),
        Column("path", Text, nullable=False, server_default=_EMPTY),
        Column("byte_offset", BigInteger),
        Column("attempts", Integer, nullable=False),
        Column("first_failed_at", Instant, nullable=False, server_default=database_now()),
        Column("died_at", Instant, nullable=False, server_default=database_now()),
        Column("closed_at", Instant),
        Column("group", String(16), nullable=False),
        Column("details", JSON),
        Column("replay_to", Text),
        Column("replaying_since", Instant),
        # schema facts
        Column("writer_schema", Text, nullable=False, server_default=_EMPTY),
        Column("reader_schema", Text, nullable=False, server_default=_EMPTY),
        Column("problems", JSON),
        Index("dead_letters_state", "state", "died_at"),
        Index("dead_letters_message", "message_id"),
        Index("dead_letters_parent", "parent_id"),
        comment="messages that could not be published or handled: understood, repaired and replayed from here",
    )


def _groups(metadata: MetaData) -> Table:
    return Table(
        "dead_letter_groups",
        metadata,
        Column("group", String(16), primary_key=True),
        Column("note", Text, nullable=False, server_default=_EMPTY),
        Column("owner", Text, nullable=False, server_default=_EMPTY),
        Column("set_by", Text, nullable=False),
        Column("set_at", Instant, nullable=False, server_default=database_now()),
        comment="what people know about the cause of dead letters, and who looks after it",
    )


def _replays(metadata: MetaData) -> Table:
    return Table(
        "dead_letter_replays",
        metadata,
        Column("id", Uuid, primary_key=True),
        Column("state", String(8), nullable=False, server_default="ready"),
        Column("requested_by", Text, nullable=False),
        Column("why", Text, nullable=False),
        Column("options", JSON, nullable=False),
        Column("created_at", Instant, nullable=False, server_default=database_now()),
        Column("finished_at", Instant),
        comment="replays as they were planned; one that was cut off goes on from here",
    )


def _items(metadata: MetaData) -> Table:
    return Table(
        "dead_letter_replay_items",
        metadata,
        Column("replay_id", Uuid, nullable=False),
        Column("number", Integer, nullable=False),
        Column("letter_id", Uuid, nullable=False),
        Column("outcome", String(8), nullable=False, server_default="waiting"),
        Column("reason", Text, nullable=False, server_default=_EMPTY),
        Column("decided_at", Instant),
        PrimaryKeyConstraint("replay_id", "number"),
        Index("dead_letter_replay_items_outcome", "replay_id", "outcome", "number"),
        comment="the letters of a replay, in the original order of each key, and what became of each",
    )
