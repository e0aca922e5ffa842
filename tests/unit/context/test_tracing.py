"""Spans of a message's journey, recorded by the real OpenTelemetry SDK."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy.orm import Session

from outboxkit import Consumer, MessageContext, publish, tables
from outboxkit.context import tracing
from outboxkit.context.tracing import Parent
from outboxkit.headers import from_wire, unpack_headers
from outboxkit.message import Message
from tests.consumer_fixture import ConsumerFixture, OrderPlaced, impatient, row_of

SECOND = timedelta(seconds=1)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(autouse=True)
def tracer(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[trace.Tracer]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", lambda: provider.get_tracer("outboxkit"))
    yield provider.get_tracer("tests")
    provider.shutdown()


def emitted(world: ConsumerFixture) -> Message:
    hot = tables.outbox_messages
    with world.engine.connect() as connection:
        row = connection.execute(hot.select().order_by(hot.c.position.desc())).first()
    assert row is not None
    return from_wire(row.topic, row.key, unpack_headers(row.headers), row.payload)


def placed(world: ConsumerFixture) -> Message:
    with world.plain() as session:
        publish(session, OrderPlaced(1), topic="orders", key="k")
        session.commit()
    return emitted(world)


def span(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (found,) = [one for one in exporter.get_finished_spans() if one.name == name]
    return found


def trace_of(one: ReadableSpan) -> int:
    context = one.get_span_context()
    assert context is not None
    return context.trace_id


def span_of(one: ReadableSpan) -> int:
    context = one.get_span_context()
    assert context is not None
    return context.span_id


def test_an_emit_is_a_span_of_the_request_and_its_context_is_in_the_row(
    world: ConsumerFixture, tracer: trace.Tracer, exporter: InMemorySpanExporter
) -> None:
    with world.plain() as session, tracer.start_as_current_span("request"):
        publish(session, OrderPlaced(1), topic="orders", key="k")
        session.commit()

    request, create, message = span(exporter, "request"), span(exporter, "create orders"), emitted(world)
    assert create.kind is trace.SpanKind.PRODUCER
    assert create.parent is not None
    assert create.parent.span_id == span_of(request)
    assert (message.header("traceparent") or "").startswith(f"00-{trace_of(create):032x}-{span_of(create):016x}-")
    assert create.attributes is not None
    assert create.attributes["messaging.destination.name"] == "orders"
    assert create.attributes["messaging.message.id"] == message.id
    assert create.attributes["outboxkit.message.type"] == "order.placed"


async def test_one_trace_goes_through_handler_and_emitted_child(
    world: ConsumerFixture, exporter: InMemorySpanExporter
) -> None:
    message = placed(world)
    billing = Consumer("billing", sessions=world.plain, concurrency=1)

    @billing.on(OrderPlaced, topic="orders")
    def bill(order: OrderPlaced, session: Session) -> None:
        publish(session, OrderPlaced(order.number), topic="bills")

    world.send(message)
    await world.run(billing)

    create, process, child = (span(exporter, name) for name in ("create orders", "process orders", "create bills"))
    assert process.kind is trace.SpanKind.CONSUMER
    assert process.parent is not None
    assert process.parent.span_id == span_of(create)
    assert child.parent is not None
    assert child.parent.span_id == span_of(process)
    assert len({trace_of(create), trace_of(process), trace_of(child)}) == 1
    assert process.attributes is not None
    assert process.attributes["messaging.consumer.group.name"] == "billing"


async def test_a_second_try_begins_a_trace_of_its_own_with_a_link_and_tells_no_text(
    world: ConsumerFixture, exporter: InMemorySpanExporter
) -> None:
    message = placed(world)
    billing = Consumer("billing", sessions=world.plain, concurrency=1, retry=impatient(delayed=1))

    @billing.on(OrderPlaced, topic="orders")
    def bill(order: OrderPlaced, ctx: MessageContext) -> None:
        if ctx.attempt == 1:
            raise KeyError("SECRET")

    world.send(message)
    await world.run(billing)

    first, second = [one for one in exporter.get_finished_spans() if one.name == "process orders"]
    create = span(exporter, "create orders")
    assert (trace_of(first), first.status.status_code) == (trace_of(create), trace.StatusCode.ERROR)
    assert first.attributes is not None
    assert first.attributes["error.type"] == "KeyError"
    assert not first.events
    assert "SECRET" not in first.to_json()
    assert second.parent is None
    assert [link.context.span_id for link in second.links] == [span_of(create)]


@pytest.mark.parametrize(
    ("age", "parent", "linked"),
    [
        (SECOND, Parent.AUTO, 0),
        (3600 * SECOND, Parent.AUTO, 1),
        (None, Parent.AUTO, 1),
        (3600 * SECOND, Parent.CHILD, 0),
        (SECOND, Parent.LINK, 1),
    ],
)
def test_a_message_that_comes_late_is_linked_unless_a_setting_says_otherwise(
    age: timedelta | None, parent: Parent, linked: int, *, world: ConsumerFixture, exporter: InMemorySpanExporter
) -> None:
    message = placed(world)

    with tracing.processing(message, consumer="billing", attempt=1, age=age, parent=parent):
        pass

    process, create = span(exporter, "process orders"), span(exporter, "create orders")
    assert (trace_of(process) == trace_of(create)) is (not linked)
    assert len(process.links) == linked


def test_a_batch_links_to_the_creation_of_each_of_its_messages(
    world: ConsumerFixture, exporter: InMemorySpanExporter
) -> None:
    message = placed(world)
    rows = [row_of(message), row_of(message)._replace(headers=b"{}")]  # the second is not of our packing

    tracing.sending("orders", rows)("broker-down")

    send, create = span(exporter, "send orders"), span(exporter, "create orders")
    assert send.kind is trace.SpanKind.CLIENT
    assert [link.context.span_id for link in send.links] == [span_of(create)]
    assert send.attributes is not None
    assert send.attributes["messaging.batch.message_count"] == 2
    assert send.attributes["error.type"] == "broker-down"
