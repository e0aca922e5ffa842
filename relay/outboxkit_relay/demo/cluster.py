"""A Kafka-protocol broker as a process: confluent-kafka's in-process cluster, for the demo and for tutorials."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import click

from outboxkit.brokers.kafka import embedded_cluster
from outboxkit_relay.daemon import lifecycle

__all__ = ["command", "main"]


@click.command("demo-broker")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def command(file: Path) -> None:
    """Serve a Kafka-protocol broker in memory, to try things out.

    It listens on this machine only, and its URL is written to FILE, for OUTBOXKIT_BROKER_URL_FILE. What it holds ends
    with it, at Ctrl-C or SIGTERM: it is no broker for production.
    """
    stop = threading.Event()
    with lifecycle.stop_on_signals(stop.set), embedded_cluster() as url:
        file.write_text(f"{url}\n")
        click.echo(f"serving {url} until Ctrl-C; export OUTBOXKIT_BROKER_URL_FILE={file}")
        stop.wait()
    file.unlink(missing_ok=True)


def main(topics: list[str]) -> None:
    """Runs until standard input ends, and prints the URL: the demo's broker ends with the demo."""
    with embedded_cluster(topics) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
