"""Guards: limits around calls of other services, so that a slow or broken one does not take a handler with it.

Read `guard` (decorator and context manager), then `policy` (its decisions), `circuit_breaker` and `token_bucket` (which
the relay uses for its destinations, too), and `headers` (what goes along with an HTTP or gRPC call).
"""

from outboxkit.guards.circuit_breaker import CircuitRule, CircuitState
from outboxkit.guards.guard import Guard, GuardReport, guard, remaining, report
from outboxkit.guards.headers import grpc_metadata, grpc_timeout, http_headers

__all__ = [
    "CircuitRule",
    "CircuitState",
    "Guard",
    "GuardReport",
    "grpc_metadata",
    "grpc_timeout",
    "guard",
    "http_headers",
    "remaining",
    "report",
]
