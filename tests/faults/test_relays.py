"""What happens to whole relays: frozen and thawed, rolled one after another, stopped while the broker is silent."""

from __future__ import annotations

import re
import signal
import subprocess
import time
import urllib.request

import psutil
from sqlalchemy import text

from tests import servers
from tests.acceptance.world import AcceptanceEnvironment, Kafka, RabbitMQ, effects_are_in_order
from tests.conftest import PROFILE
from tests.deadlines import DEADLINE
from tests.faults.brokers import on_brokers
from tests.faults.traffic import EVIDENCED, LEFT, OURS, are_right

KEYS = 20
ROLLS = 10 if PROFILE == "full" else 3
DRAIN = 3.0


# --- frozen ------------------------------------------------------------------------------------------------------


@on_brokers("kafka")
def test_a_relay_that_wakes_up_after_its_lease_has_ended_changes_nothing_and_joins_again(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
) -> None:
    consumer = world.start("consume", "tests.acceptance.shop:billing")
    zombie = world.start("relay", "run", OUTBOXKIT_PROBES__PORT="0")
    world.until(lambda: world.said(zombie, "relay.joined"), "the relay has joined")
    writer = world.load(KEYS)
    world.until(lambda: world.scalar(EVIDENCED) > 0, "it publishes")
    other = world.start("relay", "run")

    # A try is void when the zombie's connections were lost meanwhile: it joins again without having tried to write.
    assert any(_is_fenced_when_thawed(world, zombie) for _ in range(3)), "void: nothing of it was fenced"

    world.until(lambda: fenced(world, zombie) == 1, "what was fenced is counted")
    new = world.said(zombie, "relay.joined")[-1]["relay"]
    world.until(lambda: world.scalar(f"SELECT count(*) FROM outbox_ledger WHERE relay = '{new}'") > 0, "it works again")
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    orders = world.scalar("SELECT count(*) FROM orders")
    world.until(lambda: world.scalar("SELECT count(*) FROM invoices") >= orders, "everything billed")
    for process in (zombie, other, consumer):
        world.stop(process)
    are_right(world, reader)
    assert world.scalar("SELECT count(*) FROM invoices") == orders
    assert effects_are_in_order(world)


def _is_fenced_when_thawed(world: AcceptanceEnvironment, zombie: subprocess.Popen[bytes]) -> bool:
    """Freezes it until another relay has taken over; whether it noticed by a write that was refused."""
    joined = world.said(zombie, "relay.joined")
    token = joined[-1]["relay"]
    freeze_between_transactions(world, zombie)
    world.until(
        lambda: world.scalar(f"SELECT count(*) FROM outbox_relays WHERE id = '{token}'") == 0,
        "the other one has taken over",
    )
    zombie.send_signal(signal.SIGCONT)
    world.until(lambda: len(world.said(zombie, "relay.joined")) > len(joined), "it joins again")
    return token in [line["relay"] for line in world.said(zombie, "lease.lost")]


def fenced(world: AcceptanceEnvironment, relay: subprocess.Popen[bytes]) -> float:
    """What the relay's own metrics say."""
    (line,) = world.said(relay, "probes.listening")
    with urllib.request.urlopen(f"http://127.0.0.1:{line['port']}/metrics", timeout=60) as answer:
        (value,) = re.findall(r"^outboxkit_relay_fenced_total (\S+)$", answer.read().decode(), re.MULTILINE)
    return float(value)


