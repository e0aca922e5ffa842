"""A consumer that runs can be asked how it is, over HTTP and through the metrics of its application."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from outboxkit import tables
from outboxkit.brokers.memory import MemorySubscriber
from outboxkit.consumer import Consumer
from outboxkit.consumer.observe import stats
from outboxkit.rows import CutOff
from outboxkit_relay.observe import health
from outboxkit_relay.observe.consumer import OUTCOMES, ProbedConsumers
from outboxkit_relay.settings import ProbeSettings
from tests.consumer_fixture import ConsumerFixture, handles, impatient, order
from tests.deadlines import DEADLINE
from tests.probes import ask


class Probe:
    """Asks one consumer."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def get(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(ask, self.port, path)

    async def ready(self) -> tuple[int, dict[str, Any]]:
        status, body = await self.get("/readyz")
        return status, json.loads(body)

    async def metrics(self) -> dict[tuple[str, ...], float]:
        """Values by name and the values of labels, sorted, without that of the consumer."""
        families = text_string_to_metric_families((await self.get("/metrics"))[1])
        samples = [sample for family in families for sample in family.samples]
        return {
            (sample.name, *sorted(value for name, value in sample.labels.items() if name != "consumer")): sample.value
            for sample in samples
        }

    async def until(self, fact: Callable[[int, dict[str, Any]], bool]) -> dict[str, Any]:
        """The first answer of ``/readyz`` that has the fact."""
        deadline = time.monotonic() + DEADLINE
        while True:
            status, body = await self.ready()
            if fact(status, body):
                return body
            assert time.monotonic() < deadline, body


@asynccontextmanager
async def probed(world: ConsumerFixture, billing: Consumer) -> AsyncIterator[tuple[Probe, Callable[[], Any]]]:
    """A server for the probes, and what starts the consumer."""
    stop, running = asyncio.Event(), []

    def start() -> None:
        subscriber = MemorySubscriber(world.exchange, billing.subscription)
        running.append(asyncio.create_task(billing.run(subscriber, stop)))

    with health.serving(ProbeSettings(port=0), ProbedConsumers((billing,), "1.2.3")) as port:
        assert port
        try:
            yield Probe(port), start
        finally:
            stop.set()
            await asyncio.gather(*running)


def failing(number: int, _ctx: Any) -> None:
    if number == 2:
        raise KeyError


