"""outboxkit: a transactional outbox and inbox, from the database commit to the handler's effect and back.

A map of the house, in the order in which a message passes through it:

- `capture/` turns what an application emits into rows of its transaction; `events` and `context/` say what it inherits.
- `message`, `headers` are what travels; `codecs/` turn events into bytes and back, `avro/` is a library of its own.
- `outbox/`, `rows`, `tables/`, `_sql`, `_legible` are the stored side; `dialects/` how databases differ; `durations`.
- `outboxkit_relay` publishes what the outbox holds: `core/` decides, `store/` is its SQL, `daemon/` runs it, `observe/`
  tells how it is; `diagnose/` answers questions; `settings`, `sections`, `logs`, `words`, `redaction`, `exit_codes`;
  `cli/`, the page `dashboard/`, `demo/`: the proof.
- `brokers/` carry messages; `registries/` and `schema_store` know the schemas that they were written with.
- `consumer/` calls handlers, with `inbox/` in the same transaction: each message takes effect once. `policy` decides on
  failures, `signals` are what a handler raises on purpose; `guards/` limit its calls of others, `saga/` joins handlers,
  `idempotency/` does for any call what the inbox does for messages.
- `dead_letters/` keeps what could not be handled, byte for byte, and replays it.
- `migrations/` makes the tables, `testing/` helps tests, `errors` is the tree of errors, `findings` what checks find,
  `_failpoints` crash in tests.

Users import the names below from here. A name's module is loaded when the name is first used: a process pays for what
it uses. In a file that also imports ``sqlalchemy.event``: ``import outboxkit as ok`` and ``@ok.event(…)``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from outboxkit import inbox
    from outboxkit.capture import ChangeCapture, Outbox, OutboxMixin, bulk, publish, send
    from outboxkit.consumer import Consumer
    from outboxkit.consumer.handlers import MessageContext
    from outboxkit.context import correlation
    from outboxkit.dead_letters.letter import DeadLetter
    from outboxkit.dead_letters.topic_copy import DeadLetterTopic
    from outboxkit.errors import (
        CaptureError,
        ConfigurationError,
        DecodeError,
        EncodeError,
        OutboxKitError,
        SchemaError,
    )
    from outboxkit.events import Rollout, event
    from outboxkit.message import Message
    from outboxkit.policy import Backoff, RetryPolicy, full_jitter
    from outboxkit.tables import outbox_tables

    __version__: str

__all__ = [
    "Backoff",
    "CaptureError",
    "ChangeCapture",
    "ConfigurationError",
    "Consumer",
    "DeadLetter",
    "DeadLetterTopic",
    "DecodeError",
    "EncodeError",
    "Message",
    "MessageContext",
    "Outbox",
    "OutboxKitError",
    "OutboxMixin",
    "RetryPolicy",
    "Rollout",
    "SchemaError",
    "__version__",
    "bulk",
    "correlation",
    "event",
    "full_jitter",
    "inbox",
    "outbox_tables",
    "publish",
    "send",
]

_NAMES: Final = {
    "capture": ("ChangeCapture", "Outbox", "OutboxMixin", "bulk", "publish", "send"),
    "consumer": ("Consumer",),
    "consumer.handlers": ("MessageContext",),
    "context": ("correlation",),
    "dead_letters.letter": ("DeadLetter",),
    "dead_letters.topic_copy": ("DeadLetterTopic",),
    "errors": ("CaptureError", "ConfigurationError", "DecodeError", "EncodeError", "OutboxKitError", "SchemaError"),
    "events": ("Rollout", "event"),
    "message": ("Message",),
    "policy": ("Backoff", "RetryPolicy", "full_jitter"),
    "tables": ("outbox_tables",),
}
_HOMES: Final = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        found: Any = importlib.import_module("importlib.metadata").version("outboxkit")
    elif name == "inbox":
        found = importlib.import_module("outboxkit.inbox")
    elif name in _HOMES:
        found = getattr(importlib.import_module(f"outboxkit.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'outboxkit' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
