"""Traces with the real OpenTelemetry SDK: from the span that emits, through outbox and broker, into the handler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, TraceState
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from outboxkit import context, publish, tables
from outboxkit.consumer import Consumer
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, order

FOREIGN = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[trace.Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("tests")
    provider.shutdown()


def emitted(world: ConsumerFixture) -> list[Message]:
    """What is in the outbox, as a broker would deliver it."""
    with world.engine.connect() as connection:
        rows = connection.execute(tables.outbox_messages.select().order_by(tables.outbox_messages.c.position)).all()
    return [from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload) for row in rows]


def ids(span: ReadableSpan) -> tuple[int, int]:
    found = span.get_span_context()
    assert found is not None
    return found.trace_id, found.span_id


def header(message: Message) -> tuple[int, int]:
    _, trace_id, span_id, flags = (message.header("traceparent") or "").split("-")
    assert int(flags, 16) & trace.TraceFlags.SAMPLED
    return int(trace_id, 16), int(span_id, 16)


@pytest.mark.parametrize("kind", ["async", "plain"])
async def test_a_trace_goes_from_the_span_that_emits_into_the_handler_and_on_to_what_it_emits(
    world: ConsumerFixture, tracer: trace.Tracer, exporter: InMemorySpanExporter, kind: str
) -> None:
    with world.plain() as session, tracer.start_as_current_span("request"):
        publish(session, OrderPlaced(1), topic="orders", key="k")
        session.commit()
    (first,) = emitted(world)
    billing = Consumer("billing", sessions=world.asynchronous if kind == "async" else world.plain)

    async def bill(placed: OrderPlaced, session: AsyncSession) -> None:
        with tracer.start_as_current_span("bill"):
            publish(session, OrderPlaced(placed.number + 1), topic="bills")
        publish(session, OrderPlaced(placed.number + 2), topic="bills")

    def bill_plainly(placed: OrderPlaced, session: Session) -> None:
        with tracer.start_as_current_span("bill"):
            publish(session, OrderPlaced(placed.number + 1), topic="bills")
        publish(session, OrderPlaced(placed.number + 2), topic="bills")

    billing.on(OrderPlaced, topic="orders")(bill if kind == "async" else bill_plainly)
    world.send(first)
    await world.run(billing)

    spans = {span.name: span for span in exporter.get_finished_spans()}
    request, handler = spans["request"], spans["bill"]
    assert header(first) == ids(request)
    assert handler.parent is not None
    assert (handler.parent.trace_id, handler.parent.span_id, handler.parent.is_remote) == (*ids(request), True)
    inside, outside = emitted(world)[1:]
    assert header(inside) == ids(handler)
    assert header(outside) == ids(request)
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_state_travels_along_and_baggage_does_not(world: ConsumerFixture, tracer: trace.Tracer) -> None:
    parent = SpanContext(
        trace_id=1, span_id=2, is_remote=True, trace_flags=trace.TraceFlags(1), trace_state=TraceState([("v", "x")])
    )
    around = trace.set_span_in_context(trace.NonRecordingSpan(parent))
    with tracer.start_as_current_span("request", context=around), world.plain() as session:
        publish(session, OrderPlaced(1), topic="orders")
        session.commit()

    (message,) = emitted(world)

    assert message.header("tracestate") == "v=x"
    assert {name for name, _ in message.headers} == {"traceparent", "tracestate"}


def test_without_a_span_there_is_no_trace(world: ConsumerFixture) -> None:
    with world.plain() as session:
        publish(session, OrderPlaced(1), topic="orders")
        session.commit()

    assert emitted(world)[0].headers == ()


def test_the_span_of_a_consumers_own_instrumentation_stays(tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("process") as own, context.handling(order(1, headers=(FOREIGN,))):
        assert trace.get_current_span() is own
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("value", [b"", b"garbage", b"\xff\xfe", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"])
def test_a_trace_that_cannot_be_read_hinders_nobody(tracer: trace.Tracer, value: bytes) -> None:
    with context.handling(order(1, headers=(("traceparent", value),))):
        assert not trace.get_current_span().get_span_context().is_valid
        with tracer.start_as_current_span("bill") as span:
            assert span.get_span_context().is_valid
