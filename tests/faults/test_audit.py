"""The audit holds at every moment of a run in which relays die, freeze and are rolled, and a broker goes away."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import create_engine, text

from outboxkit_relay.diagnose.audit import Audit, audit
from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ
from tests.deadlines import DEADLINE
from tests.faults.brokers import on_brokers
from tests.faults.traffic import EVIDENCED, LEFT, are_right

KEYS = 20
KILLS = 10


class Auditor:
    """Takes one audit after the other, each in a snapshot with a count of the application's own rows."""

    def __init__(self, world: AcceptanceEnvironment) -> None:
        self.engine = create_engine(world.engine.url, isolation_level="REPEATABLE READ")
        self.found: list[tuple[int, Audit]] = []
        self.errors: list[BaseException] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="auditor")

    def _run(self) -> None:
        try:
            while not self._end.wait(0.05):  # the others need the machine, too
                self.found.append(self.look())
        except BaseException as error:  # noqa: BLE001  the test shows it
            self.errors.append(error)

    def look(self) -> tuple[int, Audit]:
        with self.engine.begin() as connection:
            placed = connection.execute(text("SELECT count(*) FROM orders")).scalar_one()
            return placed, audit(connection)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._end.set()
            self._thread.join(DEADLINE)
            self.engine.dispose()
        assert not self.errors, self.errors


@pytest.mark.full
@on_brokers("rabbitmq")
def test_the_audit_holds_at_every_moment_of_a_chaotic_run(
    world: AcceptanceEnvironment, reader: Kafka | RabbitMQ, broker: servers.Server, scores: list[str]
) -> None:
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    relays = [world.start("relay", "run") for _ in range(2)]
    writer = world.load(KEYS)
    auditor = Auditor(world)
    with auditor.at_work():
        for number in range(KILLS):
            so_far = world.scalar(EVIDENCED)
            world.until(lambda: world.scalar(EVIDENCED) > so_far, "it publishes")  # noqa: B023  at once
            relays[0].send_signal(signal.SIGSTOP)  # a zombie-to-be: the other one takes over
            if number == 1:
                broker.pause()
            relays[1].kill()
            relays[1].wait(DEADLINE)
            relays[0].send_signal(signal.SIGCONT)
            relays[1] = world.start("relay", "run")
            broker.resume()
            world.until(lambda: world.said(relays[1], "relay.joined"), "the next one has joined")
        writer.finish()
        world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.until(
        lambda: world.scalar("SELECT count(*) - (SELECT count(*) FROM invoices) FROM orders") <= 0, "all billed"
    )
    for process in (*relays, consumer):
        world.stop(process)

    copies = are_right(world, reader)
    wrong = [(placed, found) for placed, found in auditor.found if placed != found.emitted or found.contradictions]
    moving = [found for _, found in auditor.found if found.accounts["pending"] and found.accounts["published"]]
    scores.append(f"audit: {len(auditor.found)} snapshots, {len(moving)} with messages on their way, {copies} copies")
    assert wrong == []
    assert len(moving) > KILLS, "void: nothing moved"
    told = json.loads(world.run("audit", "--json").stdout)
    assert told["verdict"] == "conserved"
    assert told["emitted"] == told["accounts"]["published"] == world.scalar("SELECT count(*) FROM orders")
    assert told["inbox"]["shop-billing"]["handled"] == told["emitted"]
