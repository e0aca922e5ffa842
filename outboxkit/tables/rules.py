"""Rules that every row keeps, whoever writes it: what can never be right is refused by the database itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import CheckConstraint, ColumnElement, String, and_, func, literal_column

from outboxkit._sql import Instant, byte_length, in_calendar, is_packed, seconds_between

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Table

__all__ = ["MAX_SHARDS", "constrain"]

MAX_SHARDS: Final = 64
MAX_TOPIC_BYTES: Final = 249  # as Kafka has it; RabbitMQ takes 255
MAX_KEY_BYTES: Final = 1024
MAX_NAME_BYTES: Final = 255  # of a type, which is RabbitMQ's routing key; of a consumer
MAX_ID_BYTES: Final = 1024  # three of these still fit into one entry of an index
MAX_PAUSE_SECONDS: Final = 366 * 86_400

_KINDS: Final = ("event", "command")
_CHOICES: Final[Mapping[tuple[str, str], tuple[str, ...]]] = {
    ("outbox_messages", "kind"): _KINDS,
    ("outbox_waiting", "kind"): _KINDS,
    ("outbox_waiting", "reason"): ("retry", "follower", "scheduled"),
    ("outbox_stopped_keys", "reason"): ("retry", "parked"),
    ("outbox_stopped_keys", "request"): ("release", "skip", "repair"),
    ("outbox_control", "scope"): ("destination", "type", "key"),
    ("dead_letters", "side"): ("relay", "consumer"),
    ("outbox_schemas", "role"): ("reader", "writer"),
}
#: Tables of messages on the way out, whose text and bytes are bounded; letters keep whatever arrived.
_OUTGOING: Final = ("outbox_messages", "outbox_waiting", "outbox_stopped_keys")
#: Columns whose name says what they hold, in every table -> at most so many bytes.
_LENGTHS: Final[Mapping[str, int]] = {"consumer": MAX_NAME_BYTES}
_LENGTHS_OF: Final[Mapping[tuple[str, str], int]] = {
    **{(table, "topic"): MAX_TOPIC_BYTES for table in _OUTGOING},
    **{(table, "key"): MAX_KEY_BYTES for table in _OUTGOING},
    ("outbox_messages", "type"): MAX_NAME_BYTES,
    ("outbox_waiting", "type"): MAX_NAME_BYTES,
    ("outbox_schemas", "type"): MAX_NAME_BYTES,
    ("inbox_waiting", "topic"): MAX_NAME_BYTES,
    ("inbox_suspects", "identity"): MAX_ID_BYTES,
    ("outbox_sagas", "key"): MAX_KEY_BYTES,
    ("dead_letters", "message_id"): MAX_ID_BYTES,
    ("inbox_messages", "source"): MAX_ID_BYTES,
    ("inbox_messages", "message_id"): MAX_ID_BYTES,
    ("outbox_control", "target"): MAX_TOPIC_BYTES + MAX_KEY_BYTES * 2,
    ("outbox_control", "reason"): 4096,
}
_NOT_EMPTY: Final = frozenset((("outbox_messages", "topic"), ("outbox_waiting", "topic"), ("outbox_control", "target")))
#: Not the letters, which keep what arrived.
_PACKED: Final = frozenset((table, "headers") for table in ("outbox_messages", "outbox_waiting"))
_NOT_NEGATIVE: Final = frozenset(("attempts", "generation", "deaths"))


def constrain(table: Table) -> None:
    """Adds the rules of a table as constraints: what can never be right is refused by the database itself.

    Each is named ``table_column``, so that an error names the column.
    """
    for column in table.c:
        rules = [rule for rule in (*_rules(table.name, column), *_of_pauses(table, column)) if rule is not None]
        if rules:
            table.append_constraint(CheckConstraint(and_(*rules), name=f"{table.name}_{column.name}_check"))


def _rules(table: str, column: Any) -> Sequence[ColumnElement[bool] | None]:
    """The rules of one column; null keeps every one of them."""
    place = (table, column.name)
    length = _LENGTHS_OF.get(place, _LENGTHS.get(column.name) if isinstance(column.type, String) else None)
    return (
        in_calendar(column) if isinstance(column.type, Instant) else None,
        column.between(0, MAX_SHARDS - 1) if column.name == "shard" else None,
        column.between(1, MAX_SHARDS) if place == ("outbox_version", "shards") else None,
        column.in_(_CHOICES[place]) if place in _CHOICES else None,
        byte_length(column) > 0 if place in _NOT_EMPTY else None,
        byte_length(column) <= length if length else None,
        column >= 0 if column.name in _NOT_NEGATIVE else None,
        is_packed(column) if place in _PACKED else None,
    )


def _of_pauses(table: Table, column: Any) -> Sequence[ColumnElement[bool]]:
    """A pause ends, after it began and within a year, or is not given an end; and somebody said why."""
    if table.name != "outbox_control":
        return ()
    if column.name == "until":
        return (seconds_between(table.c.set_at, column).between(0, MAX_PAUSE_SECONDS),)
    return (func.trim(column) != literal_column("''"),) if column.name == "reason" else ()
