"""Spans of a message's journey, for OpenTelemetry: create, send, process. The API only: without an SDK nothing is done.

`created` makes the span in which an event is emitted, and the headers that carry its context; nobody changes them on
the way. The relay's `sending` links to the contexts of all messages of a batch. The consumer's `processing` is a child
of the creation where the message comes at once. Where it was delayed, tried again or replayed, it begins a new trace
with a link, because a trace that lasts for days helps nobody. No span holds a payload or the text of an error.

Source of names and kinds: OpenTelemetry's semantic conventions for messaging.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from outboxkit import context
from outboxkit.errors import DecodeError
from outboxkit.headers import LETTER, unpack_headers

if TYPE_CHECKING:
    from outboxkit.message import Headers, Message
    from outboxkit.rows import Row

__all__ = ["AT_ONCE", "Parent", "created", "processing", "sending"]

AT_ONCE: Final = timedelta(minutes=1)  #: from the emit to the handler: what comes later begins a trace of its own
_TRACE: Final = ("traceparent", "tracestate")
_MAX_LINKS: Final = 128  # the SDK's own bound: more are dropped


class Parent(StrEnum):
    """The place of a `processing` span."""

    AUTO = "auto"  #: a child where the message comes at once, else a new trace with a link
    CHILD = "child"  #: always a child of the creation
    LINK = "link"  #: always a new trace with a link to the creation


def created(*, destination: str, type_name: str, message_id: str) -> Headers:
    """Makes the span of an emit, and the headers that carry its context; without an SDK those of the current one.

    Args:
        destination: topic or queue.
        type_name: of the event; empty when only the flush will know it.
        message_id: of the message.
    """
    tracer = _tracer()
    if tracer is None:
        return context.trace_headers()
    attributes = _attributes("create", destination, type_name) | {"messaging.message.id": message_id}
    span = tracer.start_span(f"create {destination}", kind=_kind("PRODUCER"), attributes=attributes)
    if not span.is_recording():
        return context.trace_headers()
    with _trace().use_span(span, end_on_exit=True):
        return context.trace_headers()


@contextmanager
def processing(
    message: Message, *, consumer: str, attempt: int, age: timedelta | None, parent: Parent = Parent.AUTO
) -> Iterator[None]:
    """Makes the span in which a consumer handles a message; it is the current one in the block.

    Args:
        message: the message.
        consumer: its name.
        attempt: number of this try, from 1.
        age: time since the message was emitted; None when nobody knows.
        parent: its place.
    """
    tracer = _tracer()
    if tracer is None or _trace().get_current_span().is_recording():  # the application's own instrumentation
        yield
        return
    created_in = _context_of(message.headers)
    late = attempt > 1 or message.header(LETTER) is not None or age is None or age > AT_ONCE
    is_child = parent is Parent.CHILD or (parent is Parent.AUTO and not late)
    attributes = _attributes("process", message.topic, message.type) | {
        "messaging.message.id": message.id,
        "messaging.message.conversation_id": message.correlation_id or message.id,
        "messaging.consumer.group.name": consumer,
        "outboxkit.attempt": attempt,
    }
    options = {"context": created_in} if is_child else {"context": _empty(), "links": _links([created_in])}
    with _recorded(tracer, f"process {message.topic}", "CONSUMER", attributes, **options):
        yield


def sending(destination: str, rows: Sequence[Row]) -> Callable[[str], None]:
    """Begins the span of a batch that goes to the broker; the function that is returned ends it.

    Args:
        destination: topic or queue.
        rows: of the batch; their headers are read only with an SDK.

    Returns:
        Ends the span; takes what failed, in a word, or nothing.
    """
    tracer = _tracer()
    if tracer is None:
        return _nothing
    attributes = _attributes("send", destination, "") | {"messaging.batch.message_count": len(rows)}
    links = _links(_context_of(_headers_of(row)) for row in rows[:_MAX_LINKS])
    span = tracer.start_span(
        f"send {destination}", context=_empty(), kind=_kind("CLIENT"), attributes=attributes, links=links
    )

    def end(failure: str) -> None:
        if failure:
            _fail(span, failure)
        span.end()

    return end


def _nothing(_failure: str) -> None:
    return


@contextmanager
def _recorded(tracer: Any, name: str, kind: str, attributes: dict[str, Any], **options: Any) -> Iterator[None]:
    started = tracer.start_as_current_span(
        name,
        kind=_kind(kind),
        attributes=attributes,
        record_exception=False,  # its text may quote data
        set_status_on_exception=False,
        **options,
    )
    with started as span:
        try:
            yield
        except BaseException as error:
            _fail(span, type(error).__qualname__)
            raise


def _fail(span: Any, failure: str) -> None:
    span.set_attribute("error.type", failure)
    span.set_status(_trace().StatusCode.ERROR)


def _attributes(operation: str, destination: str, type_name: str) -> dict[str, Any]:
    named = {"outboxkit.message.type": type_name} if type_name else {}
    return {
        "messaging.system": "outboxkit",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": destination,
        **named,
    }


def _tracer() -> Any:
    """Our tracer, None without an SDK: what is not in the process has configured nothing."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    return _trace().get_tracer("outboxkit")


def _trace() -> Any:
    return importlib.import_module("opentelemetry.trace")


def _kind(name: str) -> Any:
    return _trace().SpanKind[name]


def _empty() -> Any:
    return importlib.import_module("opentelemetry.context").Context()


def _context_of(headers: Headers) -> Any:
    """The context in which a message was created; an empty one when it has none."""
    carrier = {name: value.decode("ascii", "replace") for name, value in headers if name in _TRACE}
    module = importlib.import_module("opentelemetry.trace.propagation.tracecontext")
    return module.TraceContextTextMapPropagator().extract(carrier, _empty())


def _links(contexts: Iterable[Any]) -> list[Any]:
    spans = [_trace().get_current_span(one).get_span_context() for one in contexts]
    return [_trace().Link(span) for span in spans if span.is_valid]


def _headers_of(row: Row) -> Headers:
    try:
        return tuple(unpack_headers(row.headers))
    except DecodeError:  # headers that are not of our packing: the publisher refuses that row
        return ()
