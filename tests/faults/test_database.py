"""The database goes away under load, in the ways it does: the relay goes on by itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ
from tests.faults.brokers import on_brokers
from tests.faults.traffic import EVIDENCED, LEFT, OURS, answers, are_right
from tests.servers import processes
from tests.servers.local import LocalServer

KEYS = 20


def end_sessions(world: AcceptanceEnvironment, _postgres: servers.Server) -> None:
    """Every session of the relay is ended by an administrator."""
    assert world.scalar(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {OURS}") > 0, "void"


def kill_a_backend(world: AcceptanceEnvironment, postgres: servers.Server) -> None:
    """One server process of the relay dies: the server ends all others, too, and recovers from its log."""
    if isinstance(postgres, LocalServer):
        os.kill(
            world.scalar(f"SELECT pid FROM pg_stat_activity WHERE {OURS} ORDER BY random() LIMIT 1"), signal.SIGKILL
        )
    else:
        restart(world, postgres)


def restart(world: AcceptanceEnvironment, postgres: servers.Server) -> None:
    """An immediate stop: no session is asked, nothing is written, the start recovers from the log."""
    if isinstance(postgres, LocalServer):
        pid = postgres.pid
        os.kill(pid, signal.SIGQUIT)
        world.until(lambda: not processes.tree(pid), "the server is down")
    postgres.kill()
    postgres.start()


FAULTS: tuple[Callable[[AcceptanceEnvironment, servers.Server], None], ...] = (
    end_sessions,
    kill_a_backend,
    restart,
    restart,
)


@on_brokers("rabbitmq")
def test_a_database_that_is_restarted_under_load_costs_no_message(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
    postgres: servers.Server,
) -> None:
    relay = world.start("relay", "run")
    writer = world.load(KEYS, patient=True)
    world.until(lambda: world.scalar(EVIDENCED) > 0, "it publishes")

    for fault in FAULTS:
        joined, failures = len(world.said(relay, "relay.joined")), writer.failures
        fault(world, postgres)
        if fault is not end_sessions:
            world.until(lambda: writer.failures > failures, "the writer has noticed")  # noqa: B023  at once
        world.until(lambda: len(world.said(relay, "relay.joined")) > joined, "it has joined again")  # noqa: B023
        world.until(lambda: answers(world), "the database answers")
        so_far = world.scalar(EVIDENCED)
        world.until(lambda: world.scalar(EVIDENCED) > so_far, "it publishes again")  # noqa: B023  at once
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.stop(relay)
    assert len(world.said(relay, "database.away")) >= len(FAULTS)
    are_right(world, reader)
