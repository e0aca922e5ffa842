"""Whether writers notice that the broker is away: how long their commits take with it and without it.

    scripts/bench writers [--broker kafka|rabbitmq] [--rate 100] [--quick] [--json FILE]

An application places orders at a steady rate, each in a transaction of its own through the ORM, while a relay runs in
a process of its own. Phases with the broker up and with the broker stopped take turns; which comes first changes every
round. A phase with the broker up begins when the backlog of the one before is published. A transaction is measured from
its begin to the return of its commit; the verdict is the ratio of the medians of the rounds' 99th percentiles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROUNDS, WRITERS, CUSTOMERS = 5, 2, 50
UP, AWAY = "broker up", "broker away"


class Shop:
    """The application: its tables, its relay, and writers at a steady rate."""

    def __init__(self, database: str, broker: Any) -> None:
        from sqlalchemy import create_engine

        from outboxkit import migrations
        from tests.acceptance.shop import Base

        self.engine = create_engine(database)
        Base.metadata.create_all(self.engine)
        with self.engine.begin() as connection:
            migrations.upgrade(connection)
        self.broker = broker
        self._numbers = 0
        environment = {**os.environ, "OUTBOXKIT_DATABASE_URL": database, "OUTBOXKIT_BROKER_URL": broker.url}
        self._relay = subprocess.Popen(
            [sys.executable, "-m", "outboxkit_relay", "relay", "run"],
            env=environment,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )

    def phase(self, rate: float, seconds: float) -> list[float]:
        """Milliseconds of each transaction, sorted."""
        with ThreadPoolExecutor(WRITERS) as pool:
            parts = [pool.submit(self._write, index, rate / WRITERS, seconds) for index in range(WRITERS)]
            spans = [part.result() for part in parts]
        self._numbers += WRITERS * max(map(len, spans))
        return sorted(span for part in spans for span in part)

    def _write(self, index: int, rate: float, seconds: float) -> list[float]:
        from sqlalchemy.orm import Session

        from tests.acceptance.shop import Order

        spans: list[float] = []
        began, never = time.perf_counter(), threading.Event()
        while (now := time.perf_counter() - began) < seconds:
            never.wait(max(0.0, len(spans) / rate - now))
            number = self._numbers + len(spans) * WRITERS + index
            started = time.perf_counter()
            with Session(self.engine) as session, session.begin():
                session.add(Order(number=number, customer=f"c{number % CUSTOMERS}", ordinal=number).place())
            spans.append((time.perf_counter() - started) * 1000)
        return spans

    def backlog(self) -> int:
        from sqlalchemy import text

        with self.engine.connect() as connection:
            return int(connection.execute(text("SELECT count(*) FROM outbox_messages")).scalar_one())

    def be(self, state: str) -> None:
        """Takes the broker away, or brings it back and waits until nothing is left to publish."""
        if state == AWAY:
            self.broker.stop()
            return
        self.broker.heal()
        deadline, never = time.monotonic() + 60, threading.Event()
        while self.backlog():
            if time.monotonic() > deadline:
                sys.exit("void: the backlog is not published")
            never.wait(0.05)

    def close(self) -> None:
        self._relay.send_signal(signal.SIGTERM)
        self._relay.wait(60)
        self.engine.dispose()


def measure(shop: Shop, rate: float, seconds: float) -> list[dict[str, list[float]]]:
    """Both phases of every round; before the first one everything has run once."""
    shop.phase(rate, 2)
    rounds = []
    for number in range(ROUNDS):
        measured: dict[str, list[float]] = {}
        for state in (UP, AWAY) if number % 2 else (AWAY, UP):
            shop.be(state)
            shop.phase(rate, 1)  # the broker's coming and going is not what is measured
            measured[state] = shop.phase(rate, seconds)
            if state == AWAY and shop.backlog() < len(measured[state]):
                sys.exit("void: something was published while the broker was away")
        rounds.append(measured)
        told = ", ".join(f"{state} p99 {percentile(spans, 0.99):.2f} ms" for state, spans in sorted(measured.items()))
        print(f"round {number + 1}: {told}", flush=True)
    return rounds


def percentile(spans: list[float], share: float) -> float:
    return spans[int(len(spans) * share)]


def report(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    print(f"\n{'':12}{'commits':>9}{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}   medians of {len(rounds)} rounds")
    result: dict[str, Any] = {}
    for state in (UP, AWAY):
        spans = [one[state] for one in rounds]
        row = {
            "commits": sum(map(len, spans)),
            "p50_ms": statistics.median(percentile(one, 0.5) for one in spans),
            "p99_ms": statistics.median(percentile(one, 0.99) for one in spans),
            "max_ms": max(one[-1] for one in spans),
        }
        result[state] = row
        print(f"{state:12}{row['commits']:>9,}{row['p50_ms']:>9.2f}{row['p99_ms']:>9.2f}{row['max_ms']:>9.2f}")
    result["ratio_p99"] = result[AWAY]["p99_ms"] / result[UP]["p99_ms"]
    print(f"\np99 with the broker away is {result['ratio_p99']:.2f} times that with the broker up (goal: at most 1.10)")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", choices=["kafka", "rabbitmq"], default="kafka")
    parser.add_argument("--rate", type=float, default=100, help="transactions per second")
    parser.add_argument("--quick", action="store_true", help="phases of 4 seconds instead of 12")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT)]
    import asyncio

    from outboxkit.brokers import open_subscriber
    from outboxkit_relay.cli.console import import_string
    from tests import servers
    from tests.acceptance.shop import billing
    from tests.servers.postgres import create_database

    async def declare(url: str) -> None:
        wanted = import_string.subscription(billing)
        subscriber = open_subscriber(url, wanted, {})
        await subscriber.declare(wanted)
        await subscriber.close()

    postgres, broker = servers.find("postgres"), servers.find(arguments.broker)
    try:
        asyncio.run(declare(broker.url))
        shop = Shop(create_database(postgres.url), broker)
        try:
            rounds = measure(shop, arguments.rate, 4 if arguments.quick else 12)
        finally:
            shop.close()
    finally:
        broker.close()
        postgres.close()
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
    versions = {"postgres": postgres.version, "broker": f"{broker.name} {broker.version}"}
    print(", ".join(f"{name} {value}" for name, value in {**machine, **versions}.items()))
    result = {**machine, **versions, "rate": arguments.rate, "result": report(rounds), "rounds": rounds}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
