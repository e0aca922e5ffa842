"""Capture: what an application says happened becomes a message in the transaction in which it happened.

An event is encoded when it is emitted, remembered by the session's transaction, and written with the next flush.
Read in this order: `emit` (the verbs), `session_hooks` (when rows are written), `change_capture` and `bulk` (events
without a verb, and statements that would miss them), `rollout` (a new version for a share of the keys), `declare`
(contracts at a producer's start), `commit_hooks` (after the commit).
"""

from outboxkit.capture import bulk, change_capture  # noqa: F401  both listen to sessions
from outboxkit.capture.emit import AnySession, MessageOptions, Outbox, OutboxMixin, publish, send

__all__ = ["AnySession", "MessageOptions", "Outbox", "OutboxMixin", "publish", "send"]
