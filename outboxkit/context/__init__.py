"""Context: what a message inherits from where it is emitted: correlation, causation, source and trace context. Pure.

Everything here is a `contextvars` value: it follows a task, and a thread of its own starts empty. A consumer says by
`handling` which message it handles; what the handler emits is caused by that message and joins its conversation.

`edge` begins a conversation where a request comes in; `tracing` makes the spans of a message's journey.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, TypeVar

from outboxkit.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outboxkit.message import Headers, Message

__all__ = [
    "bounded",
    "causation_id",
    "correlation",
    "correlation_id",
    "current_message",
    "deadline",
    "handling",
    "producing",
    "source",
    "trace_headers",
]

T = TypeVar("T")

_MAX_NAME: Final = 1024  # bytes
_DEFAULT_SOURCE: Final = "outboxkit"
_TRACE: Final = ("traceparent", "tracestate")  # W3C Trace Context, unprefixed on every broker

_correlation: ContextVar[str] = ContextVar("outboxkit_correlation", default="")
_source: ContextVar[str] = ContextVar("outboxkit_source", default=_DEFAULT_SOURCE)
_deadline: ContextVar[datetime | None] = ContextVar("outboxkit_deadline", default=None)
_message: ContextVar[Message | None] = ContextVar("outboxkit_message", default=None)


@contextlib.contextmanager
def correlation(name: str) -> Iterator[None]:
    """Names the conversation of every message that is emitted inside the block.

    Args:
        name: any printable text: an order number, a request id.

    Raises:
        CaptureError: it is not, or longer than a header may be.
    """
    with _set(_correlation, _named("a conversation", name)):
        yield


@contextlib.contextmanager
def producing(source: str) -> Iterator[None]:
    """Names the producer (CloudEvents source) of the messages emitted in the block, unless their `Outbox` says other.

    Args:
        source: a stable name of the service: inboxes tell messages apart by (source, id).

    Raises:
        CaptureError: it is not printable text, or longer than an inbox may keep.
    """
    with _set(_source, _named("a producer", source)):
        yield


@contextlib.contextmanager
def handling(message: Message) -> Iterator[None]:
    """Marks the block as the handling of a message: what is emitted inside is caused by it.

    With OpenTelemetry in the process, spans that the block starts go on with the trace in which the message was
    emitted; a span that is there already, of a consumer's own instrumentation, stays the current one.
    """
    with _set(_message, message), _set(_correlation, ""), _tracing(message):
        yield


@contextlib.contextmanager
def bounded(until: datetime | None) -> Iterator[None]:
    """Bounds everything in the block by a deadline; an earlier one that is in force stays.

    Args:
        until: an aware instant; None changes nothing.
    """
    times = [time for time in (_deadline.get(), until) if time is not None]
    with _set(_deadline, min(times, default=None)):
        yield


def deadline() -> datetime | None:
    """The instant at which the current operation must have ended, None when nothing bounds it."""
    return _deadline.get()


def correlation_id() -> str:
    """The conversation: what `correlation` says, else that of the message being handled (its id if it starts one)."""
    message = _message.get()
    return _correlation.get() or (message.correlation_id or message.id if message else "")


def causation_id() -> str:
    """The id of the message being handled, empty outside of a handler."""
    message = _message.get()
    return message.id if message else ""


def current_message() -> Message | None:
    """The message being handled, None outside of a handler."""
    return _message.get()


def source() -> str:
    """The producer here: what `producing` says, else ``outboxkit``."""
    return _source.get()


def trace_headers() -> Headers:
    """The W3C trace context as headers: the current span's, else that of the message being handled, else none."""
    carrier: dict[str, str] = {}
    if _has_tracing():
        _propagator().inject(carrier)
    if carrier:
        return tuple((name, carrier[name].encode()) for name in _TRACE if carrier.get(name))
    message = _message.get()
    return _trace_of(message) if message else ()


def _named(what: str, name: object) -> str:
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > _MAX_NAME:
        raise CaptureError(f"{what} is named by printable text of at most {_MAX_NAME} bytes, not {name!r:.80}")
    return name


def _trace_of(message: Message) -> Headers:
    return tuple(header for header in message.headers if header[0] in _TRACE)


def _has_tracing() -> bool:
    return "opentelemetry.trace" in sys.modules  # never imported by us: without it in the process there is no span


def _propagator() -> Any:
    module = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    return module.TraceContextTextMapPropagator()


@contextlib.contextmanager
def _tracing(message: Message) -> Iterator[None]:
    carrier = {name: value.decode("ascii", "replace") for name, value in _trace_of(message)}
    if not carrier or not _has_tracing() or sys.modules["opentelemetry.trace"].get_current_span().is_recording():
        yield
        return
    current = importlib.import_module("opentelemetry.context")
    token = current.attach(_propagator().extract(carrier))
    try:
        yield
    finally:
        current.detach(token)


@contextlib.contextmanager
def _set(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
