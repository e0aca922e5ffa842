"""The broker of the demo as a process: confluent-kafka's in-process cluster. Prints its URL, ends with its input."""

from __future__ import annotations

import sys

from outboxkit.brokers.kafka import embedded_cluster

__all__ = ["main"]


def main(topics: list[str]) -> None:
    """Runs until standard input ends."""
    with embedded_cluster(topics) as url:
        print(url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