async def settled(billing: Consumer, **counts: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while {name: billing.counts[name] for name in counts} != counts:
        assert time.monotonic() < deadline, billing.counts
        await asyncio.sleep(0.01)


async def told(world: ConsumerFixture, cut_off: CutOff | None) -> None:
    """Returns when a heartbeat has told other machines."""
    deadline = time.monotonic() + DEADLINE
    while True:
        (row,) = await asyncio.to_thread(world.rows, tables.inbox_consumers)
        if CutOff.from_text(row.trouble, row.started_at) == cut_off:
            return
        assert time.monotonic() < deadline, row.trouble
        await asyncio.sleep(0.05)


async def test_a_consumer_is_alive_and_ready_and_counts_what_becomes_of_messages(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outboxkit.consumer.run._COUNT_EVERY", timedelta(0))
    billing = Consumer("billing", sessions=world.asynchronous, retry=impatient(delayed=1), on_dead="park")
    handles(billing, failing)
    async with probed(world, billing) as (probe, start):
        assert (await probe.get("/livez"))[0] == 200
        assert await probe.until(lambda status, _: status == 503)
        start()
        await probe.until(lambda status, body: status == 200 and body["consumers"][0]["phase"] == "running")
        world.send(
            order(1, key="a", message_id="a"),
            order(1, key="a", message_id="a"),
            order(2, key="b"),
            order(3, type="order.cancelled"),
        )
        await settled(billing, handled=1, duplicate=1, buried=1, parked=1, ignored=1)
        world.send(order(4, key="b"))
        await settled(billing, followed=1)
        await probe.until(lambda _, body: billing.stats.backlog.follower == 1 and body["consumers"][0]["lag"] == 0)
        found = await probe.metrics()

    names = ("handled", "duplicate", "ignored", "buried", "parked", "followed", "expired")
    assert [found["outboxkit_consumer_messages_total", name] for name in names] == [1, 1, 1, 1, 1, 1, 0]
    assert found["outboxkit_consumer_received_total",] == 5
    assert found["outboxkit_consumer_ignored_total", "order.cancelled", "orders"] == 1
    assert found["outboxkit_consumer_ready",] == found["outboxkit_consumer_sources",] == 1
    assert (found["outboxkit_consumer_slots",], found["outboxkit_consumer_busy_slots",]) == (16, 0)
    assert found["outboxkit_consumer_lag_messages",] == found["outboxkit_consumer_in_hand_messages",] == 0
    assert [found["outboxkit_inbox_waiting_messages", why] for why in ("retry", "follower", "parked")] == [0, 1, 1]
    assert 0 < found["outboxkit_inbox_oldest_waiting_age_seconds",] < DEADLINE
    assert found["outboxkit_handler_duration_seconds_count",] == 3  # the duplicate called nobody
    assert found["outboxkit_consumer_transaction_duration_seconds_count",] == 4
    assert found["outboxkit_critical_time_seconds_count",] == 1
    assert 0 < found["outboxkit_critical_time_seconds_sum",] < DEADLINE
    assert any(name == "outboxkit_build_info" for name, *_ in found)


async def test_a_consumer_that_is_cut_off_is_alive_and_not_ready_and_says_why(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.asynchronous)
    handles(billing)
    async with probed(world, billing) as (probe, start):
        start()
        await probe.until(lambda status, _: status == 200)
        world.exchange.away = True
        body = await probe.until(lambda status, _: status == 503)
        cut_off = billing.stats.cut_off
        await told(world, cut_off)

        assert (await probe.get("/livez"))[0] == 200
        assert body["reason"] == "billing: the broker is away: the memory broker is away"
        assert body["consumers"][0]["trouble"].startswith("billing: the memory broker is away; for ")
        assert (await probe.metrics())["outboxkit_consumer_ready",] == 0
        world.exchange.away = False
        await probe.until(lambda status, _: status == 200)
        await told(world, None)


async def test_a_consumer_that_meets_no_broker_at_its_start_says_so(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.asynchronous)
    handles(billing)
    world.exchange.away = True
    async with probed(world, billing) as (probe, start):
        start()
        body = await probe.until(lambda _, body: "memory broker" in body.get("reason", ""))
        (row,) = await asyncio.to_thread(world.rows, tables.inbox_consumers)
        world.exchange.away = False
        await probe.until(lambda status, _: status == 200)

    assert body["reason"].startswith("billing: starting: the broker has given it no partition and no queue yet")
    assert "starting; the memory broker is away" in body["consumers"][0]["trouble"]
    assert json.loads(row.trouble)["is_new"]


async def test_every_series_is_there_before_the_first_message(world: ConsumerFixture) -> None:
    billing = Consumer("billing", sessions=world.asynchronous)
    async with probed(world, billing) as (probe, _):
        found = await probe.metrics()

    names = {name for name, *_ in found}
    assert {("outboxkit_consumer_messages_total", name.replace(" ", "_")) for name in OUTCOMES} <= set(found)
    assert {"outboxkit_handler_duration_seconds_count", "outboxkit_critical_time_seconds_count"} <= names
    assert {"outboxkit_consumer_ready", "outboxkit_consumer_lag_messages", "outboxkit_consumer_busy_slots"} <= names
    assert {"outboxkit_inbox_waiting_messages", "outboxkit_inbox_oldest_waiting_age_seconds"} <= names


async def test_an_event_loop_that_does_not_turn_is_not_alive(
    world: ConsumerFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probes have a thread of their own: they answer while a handler blocks the loop."""
    monkeypatch.setattr(stats, "_STUCK_AFTER", 0.3)
    billing = Consumer("billing", sessions=world.asynchronous)
    answers: list[tuple[int, str]] = []
    async with probed(world, billing) as (probe, start):

        def block(number: int, _ctx: Any) -> None:
            deadline = time.monotonic() + DEADLINE
            while not answers or answers[-1][0] == 200:
                answers.append(ask(probe.port, "/livez"))
                assert time.monotonic() < deadline

        handles(billing, block)
        world.send(order(1))
        start()
        await settled(billing, handled=1)

    assert answers[-1][0] == 503
    assert "billing: the event loop has not turned for" in answers[-1][1]
