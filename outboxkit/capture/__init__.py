"""Capture: what an application says happened becomes a message in the transaction in which it happened.

An event is encoded when it is emitted, remembered by the session's transaction, and written with the next flush.
Read in this order: `emit` (the verbs), `route` and `keys` (what a model says about its events), `draft` (from an event
to a message), `session_hooks` and `_refusals` (when rows are written, and when not), `change_capture` and
`bulk_statements` (events without a verb, and statements that would miss them), `rollout` (a new version for a share of
the keys), `declare` (contracts at a producer's start), `commit_hooks` (after the commit), `sqlite_transactions`
(savepoints that roll back).

``from outboxkit.capture import bulk`` gives the function that runs a bulk statement with its events.
"""

from outboxkit.capture import change_capture  # noqa: F401  it listens to sessions
from outboxkit.capture.bulk_statements import bulk
from outboxkit.capture.emit import AnySession, OutboxMixin, publish, send
from outboxkit.capture.route import ChangeCapture, Outbox
from outboxkit.capture.sqlite_transactions import begin_sqlite_transactions

__all__ = [
    "AnySession",
    "ChangeCapture",
    "Outbox",
    "OutboxMixin",
    "begin_sqlite_transactions",
    "bulk",
    "publish",
    "send",
]