def freeze_between_transactions(world: AcceptanceEnvironment, relay: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, at a moment when the server would not end a transaction that the relay has left open."""
    while True:
        relay.send_signal(signal.SIGSTOP)
        ports = [connection.laddr.port for connection in psutil.Process(relay.pid).net_connections("tcp")]
        sessions = f"SELECT count(*) FROM pg_stat_activity WHERE client_port = ANY(ARRAY{ports}) AND state "
        world.until(lambda: world.scalar(f"{sessions} = 'active'") == 0, "what it has asked for is done")  # noqa: B023  at once
        if world.scalar(f"{sessions} LIKE 'idle in transaction%'") == 0:
            return
        relay.send_signal(signal.SIGCONT)


# --- rolled ------------------------------------------------------------------------------------------------------


@on_brokers("rabbitmq")
def test_three_relays_are_rolled_under_load_without_one_copy(
    world: AcceptanceEnvironment, reader: Kafka | RabbitMQ
) -> None:
    relays = [world.start("relay", "run") for _ in range(3)]
    for relay in relays:
        world.until(lambda: world.said(relay, "relay.joined"), "joined")  # noqa: B023  at once
    writer = world.load(KEYS)

    for _ in range(ROLLS):
        before = world.scalar(EVIDENCED)
        world.until(lambda: world.scalar(EVIDENCED) > before, "messages between two rolls")  # noqa: B023  at once
        world.stop(relays.pop(0))
        relays.append(world.start("relay", "run"))
        world.until(lambda: world.said(relays[-1], "relay.joined"), "the next one has joined")
    writer.finish()

    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    for relay in relays:
        world.stop(relay)
    assert world.scalar("SELECT count(DISTINCT relay) FROM outbox_ledger") > 3, "void: no new relay had a share"
    assert are_right(world, reader) == 0, "a clean stop made copies"
    assert world.scalar("SELECT count(*) FROM outbox_relays") == 0


# --- told to stop ------------------------------------------------------------------------------------------------


@on_brokers()
def test_a_stop_while_the_broker_is_silent_ends_within_the_drain_limit_and_a_second_signal_ends_it_at_once(
    world: AcceptanceEnvironment,
    reader: Kafka | RabbitMQ,
    broker: servers.Server,
) -> None:
    orders, unsent = 400, 200
    world.environment["OUTBOXKIT_RELAY__DRAIN"] = f"{DRAIN}s"
    writer = world.writer(orders, KEYS)
    patient = world.start("relay", "run")
    hasty = world.start("relay", "run", OUTBOXKIT_RELAY__DRAIN="1h")  # it ends before that only if it does not wait
    each_has_half = "SELECT count(*) FROM (SELECT owner FROM outbox_shards GROUP BY owner HAVING count(*) = 32) AS half"
    world.until(lambda: world.scalar(each_has_half) == 2, "they share the work")
    writer.start(orders - unsent)
    world.until(lambda: writer.written == orders - unsent and world.scalar(LEFT) == 0, "they publish")
    broker.pause()
    writer.go_on(orders)
    writer.join()
    both_hold_messages(world)
    assert world.scalar(LEFT) == unsent, "void: the broker still answers"

    asked = time.monotonic()
    patient.send_signal(signal.SIGTERM)
    hasty.send_signal(signal.SIGTERM)
    world.until(lambda: world.said(hasty, "relay.stopping"), "it waits for what is in flight")
    assert hasty.poll() is None
    hasty.send_signal(signal.SIGTERM)
    assert hasty.wait(DEADLINE) == 128 + signal.SIGTERM, "it waited all the same"
    assert patient.wait(DEADLINE) == 0, world.logs()  # although the broker never answered
    assert time.monotonic() - asked >= DRAIN - 0.5

    for relay in (patient, hasty):
        assert world.said(relay, "relay.stopping")[0]["in_flight"] > 0, "void: nothing was in flight"
    assert len(world.said(patient, "relay.left")) == 1
    assert not world.said(hasty, "relay.left")
    (token,) = (line["relay"] for line in world.said(patient, "relay.joined"))
    assert world.scalar(f"SELECT count(*) FROM outbox_relays WHERE id = '{token}'") == 0, "its lease is given back"
    assert world.scalar(f"SELECT count(*) FROM outbox_shards WHERE owner = '{token}'") == 0
    assert world.scalar(LEFT) == unsent, "what was not acknowledged is still there"
    broker.resume()
    last = world.start("relay", "run")
    world.until(lambda: world.scalar(LEFT) == 0, "everything published")
    world.stop(last)
    are_right(world, reader)


def both_hold_messages(world: AcceptanceEnvironment) -> None:
    """Waits until each relay has begun a second read after now: what the first one found is handed over then."""
    mark = world.scalar("SELECT extract(epoch FROM clock_timestamp()) * 1000000")
    reads: dict[int, set[float]] = {}
    begun = text(
        f"SELECT pid, query_start FROM pg_stat_activity WHERE {OURS} AND query LIKE '%FROM outbox_messages%'"
        f" AND query NOT LIKE '%DELETE%' AND extract(epoch FROM query_start) * 1000000 > {mark}"
    )

    def look() -> bool:
        with world.engine.connect() as connection:
            for pid, start in connection.execute(begun):
                reads.setdefault(pid, set()).add(start)
        return sum(len(found) > 1 for found in reads.values()) == 2

    world.until(look, "both have read")
