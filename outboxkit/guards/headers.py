"""Headers that hand a deadline, a conversation and a trace on to the services that a handler calls."""

from __future__ import annotations

from outboxkit import context
from outboxkit.guards.guard import remaining
from outboxkit.headers import format_instant

__all__ = ["CORRELATION", "DEADLINE", "grpc_metadata", "grpc_timeout", "http_headers"]

CORRELATION = "x-correlation-id"
DEADLINE = "x-request-deadline"  #: RFC 3339 in UTC: no standard names one for HTTP


def http_headers() -> dict[str, str]:
    """Headers for an HTTP request: ``httpx.get(url, headers=http_headers(), timeout=…)``; only what is known."""
    headers = {name: value.decode("ascii", "replace") for name, value in context.trace_headers()}
    if correlation := context.correlation_id():
        headers[CORRELATION] = correlation
    if (until := context.deadline()) is not None:
        headers[DEADLINE] = format_instant(until)
    return headers


def grpc_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata for a gRPC call; the deadline travels by `grpc_timeout`."""
    return tuple((name, value) for name, value in http_headers().items() if name != DEADLINE)


def grpc_timeout() -> float | None:
    """The ``timeout`` of a gRPC call in seconds, None without a deadline; gRPC hands it on by itself."""
    left = remaining()
    return None if left is None else left.total_seconds()
