"""The database goes away under load, in the ways it does: the relay goes on by itself."""

from __future__ import annotations

import os
import signal

import pytest

from tests import servers
from tests.acceptance.world import Kafka, RabbitMQ, World, Writer
from tests.faults.test_relays import EVIDENCED, KEYS, LEFT, OURS, are_right
from tests.servers import processes
from tests.servers.local import LocalServer

pytestmark = pytest.mark.full  # minutes of kills and restarts: not in the short profile

ORDERS = 2_000
ROUNDS = 4


@pytest.mark.timeout(300)
def test_a_database_that_is_restarted_under_load_costs_no_message(
    world: World,
    reader: Kafka | RabbitMQ,
    postgres: servers.Server,
) -> None:
    """One session is ended, then the server stops at once, twice: sessions die, what was committed is recovered."""
    writer = Writer(world.engine, ORDERS, KEYS, patient=True)
    relay = world.start("relay", "run")
    writer.start(ORDERS // ROUNDS)
    world.until(lambda: world.scalar(EVIDENCED) > 0, "it publishes")

    assert world.scalar(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {OURS}") > 0, "void"
    for fault in (1, 2, 3):
        world.until(lambda: len(world.said(relay, "relay.joined")) > fault, "it has joined again")  # noqa: B023  at once
        so_far = world.scalar(EVIDENCED)
        writer.go_on(ORDERS * (fault + 1) // ROUNDS)
        world.until(lambda: world.scalar(EVIDENCED) > so_far, "it publishes again")  # noqa: B023  at once
        if fault < 3:
            assert world.scalar(LEFT) > 0 or writer.written < ORDERS * (fault + 1) // ROUNDS, "void: no load"
            restart(world, postgres)
    writer.join()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.stop(relay)
    assert writer.failures > 0, "void: the writer did not notice"
    assert len(world.said(relay, "database.away")) >= 3
    are_right(world, reader, ORDERS)


def restart(world: World, postgres: servers.Server) -> None:
    """An immediate stop: no session is asked, nothing is written, the start recovers from the log."""
    if isinstance(postgres, LocalServer):
        pid = postgres.pid
        os.kill(pid, signal.SIGQUIT)
        world.until(lambda: not processes.tree(pid), "the server is down")
    postgres.kill()
    world.engine.dispose()
    postgres.start()
