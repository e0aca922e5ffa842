"""Every error that outboxkit raises, in one tree.

OutboxKitError
├── ConfigurationError         (also ValueError) a setting, URL, extra or table is wrong; says which and what to do
├── CaptureError               emit() or publish() would lose atomicity: no session, detached object, other bind …
├── CodecError
│   ├── EncodeError            an event cannot be written: raised inside the user's transaction, with the field path
│   └── DecodeError            a message cannot be read: poison, it becomes a dead letter
├── SchemaError
│   ├── SchemaNotFound         no schema under that id, fingerprint or name
│   ├── IncompatibleSchema     reader and writer disagree: says which rule broke and where
│   └── RegistryUnavailable    the registry is away: trying again later may work
├── TransientBrokerError       the broker is away: try again, no attempt is spent
├── PermanentBrokerError       the broker ended this consumer's membership for good: start a new one
├── LeaseLost                  another relay owns the shards now
├── InboxConflict              the same message id came with other content
├── GuardRefused               a guard's limit was met: the call was not made
├── IdempotencyConflict        another request came under an idempotency key
├── IdempotencyInProgress      another call under an idempotency key is under way
├── IdempotencyOutcomeUnknown  a call under an idempotency key committed before it had ended
├── SagaNotFound               no such instance of a saga, or no class of its version
└── ReplayError                a dead letter cannot be replayed as asked

The docstring of a class is its default message: no error is ever mute. ``code`` is stable and has an anchor in
``docs/reference/errors.md``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import ClassVar

__all__ = [
    "CaptureError",
    "CodecError",
    "ConfigurationError",
    "DecodeError",
    "EncodeError",
    "GuardRefused",
    "IdempotencyConflict",
    "IdempotencyInProgress",
    "IdempotencyOutcomeUnknown",
    "InboxConflict",
    "IncompatibleSchema",
    "LeaseLost",
    "OutboxKitError",
    "PermanentBrokerError",
    "RegistryUnavailable",
    "ReplayError",
    "SagaNotFound",
    "SchemaError",
    "SchemaNotFound",
    "TransientBrokerError",
]


class OutboxKitError(Exception):
    """outboxkit could not do what was asked."""

    code: ClassVar[str] = "outboxkit"

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())

    @property
    def message(self) -> str:
        """The text: what happened, what was expected, what to do."""
        return str(self.args[0])


class ConfigurationError(OutboxKitError, ValueError):
    """A setting is missing or wrong."""

    code = "configuration"


class CaptureError(OutboxKitError):
    """This event cannot be written atomically with the session's changes."""

    code = "capture"


class CodecError(OutboxKitError):
    """A payload could not be translated.

    Attributes:
        path: the field path in the value (``order.lines[2].sku``), empty when unknown.
        offset: the byte offset in the data where decoding stopped, None when unknown.
    """

    code = "codec"

    def __init__(self, message: str | None = None, *, path: str = "", offset: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset


class EncodeError(CodecError):
    """The event cannot be encoded."""

    code = "encode"


class DecodeError(CodecError):
    """The message cannot be decoded."""

    code = "decode"


class SchemaError(OutboxKitError):
    """A schema is invalid."""

    code = "schema"


class SchemaNotFound(SchemaError):
    """No schema is known under this id, fingerprint or name.

    Attributes:
        final: nobody can be asked again later; a registry may still get the schema.
    """

    code = "schema-not-found"

    def __init__(self, message: str | None = None, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class IncompatibleSchema(SchemaError):
    """The reader's schema cannot read what the writer's schema wrote.

    Attributes:
        problems: what the compatibility check found, one line each.
        path: the field path in the value that could not be read, empty when no value was read.
        offset: the byte offset of that value in the message, None when unknown.
    """

    code = "schema-incompatible"

    def __init__(
        self,
        message: str | None = None,
        *,
        problems: tuple[str, ...] = (),
        path: str = "",
        offset: int | None = None,
    ) -> None:
        super().__init__(message)
        self.problems = problems
        self.path = path
        self.offset = offset


class RegistryUnavailable(SchemaError):
    """The schema registry is away or fails: trying again later may work."""

    code = "registry-unavailable"


class TransientBrokerError(OutboxKitError):
    """The broker is away or busy: trying again later may work."""

    code = "broker-transient"


class PermanentBrokerError(OutboxKitError):
    """The broker refuses this consumer for good: another one took its place, or the group does not take it."""

    code = "broker-permanent"


class LeaseLost(OutboxKitError):
    """The lease of this relay has ended: another relay may own its shards now."""

    code = "lease-lost"


class InboxConflict(OutboxKitError):
    """A message came again under the same id, but with other content."""

    code = "inbox-conflict"


class ReplayError(OutboxKitError):
    """The dead letter cannot be replayed."""

    code = "replay"


class GuardRefused(OutboxKitError):
    """A guard's limit was met: the call was not made.

    Attributes:
        guard: its name.
        retry_after: when it may help to try again.
    """

    code = "guard-refused"

    def __init__(self, message: str | None = None, *, guard: str = "", retry_after: timedelta = timedelta(0)) -> None:
        super().__init__(message)
        self.guard = guard
        self.retry_after = retry_after


class IdempotencyConflict(OutboxKitError):
    """Another request came under the same idempotency key."""

    code = "idempotency-conflict"


class IdempotencyInProgress(OutboxKitError):
    """Another call under the same idempotency key is under way.

    Attributes:
        retry_after: when it may help to try again.
    """

    code = "idempotency-in-progress"

    def __init__(self, message: str | None = None, *, retry_after: timedelta = timedelta(seconds=1)) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class IdempotencyOutcomeUnknown(OutboxKitError):
    """A call under an idempotency key committed before it had ended: nobody knows its outcome."""

    code = "idempotency-unknown"


class SagaNotFound(OutboxKitError):
    """There is no such instance of a saga, or no class of the version that began it."""

    code = "saga-not-found"
