"""outboxkit: a transactional outbox and inbox, from the database commit to the handler's effect and back."""

from __future__ import annotations

from outboxkit.capture import Outbox, OutboxMixin, publish, send
from outboxkit.context import correlation
from outboxkit.events import event
from outboxkit.tables import outbox_tables

__all__ = [
    "Outbox",
    "OutboxMixin",
    "correlation",
    "event",
    "outbox_tables",
    "publish",
    "send",
]
