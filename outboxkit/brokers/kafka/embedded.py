"""A Kafka-protocol cluster inside this process: librdkafka's mock cluster. For demos and quick tests only.

It lives as long as the handle that owns it, keeps little, and creates a topic when a producer asks for its metadata.
Other processes reach it by its port on loopback. When a member leaves its group, the cluster gives its partitions to
nobody before that member's session would have timed out: sessions are short here.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from confluent_kafka import Producer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["embedded_cluster", "shared"]

_TIMEOUT_SECONDS: Final = 10.0
_SESSIONS: Final = "session.timeout.ms=3000&heartbeat.interval.ms=300"


@contextmanager
def embedded_cluster(topics: Iterable[str] = ()) -> Iterator[str]:
    """Runs a cluster with these (empty) topics; yields its ``kafka://`` URL, good in any process of this machine.

    Guarantee: every topic exists, with four partitions and no record, before the URL is handed out.
    """
    owner = _start()
    for topic in topics:
        owner.list_topics(topic, timeout=_TIMEOUT_SECONDS)
    yield f"kafka://{_address(owner)}?{_SESSIONS}"
    owner.purge()


def shared(query: str) -> str:
    """Returns hosts and settings of the one cluster behind ``kafka://embedded``; the query's settings win over ours.

    It is started at the first call, and lives until the process ends.
    """
    return f"{_address(_shared())}?{_SESSIONS}&{query}"


@functools.cache
def _shared() -> Producer:
    return _start()


def _start() -> Producer:
    # bootstrap.servers is replaced by the mock cluster's own addresses.
    return Producer({"bootstrap.servers": "127.0.0.1:1", "test.mock.num.brokers": 1, "log_level": 0})


def _address(owner: Producer) -> str:
    brokers = owner.list_topics(timeout=_TIMEOUT_SECONDS).brokers.values()
    return ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
