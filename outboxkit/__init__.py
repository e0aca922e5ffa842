"""outboxkit: a transactional outbox and inbox, from the database commit to the handler's effect and back."""

from __future__ import annotations

from outboxkit import inbox  # the first two listen to sessions
from outboxkit.capture import Outbox, OutboxMixin, bulk, change_capture, publish, send
from outboxkit.consumer import Consumer
from outboxkit.consumer.handlers import MessageContext
from outboxkit.context import correlation
from outboxkit.errors import CaptureError, EncodeError, OutboxKitError
from outboxkit.events import event
from outboxkit.policy import RetryPolicy, full_jitter
from outboxkit.tables import outbox_tables

__all__ = [
    "CaptureError",
    "Consumer",
    "EncodeError",
    "MessageContext",
    "Outbox",
    "OutboxKitError",
    "OutboxMixin",
    "RetryPolicy",
    "bulk",
    "change_capture",
    "correlation",
    "event",
    "full_jitter",
    "inbox",
    "outbox_tables",
    "publish",
    "send",
]
