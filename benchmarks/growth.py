"""Whether a relay is as fast on a large backlog as on a small one, in constant memory, beside an open transaction.

    scripts/bench growth [--quick] [--json FILE]

The sink accepts everything at once: what is measured is reading, claiming and settling, where a backlog would hurt. The
cases take turns: a small backlog, the same with a foreign writing transaction open all the time, and a large one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import relay as race  # noqa: E402

SMALL, LARGE = 300_000, 2_000_000


class Sink:
    """A broker that has everything at once."""

    def __init__(self) -> None:
        from outboxkit.brokers.kafka.publish import FEATURES

        self.features = FEATURES

    def publish(self, batch: Any) -> Future[Any]:
        from outboxkit.brokers import Receipts

        count, answer = len(batch.rows), Future[Any]()
        answer.set_result(Receipts([0] * count, list(range(count)), ()))
        return answer

    def capacity(self, _destination: str) -> int:
        return 10_000

    def reset(self) -> None: ...

    def close(self) -> None: ...


def drain_here(database: str) -> None:
    """(in a process of its own)"""
    from outboxkit.dialects import open_engine
    from outboxkit_relay.core.state import RelayConfig
    from outboxkit_relay.daemon import lifecycle
    from outboxkit_relay.daemon.relay import RelayDaemon

    lifecycle.tune_interpreter()
    engine = open_engine(database, patience=timedelta(seconds=10))
    began = time.perf_counter()
    RelayDaemon(engine, Sink(), RelayConfig(once=True)).run(threading.Event())  # type: ignore[arg-type]
    print(json.dumps(time.perf_counter() - began))


def drain(database: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--drain", database]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        memory = watch(psutil.Process(child.pid))
        said = child.communicate()[0]
    assert race.left(database) == 0, "messages were left behind"
    half = memory[len(memory) // 4 : len(memory) // 2], memory[len(memory) // 2 :]
    early, late = (statistics.median(part) for part in half)
    return {"rate": count / json.loads(said), "mib": max(memory), "growth": late / early - 1}


def watch(process: psutil.Process) -> list[float]:
    """Its memory in MiB, ten times a second, from when it works until it ends."""
    seen = []
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            seen.append(process.memory_info().rss / 2**20)
            time.sleep(0.1)
    return [one for one in seen if one]


@contextlib.contextmanager
def foreign_transaction(database: str) -> Iterator[None]:
    """Somebody else's, that has written and does not end."""
    import psycopg

    with psycopg.connect(database.replace("+psycopg", "")) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS elsewhere (n int)")
        connection.commit()
        connection.execute("INSERT INTO elsewhere VALUES (1)")
        yield
        connection.rollback()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a fifth of the messages, two rounds")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--drain", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drain:
        drain_here(arguments.drain)
        return
    from sqlalchemy import create_engine

    from outboxkit import migrations
    from tests import servers
    from tests.servers.postgres import create_database

    small, large = (count // (5 if arguments.quick else 1) for count in (SMALL, LARGE))
    postgres = servers.find("postgres")
    rounds: list[dict[str, dict[str, float]]] = []
    try:
        database = create_database(postgres.url)
        with create_engine(database).begin() as connection:
            migrations.upgrade(connection)
        print(f"PostgreSQL {postgres.version}; a sink that accepts at once")
        for number in range(2 if arguments.quick else 3):
            measured = {}
            race.fill(database, small)
            measured["small"] = drain(database, small)
            race.fill(database, small)
            with foreign_transaction(database):
                measured["foreign"] = drain(database, small)
            race.fill(database, large)
            measured["large"] = drain(database, large)
            rounds.append(measured)
            print(f"round {number + 1}: " + ", ".join(f"{name} {one['rate']:,.0f}/s" for name, one in measured.items()))
    finally:
        postgres.close()
    report(rounds, {"small": small, "foreign": small, "large": large}, arguments.json)


def report(rounds: list[dict[str, dict[str, float]]], counts: dict[str, int], file: Path | None) -> None:
    print(f"\n{'':10}{'messages':>10}{'per second':>12}{'against small':>15}{'MiB at most':>13}{'memory grew':>13}")
    result = {}
    for name, count in counts.items():
        row = {key: statistics.median(one[name][key] for one in rounds) for key in ("rate", "mib", "growth")}
        row["share"] = statistics.median(one[name]["rate"] / one["small"]["rate"] for one in rounds)
        result[name] = row
        print(
            f"{name:10}{count:>10,}{row['rate']:>12,.0f}{row['share']:>15.0%}{row['mib']:>13.0f}{row['growth']:>13.0%}"
        )
    if file is not None:
        file.write_text(json.dumps({"counts": counts, "rounds": rounds, "result": result}, indent=1))


if __name__ == "__main__":
    main()
