"""Flaws: reasons why a stored row can never be sent, whatever the broker. Pure.

Rows that outboxkit has written have none. Others write to the table, too: an older version, a script, a person. Such a
row becomes a dead letter in its turn, and its key is handled as behind any dead head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from outboxkit.headers import are_packed
from outboxkit.rows import NO_ID, UNREADABLE, Row

__all__ = ["NOT_ALLOWED", "flaw_of", "flaws_of"]

NOT_ALLOWED: Final = "its destination is not one of relay.allowed_destinations"


def flaw_of(row: Row) -> str:
    """The reason why the row can never be sent; empty when there is none."""
    if not row.topic:
        return "it has no topic"
    if row.recorded_us == UNREADABLE and row.raw_id == NO_ID:
        return "message_id is not a UUID"
    if row.recorded_us == UNREADABLE:
        return "recorded_at is not an instant between the years 1 and 9999"
    if row.expires_us == UNREADABLE:
        return "expires_at is not an instant between the years 1 and 9999"
    return "" if are_packed(row.headers) else "its headers are not packed as outboxkit packs them"


def flaws_of(rows: Iterable[Row]) -> dict[int, str]:
    """The flaws among rows, by position."""
    return {row.position: flaw for row in rows if (flaw := flaw_of(row))}
