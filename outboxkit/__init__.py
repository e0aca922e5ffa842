"""outboxkit: a transactional outbox and inbox, from the database commit to the handler's effect and back."""

from __future__ import annotations

from outboxkit import bulk, changes, inbox  # noqa: F401 # the first two listen to sessions
from outboxkit.capture import Outbox, OutboxMixin, publish, send
from outboxkit.consumer import Consumer
from outboxkit.context import correlation
from outboxkit.errors import CaptureError, EncodeError, OutboxKitError
from outboxkit.events import event
from outboxkit.handlers import MessageContext
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
    "correlation",
    "event",
    "full_jitter",
    "inbox",
    "outbox_tables",
    "publish",
    "send",
]
